"""`surgery coverage`: which architectures convert, checked on tiny random networks of each; no network, no data.

Every row is measured in a process of its own, so that a crash is a row and not the end.
"""

from __future__ import annotations

import fnmatch
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.scripts.running import command

PRELOADED = ["surgery.scripts.zoo", "surgery.finding", "timm", "transformers.generation.utils", "torchvision"]
"""Imported once for all processes."""
TOKENS = 8
"""Generated in a check."""
TOLERANCE = 1e-4  # relative: sums over fewer rows are ordered differently


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen of one architecture.

    Args:
        name: `<family>/<architecture>`.
        found: Sites found, or None where the run ended in an error.
        expected: Residual branches by the classes of the model's modules.
        counted: How `expected` was counted.
        kinds: Sites found per kind.
        per_token: Sites that can be decided per token.
        queries: Of these, attentions that then run for some query tokens only.
        heads: Attentions whose heads can be decided.
        heads_agree: Whether `skip` gives what `mask` gives for forced decisions of heads; None where there are none.
        bit_equal: Whether open gates give the original's bits.
        agrees: Whether `skip` gives what `mask` gives for forced decisions.
        generates: Whether tokens generated with a cache are those generated without; None where nothing is generated.
        rejected: Reasons, and how often.
        seconds: Time to find sites and insert gates.
        error: Text of the error, or "".
    """

    name: str
    found: int | None = None
    expected: int | None = None
    counted: str = ""
    kinds: dict[str, int] | None = None
    per_token: int = 0
    queries: int = 0
    heads: int = 0
    heads_agree: bool | None = None
    bit_equal: bool | None = None
    agrees: bool | None = None
    generates: bool | None = None
    rejected: dict[str, int] | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def complete(self) -> bool:
        """Whether everything expected was found and checked."""
        return (
            not self.error
            and (self.found or 0) >= (self.expected or 0)
            and self.bit_equal is True
            and self.agrees is True
            and self.heads_agree is not False
            and self.generates is not False
        )


def measure_entry(name: str) -> Row:
    """Convert the zoo's network `name` and check it; errors become the row's text."""
    from surgery.scripts.zoo import find

    entry = find(name)
    row: dict[str, Any] = {"name": name, "counted": "; ".join(filter(None, (entry.counted(), entry.note)))}
    try:
        model, example = entry.build()
        row["expected"] = entry.expected(model)
        row |= _convert_and_check(model, example, entry.example(3, seed=1))
        if row["found"] and getattr(model, "can_generate", bool)():
            row["generates"] = _generates(model, entry.example(3, seed=1))
    except Exception as error:  # a row reports every failure, whatever its class
        row["error"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
    return Row(**row)


def _convert_and_check(model: Any, example: Any, other: Any) -> dict[str, Any]:
    from surgery import find_sites, force, insert_gates

    start = time.perf_counter()
    sites = find_sites(model, example)
    result: dict[str, Any] = {
        "found": len(sites),
        "kinds": dict(Counter(site.kind for site in sites)),
        "per_token": sum("token" in site.granularities for site in sites),
        "queries": sum(site.query is not None for site in sites),
        "rejected": dict(Counter(rejection.reason for rejection in sites.rejections))
        | dict(Counter(f"heads: {rejection.reason}" for rejection in sites.heads_rejections)),
        "heads": len(sites.heads),
    }
    if not len(sites):
        return {**result, "bit_equal": True, "agrees": True, "seconds": time.perf_counter() - start}
    gated = insert_gates(model, sites)
    result["seconds"] = time.perf_counter() - start
    with force(gated, 1.0):
        result["bit_equal"] = all(_equal(gated, model, inputs) for inputs in (example, other))
    result["agrees"] = _agrees(gated, other)
    if sites.heads:
        result["heads_agree"] = _agrees(insert_gates(model, sites.filter(kind="heads")), other)
    return result


def _agrees(gated: Any, example: Any) -> bool:
    """Whether `skip` gives what `mask` gives, half of all decisions closed."""
    from surgery import execution, force

    found = []
    for mode in ("skip", "mask"):
        with execution(gated, mode), force(gated, 0.5, seed=0):
            found.append(_outputs(gated, example))
    return all(_gap(a, b) <= TOLERANCE for a, b in zip(*found, strict=True))


def _generates(model: Any, example: Any) -> bool:
    """Whether a cache changes no generated token, half of all decisions closed; in float64, left-padded."""
    import torch

    from surgery import find_sites, force, insert_gates

    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in example.items()
        if not name.startswith("decoder_")
    }
    model = model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fused ones have no float64
    if not model.config.is_encoder_decoder:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        shifts = ids.shape[1] - mask.sum(1)
        for name in ("input_ids", "attention_mask"):
            rows = zip(inputs[name], shifts.tolist(), strict=True)
            inputs[name] = torch.stack([row.roll(shift) for row, shift in rows])
    decoded = {name: value for name, value in example.items() if name.startswith("decoder_")}
    gated: Any = insert_gates(model, find_sites(model, {**inputs, **decoded}))
    found = []
    for cached in (True, False):
        with torch.no_grad(), force(gated, 0.5, seed=1):
            found.append(
                gated.generate(
                    **inputs,
                    max_new_tokens=TOKENS,
                    min_new_tokens=TOKENS,
                    do_sample=False,
                    use_cache=cached,
                    pad_token_id=0,
                )
            )
    return bool(torch.equal(*found))


def _outputs(model: Any, example: Any) -> list[Any]:
    import torch

    from surgery.calling import tensors
    from surgery.scripts.zoo import call

    with torch.no_grad():
        return tensors(call(model, example))


def _equal(gated: Any, model: Any, example: Any) -> bool:
    import torch

    mine, original = _outputs(gated, example), _outputs(model, example)
    return len(mine) == len(original) and all(torch.equal(a, b) for a, b in zip(mine, original, strict=True))


def _gap(a: Any, b: Any) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12))


def measure_all(names: Iterable[str], jobs: int, limit: float) -> Iterator[Row]:
    """Measure every network in a process of its own, in order, `jobs` at a time, at most `limit` seconds each."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if isinstance(context, ForkServerContext):
        context.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: _in_process(context, name, limit), names)


def _in_process(context: Any, name: str, limit: float) -> Row:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            row: Row = receiver.recv()
            return row
        return Row(name, error=f"took more than {limit:.0f} s")
    except EOFError:
        process.join()
        return Row(name, error=f"the process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(name: str, sender: Any) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    sender.send(measure_entry(name))


# -- the page --------------------------------------------------------------------------------------------------------


def page_of(rows: list[Row], command_line: str) -> str:
    """The Markdown page of all rows."""
    without = [row for row in rows if row.expected == 0]
    others = [row for row in rows if row.expected != 0]
    failed = [row.name for row in rows if row.error or not (row.bit_equal and row.agrees)]
    found = sum(min(row.found or 0, row.expected or 0) for row in rows)
    lines = [
        "# Coverage",
        "",
        f"{sum(row.complete for row in others)} of {len(others)} architectures with residual branches are covered in "
        "full: every branch is found, open gates give the original's bits, and skipping gives what masking gives. "
        f"{sum(not row.found for row in others)} give no site at all. {len(without)} more have no residual branch. "
        f"Over all of them, {found} of {sum(row.expected or 0 for row in rows)} branches are found.",
        "",
        f"Converted, but not equal, or ended in an error: {', '.join(failed) or 'none'}.",
        "",
        "Random networks of each architecture, most of them shortened, on one CPU thread, with frozen parameters: where "
        "weights require gradients torch multiplies some of them in another order, so that a few of these networks "
        "(CaiT, SigLIP, Mamba) differ from their own frozen selves in the last bits, with or without gates. Made by",
        "",
        f"    {command_line}",
        "",
        f"with {versions()}.",
        "",
        "`found / expected`: sites, and residual branches counted from the classes of the modules; more are found than "
        "expected where a sum that the count leaves out has a branch as well. `per token`: "
        "sites that can be decided for every token. `queries`: of these, attentions that then run for some query tokens "
        "only. `heads`: attentions whose heads can be decided one by one, where `skip` "
        "equals `mask` as well. `open`: all gates open is bit-equal to the original, at two batch "
        f"sizes. `skip`: half of all decisions closed at random, `skip` equals `mask` within {TOLERANCE:g} of the "
        f"largest value. `generation`: {TOKENS} tokens generated with a cache are those generated without, for three "
        "left-padded inputs, in float64, half of all decisions closed at random; – where the network does not generate "
        "([more is checked](generation.md)). `s`: seconds to find the sites and insert the gates.",
    ]
    for family in dict.fromkeys(row.name.split("/")[0] for row in rows):
        mine = [row for row in rows if row.name.split("/")[0] == family]
        lines += ["", f"## {family}", "", *_table(mine)]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| architecture | found / expected | per token | queries | heads | open | skip | generation | s | counted | left alone |",
        "|---|---:|---:|---:|---:|:-:|:-:|:-:|---:|---|---|",
    ]
    for row in rows:
        cells = [
            row.name.split("/")[1],
            f"{_dash(row.found)} / {_dash(row.expected)}",
            str(row.per_token),
            str(row.queries),
            f"{row.heads}{' **not equal**' if row.heads_agree is False else ''}",
            _mark(row.bit_equal),
            _mark(row.agrees),
            _mark(row.generates),
            f"{row.seconds:.1f}",
            row.counted,
            _words(row),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _words(row: Row) -> str:
    words = [f"**{row.error}**"] if row.error else []
    words += [f"{reason} ({count})" for reason, count in (row.rejected or {}).items()]
    return "; ".join(words)


def _dash(value: int | None) -> str:
    return "–" if value is None else str(value)


def _mark(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "**no**"


def versions() -> str:
    """Versions of this tool and of the libraries that the result depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {platform.python_version()}"]
    for name in ("bypass-surgery", "torch", "timm", "transformers", "torchvision"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


@command
def coverage(
    out: Annotated[Path | None, typer.Option("--out", help="Write the Markdown page here.")] = None,
    only: Annotated[str, typer.Option("--only", help="Glob over architecture names, such as 'timm/*vit*'.")] = "*",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes at a time.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", help="Time limit per architecture.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Check which architectures convert, on tiny random networks."""
    from surgery.scripts import outputs
    from surgery.scripts.running import note, show_json
    from surgery.scripts.zoo import COVERAGE

    names = [entry.name for entry in COVERAGE if fnmatch.fnmatchcase(entry.name, only)]
    if not names:
        raise typer.BadParameter(f"no architecture matches {only!r}", param_hint="--only")
    if out is not None:
        outputs.check_file("--out", out)
    rows = []
    for row in measure_all(names, jobs, seconds):
        rows.append(row)
        note(f"{len(rows):3d}/{len(names)} {row.name:32} {_dash(row.found)}/{_dash(row.expected)} {row.error}")
    arguments = "" if only == "*" else f" --only '{only}'"
    page = page_of(rows, f"surgery coverage{arguments} --out {out or 'docs/coverage.md'}")
    if out is not None:
        outputs.write(out, page.encode())
    if as_json:
        show_json({"rows": [asdict(row) for row in rows]})
    elif out is None:
        typer.echo(page)


if __name__ == "__main__":
    typer.run(coverage)
