"""`python -m surgery.scripts.speed`: what skipping is worth in time, on random weights, with decisions drawn by hand.

    active    exactly 62 % of all decisions keep their branch, as many at every site; drawn anew for every call
    open      every branch runs: what gates cost where nothing is skipped
    routers   every router runs and every branch as well: the routers' share of the time
    convert   seconds to find sites and insert gates, and new memory as a share of the model's

Times are those of the gated model by those of the dense one, called in turns in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.running import command, note, show, show_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.timing import Ratio

RATE = 0.62
MARGIN = 0.05
"""A convolutional network may take this much more of dense time than of dense FLOPs."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Args:
        network: Name of the architecture.
        what: active, open, routers or convert.
        batch: Samples per call.
        ratio: Median over the pairs of gated by dense time (`routers`: share of time; `convert`: share of memory).
        low: Lower quartile.
        high: Upper quartile.
        total: All gated time by all dense time.
        flops: FLOPs that ran, as a fraction of dense.
        limit: What `total` (or `ratio`, or `seconds`) may be at most.
        seconds: Of the conversion.
        dense_ms: Median time of the dense model.
    """

    network: str
    what: str
    batch: int | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    total: float | None = None
    flops: float | None = None
    limit: float | None = None
    seconds: float | None = None
    dense_ms: float | None = None

    @classmethod
    def timed(cls, network: str, what: str, batch: int, ratio: Ratio, **more: Any) -> Row:
        """A row of a timed comparison."""
        return cls(network, what, batch, ratio.median, ratio.q1, ratio.q3, ratio.total, dense_ms=ratio.b_ms, **more)


def balanced_draws(names: tuple[str, ...], calls: int, samples: int, rate: float, seed: int) -> list[dict[str, Tensor]]:
    """Decisions for every call, of which exactly `rate` are True at every site over all calls."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    kept = round(rate * calls * samples)
    columns = {}
    for name in names:
        flat = torch.zeros(calls * samples, dtype=torch.bool)
        flat[torch.randperm(len(flat), generator=generator)[:kept]] = True
        columns[name] = flat.view(calls, samples)
    return [{name: column[call] for name, column in columns.items()} for call in range(calls)]


def new_memory(gated: nn.Module, model: nn.Module) -> float:
    """Bytes of tensors that `gated` does not share with `model`, as a fraction of the model's."""

    def sizes(module: nn.Module) -> dict[int, int]:
        tensors = (*module.parameters(), *module.buffers())
        return {t.data_ptr(): t.numel() * t.element_size() for t in tensors}

    mine, theirs = sizes(gated), sizes(model)
    return sum(size for pointer, size in mine.items() if pointer not in theirs) / sum(theirs.values())


def measure_network(name: str, make: Callable[[], tuple[Any, Any]], settings: Settings) -> Iterator[Row]:
    """All rows of one network."""
    import torch

    from surgery import find_sites, insert_gates

    torch.manual_seed(0)
    model, example = make()
    start = time.perf_counter()
    gated = insert_gates(model, find_sites(model, example).plan(granularity="sample", skip=settings.skip))
    seconds = time.perf_counter() - start
    yield Row(name, "convert", ratio=new_memory(gated, model), limit=0.03, seconds=seconds)
    if isinstance(example, dict):
        return
    for size in settings.sizes:
        x = torch.randn(size, *example.shape[1:])
        calls = settings.draws if size == 1 else max(settings.draws // 4, 8)
        yield _active(name, gated, model, x, calls)
        yield _open(name, gated, model, x, calls)
        yield _routers(name, gated, x, max(calls // 4, 8))


def _active(name: str, gated: Any, model: Any, x: Tensor, calls: int) -> Row:
    from surgery import force
    from surgery.context import state_of
    from surgery.timing import compare

    warmup = 3
    state = state_of(gated)
    draws = balanced_draws(state.names, calls, len(x), RATE, seed=len(x))
    following = iter([*draws[:warmup], *draws])

    def skipping() -> None:
        with force(gated, next(following)):
            gated(x)

    ratio = compare(skipping, lambda: model(x), repeats=calls, warmup=warmup)
    routers = sum(cost.router for cost in state.costs.sites.values())  # none runs where decisions are forced
    flops = state.costs.cost(dict.fromkeys(state.names, RATE)) - routers / state.costs.dense
    limit = 0.67 if name.startswith("deit") else flops + MARGIN
    return Row.timed(name, "active", len(x), ratio, flops=flops, limit=limit)


def _open(name: str, gated: Any, model: Any, x: Tensor, calls: int) -> Row:
    from surgery import force
    from surgery.timing import compare

    def opened() -> None:
        with force(gated, 1.0):
            gated(x)

    ratio = compare(opened, lambda: model(x), repeats=calls, warmup=3)
    return Row.timed(name, "open", len(x), ratio, flops=1.0, limit=1.03)


def _routers(name: str, gated: Any, x: Tensor, calls: int) -> Row:
    """Routers are timed where they run: the difference of two whole calls would drown in noise."""
    import statistics

    import torch

    from surgery import execution
    from surgery.context import override, state_of

    shares, times = [], []
    state = state_of(gated)
    with torch.no_grad(), _timed_routers(gated) as spent, override(state, thresholds=-1e9), execution(gated, "skip"):
        for index in range(calls + 3):
            spent[0] = 0.0
            start = time.perf_counter()
            gated(x)
            whole = time.perf_counter() - start
            if index >= 3:
                shares.append(spent[0] / whole)
                times.append(whole)
    low, median, high = statistics.quantiles(shares, n=4, method="inclusive")
    flops = sum(cost.router for cost in state.costs.sites.values()) / state.costs.dense
    return Row(name, "routers", len(x), median, low, high, flops=flops, limit=0.02)


@contextmanager
def _timed_routers(gated: Any) -> Iterator[list[float]]:
    from surgery.gates import iter_gates

    spent, started = [0.0], [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[0] += time.perf_counter() - started[0]

    handles = []
    for _, gate in iter_gates(gated):
        handles += [gate.router.register_forward_pre_hook(before), gate.router.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


# -- networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """What all networks are measured with."""

    sizes: tuple[int, ...]
    draws: int
    skip: Any


def _timm(name: str) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        import timm
        import torch

        return timm.create_model(name).eval(), torch.randn(2, 3, 224, 224)

    return make


def _bert() -> tuple[Any, Any]:
    import torch
    from transformers import BertConfig, BertModel

    ids = torch.randint(5, 1000, (2, 64))
    return BertModel(BertConfig()).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NETWORKS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "deit_small_patch16_224": _timm("deit_small_patch16_224"),
    "resnet50": _timm("resnet50"),
    "bert-base": _bert,
}


# -- the page ---------------------------------------------------------------------------------------------------------


def page_of(rows: list[Row], here: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in here.items()),
        "",
        "| network | what | batch | median (middle half) | of all time | FLOPs | at most | dense ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.what == "convert":
            what = f"convert: {row.seconds:.1f} s, new memory"
            lines.append(f"| {row.network} | {what} | | {_share(row.ratio)} | | | {_share(row.limit)} | |")
            continue
        shown = _share if row.what == "routers" else _times
        middle = f"{shown(row.ratio)} ({shown(row.low)} … {shown(row.high)})"
        cells = (row.network, row.what, row.batch, middle, _times(row.total), _share(row.flops), shown(row.limit))
        lines.append(f"| {' | '.join(map(str, cells))} | {'' if row.dense_ms is None else f'{row.dense_ms:.1f}'} |")
    return "\n".join(lines) + "\n"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}x"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


@command
def speed(
    only: Annotated[str | None, typer.Option("--only", help=f"One of {', '.join(NETWORKS)}.")] = None,
    timed_batch: options.TimedBatches = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=8, help="Timed pairs at batch 1; a quarter at others.")
    ] = 120,
    skip: Annotated[str, typer.Option("--skip", help="Skip paths: auto, identity, affine, linear.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Write a Markdown table here.")] = None,
    threads: options.Threads = 2,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time random networks with decisions drawn by hand, against the dense ones."""
    from surgery.tables import rows_table
    from surgery.timing import conditions

    if only is not None and only not in NETWORKS:
        raise typer.BadParameter(f"no network {only!r}; there are: {', '.join(NETWORKS)}", param_hint="--only")
    options.set_up(threads, 0)
    settings = Settings(tuple(timed_batch or (1, 8)), repeats, skip)
    rows = []
    for name in NETWORKS if only is None else (only,):
        for row in measure_network(name, NETWORKS[name], settings):
            rows.append(row)
            note(f"{row.network} {row.what} {row.batch or ''}")
    here = {**conditions(), "skip paths": skip}
    if out is not None:
        out.write_text(page_of(rows, here), encoding="utf-8")
    if as_json:
        show_json({"conditions": here, "rows": [asdict(row) for row in rows]})
    else:
        show(rows_table(", ".join(f"{key} {value}" for key, value in here.items()), rows))


if __name__ == "__main__":
    typer.run(speed)
