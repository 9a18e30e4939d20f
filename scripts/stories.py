"""A language model that skips: `python -m surgery.scripts.stories --shared ../shared --out out/stories`.

The 260 thousand parameter story writer is converted with per-token gates on attention, on MLPs, and on both, and with one
decision per story, from all of it or from its first half. Nats per token against cost on stories that nothing was fitted
on, beside the static policy of the same gates and skip paths (static: whole branches are dropped, in the greedy order),
and what it then writes. Conversions and scores that are already in `--out` are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.sites import Granularity, SkipKind

PROMPTS = ("Once upon a time, there was a little girl", "Tom had a big red ball.")
_BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_MLP_EXECUTIONS = (0.6, 0.5, 0.4)
_HEALING = 200  # steps, as for the other real networks

Column = Literal["trained", "routers", "healed"]


@dataclass(frozen=True)
class Variant:
    """One way to convert.

    Args:
        name: In the table and, with dashes, of its files.
        kinds: Of sites.
        granularity: As in `convert`.
        budget: To convert for; high where attention or MLPs alone are a small part of the whole.
        skip: Kind of skip path.
        columns: Whether routers alone and healing are tried too, and further seeds.
    """

    name: str
    kinds: tuple[str, ...]
    granularity: Granularity
    budget: float
    skip: SkipKind | Literal["auto"] = "auto"
    columns: bool = False

    @property
    def file(self) -> str:
        """Its name in file names."""
        return self.name.replace(" ", "-")


VARIANTS = (
    Variant("MLP per token", ("mlp",), "token", 0.86, "linear", columns=True),
    Variant("both per token", ("attention", "mlp"), "token", 0.7),
    Variant("attention per token", ("attention",), "token", 0.93),
    Variant("both per story", ("attention", "mlp"), "sample", 0.7),
    Variant("both from the prompt", ("attention", "mlp"), "prefill", 0.7),
)


@dataclass(frozen=True)
class Setting:
    """What all conversions have in common.

    Args:
        shared: Directory with weights/ and data/.
        out: Where conversions and JSON files go.
        limit: Training stories.
        test_limit: Test stories.
        epochs: Passes over the training stories.
        validate: Score on training stories that are kept back, to choose by.
        skip: Kind of skip path in place of the variants' own ones, or None.
    """

    shared: Path
    out: Path
    limit: int
    test_limit: int
    epochs: int
    validate: bool = False
    skip: SkipKind | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        """What a conversion and its scores hang on."""
        return {name: getattr(self, name) for name in ("limit", "test_limit", "epochs", "validate", "skip")}

    @property
    def weights(self) -> Path:
        """The story writer's directory."""
        return self.shared / "weights" / "stories260K"

    def dense(self) -> tuple[Any, Any]:
        """The dense model and its tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(self.weights, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(self.weights)

    def stories(self, tokenizer: Any, variant: Variant) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Batches to convert with, and to score on."""
        cache, data = variant.granularity != "sample", self.shared / "data" / "tinystories"
        train = batches_of(data / "train.parquet", tokenizer, self.limit, 8, cache=cache)
        if self.validate:
            kept = max(1, len(train) // 8)
            return train[:-kept], train[-kept:]
        return train, batches_of(data / "test.parquet", tokenizer, self.test_limit, 16, cache=cache)

    def load(self, variant: Variant) -> dict[str, Any]:
        """What is known of a variant: `dense nats`, `stories`, and `runs`, one per column and seed."""
        file = self.out / f"{variant.file}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else {"stories": {}, "runs": []}

    def keep(self, variant: Variant, found: Mapping[str, Any]) -> None:
        """Write it down."""
        (self.out / f"{variant.file}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    def directory(self, variant: Variant, column: Column, seed: int) -> Path:
        """Where a conversion lies."""
        return self.out / f"{variant.file}-{column}-{seed}"


def batches_of(path: Path, tokenizer: Any, count: int, size: int, *, cache: bool) -> list[dict[str, Any]]:
    """Batches of stories, each cut to 512 tokens with `<s>` in front, padded on the right."""
    import pyarrow.parquet as pq
    import torch

    texts = pq.read_table(path).column("text").to_pylist()[:count]
    rows = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]][:512] for text in texts]
    made = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        made.append({"input_ids": ids, "attention_mask": mask} | ({} if cache else {"use_cache": False}))
    return made


def nats(outputs: Sequence[Tensor], data: Sequence[dict[str, Any]]) -> float:
    """Mean negative log-likelihood of the next real token."""
    import torch

    total, count = 0.0, 0
    for logits, batch in zip(outputs, data, strict=True):
        ids, real = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:].bool()
        loss = -torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[..., None]).squeeze(2)
        total += float(loss[real].sum())
        count += int(real.sum())
    return total / count


def mlp_executions(gated: nn.Module, rates: Mapping[str, float]) -> float:
    """Share of the MLPs' executions that active rates keep."""
    from surgery.context import state_of

    found = [rates[p.site.name] for p in state_of(gated).plan.sites if p.site.kind == "mlp"]
    return sum(found) / len(found) if found else 1.0


def budgets_for(gated: nn.Module, executions: Sequence[float]) -> list[float]:
    """The budgets at which calibration data has so many MLP executions."""
    from surgery.budgets import budget_range, point_at
    from surgery.context import state_of

    def off(budget: float, wanted: float) -> float:
        return abs(mlp_executions(gated, point_at(state_of(gated), budget).active_rate) - wanted)

    low, high = budget_range(gated)
    steps = [low + (high - low) * i / 1000 for i in range(1001)]
    return [min(steps, key=lambda budget: off(budget, wanted)) for wanted in executions]


def budgets_of(gated: nn.Module, variant: Variant) -> dict[str, float]:
    """What the rows of a variant stand for -> budget: MLP executions where only these are decided, or budgets within reach."""
    from surgery.budgets import budget_range

    if variant.kinds == ("mlp",):
        found = budgets_for(gated, _MLP_EXECUTIONS)
        return {f"{wanted:.2f} executions": budget for wanted, budget in zip(_MLP_EXECUTIONS, found, strict=True)}
    low, high = budget_range(gated)
    return {f"{budget:.2f}": budget for budget in _BUDGETS if low - 0.01 <= budget <= high + 0.01}


def frontier(
    gated: nn.Module, test: Sequence[dict[str, Any]], budgets: Mapping[str, float]
) -> Iterator[dict[str, float | str]]:
    """One row per budget: realised cost and nats per token, routed and static."""
    from surgery import execution, set_budget
    from surgery.context import state_of
    from surgery.costs import observe

    for name, budget in budgets.items():
        set_budget(gated, budget)
        row: dict[str, float | str] = {"row": name, "budget": budget}
        for mode in ("skip", "static"):
            with execution(gated, mode):
                usage = observe(gated, test)
            row[f"{mode} cost"] = usage.decided.cost(state_of(gated).costs)
            row[f"{mode} nats"] = nats(usage.outputs, test)
            if mode == "skip":
                row["MLP executions"] = mlp_executions(gated, usage.decided.active_rate)
        yield row


def write_stories(model: Any, tokenizer: Any) -> list[str]:
    """What the model writes, greedily."""
    import torch

    written = []
    for prompt in PROMPTS:
        ids = torch.tensor([[1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            out: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
        written.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return written


def tell_all(setting: Setting, variant: Variant, seeds: int, *, columns: bool) -> None:
    """Convert and score a variant: every seed, and the other columns of the first, where it has them."""
    for seed in range(seeds if variant.columns else 1):
        tell(setting, variant, "trained", seed)
    if columns and variant.columns:
        tell(setting, variant, "routers", 0)
        tell(setting, variant, "healed", 0)


def tell(setting: Setting, variant: Variant, column: Column, seed: int) -> None:
    """Convert and score once, unless it was done before; healing starts from the trained conversion of the same seed.

    Raises:
        SurgeryError: If the directory holds conversions of that variant with other settings.
    """
    import torch

    from surgery import Options, convert, load, save, set_budget
    from surgery.context import state_of
    from surgery.conversion import heal_converted
    from surgery.errors import SurgeryError

    found = setting.load(variant)
    if found.setdefault("setting", setting.chosen) != setting.chosen:
        raise SurgeryError(
            f"{setting.out} holds {variant.name!r} of other settings: {found['setting']}, now {setting.chosen}; "
            "choose another --out"
        )
    if any((run["column"], run["seed"]) == (column, seed) for run in found["runs"]):
        return
    model, tokenizer = setting.dense()
    train, test = setting.stories(tokenizer, variant)
    if "dense nats" not in found:
        found["stories"]["dense"] = write_stories(model, tokenizer)
        with torch.no_grad():
            found["dense nats"] = nats([model(**batch).logits for batch in test], test)
    start = time.perf_counter()
    gated: Any
    if column == "healed":
        gated = load(setting.directory(variant, "trained", seed), model=model)
        set_budget(gated, variant.budget)
        heal_converted(gated, train, "lora", options=Options(steps=_HEALING, heal_rate=3e-4), seed=seed)
    else:
        gated = convert(
            model,
            variant.budget,
            data=train,
            sites=list(variant.kinds),
            granularity=variant.granularity,
            skip=setting.skip or variant.skip,
            tune="routers" if column == "routers" else "train",
            options=Options(epochs=setting.epochs),
            seed=seed,
        )
    seconds, state = time.perf_counter() - start, state_of(gated)
    save(gated, setting.directory(variant, column, seed), spec=f"hf:{setting.weights}")
    found["runs"].append(
        {
            "column": column,
            "seed": seed,
            "seconds": seconds,
            "undone": column == "healed" and state.healing is None,
            "policy": state.policy,
            "notes": state.notes,
            "rows": list(frontier(gated, test, budgets_of(gated, variant))),
        }
    )
    if variant.name == "both per token" and column == "trained" and seed == 0:
        for shown in (0.8, 0.6):
            set_budget(gated, shown)
            found["stories"][str(shown)] = write_stories(gated, tokenizer)
    setting.keep(variant, found)


def clock(setting: Setting, variant: Variant) -> None:
    """Time the first seed's conversion beside the dense model, on training stories: one at a time, and sixteen."""
    from surgery import load, set_budget
    from surgery.timing import compare

    found = setting.load(variant)
    model, tokenizer = setting.dense()
    gated: Any = load(setting.directory(variant, "trained", 0), model=model)
    path = setting.shared / "data" / "tinystories" / "train.parquet"
    times: dict[str, dict[str, Any]] = {}
    for name, budget in budgets_of(gated, variant).items():
        set_budget(gated, budget)
        times[name] = {}
        for size in (1, 16):
            inputs = batches_of(path, tokenizer, 8 * size, size, cache=False)
            turns = [cycle(inputs), cycle(inputs)]
            ratio = compare(lambda t=turns: gated(**next(t[0])), lambda t=turns: model(**next(t[1])), repeats=30)  # type: ignore[misc]
            times[name][str(size)] = ratio.to_dict()
    setting.keep(variant, found | {"times": times})


def main(
    shared: Annotated[Path, typer.Option(help="Directory with weights/ and data/.")] = Path("../shared"),
    out: Annotated[Path, typer.Option(help="Where to write conversions, and one JSON file per variant.")] = Path(
        "out/stories"
    ),
    limit: Annotated[int, typer.Option(help="Training stories.")] = 600,
    test_limit: Annotated[int, typer.Option(help="Test stories.")] = 100,
    epochs: Annotated[int, typer.Option(help="Passes over the training stories.")] = 3,
    seeds: Annotated[int, typer.Option(help="Conversions of the first variant; the others have one.")] = 1,
    columns: Annotated[bool, typer.Option(help="Also routers alone, and healed, of the first variant.")] = False,
    timing: Annotated[bool, typer.Option(help="Also time the first seed.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Names of the variants; all by default.")] = None,
    skip: Annotated[str | None, typer.Option(help="Kind of skip path in place of the variants' own ones.")] = None,
    validate: Annotated[bool, typer.Option(help="Score on training stories that are kept back, to choose by.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Convert the story writer in several ways and score each."""
    import torch

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    setting = Setting(shared, out, limit, test_limit, epochs, validate, skip)  # type: ignore[arg-type]
    for variant in VARIANTS:
        if only and variant.name not in only:
            continue
        tell_all(setting, variant, seeds, columns=columns)
        if timing:
            clock(setting, variant)
    typer.echo(markdown({variant.name: setting.load(variant) for variant in VARIANTS}))


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables and the stories of docs/lab/texts.md; "" where nothing was converted."""
    from surgery.scripts.seeds import range_text

    known = {name: one for name, one in found.items() if one["runs"]}
    if not known:
        return ""
    lines = [
        "| gates | seeds | MLP executions | cost | nats/token | static cost | static nats/token | N = 1 | N = 16 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in known.items():
        runs = [run["rows"] for run in one["runs"] if run["column"] == "trained"]
        for rows in zip(*runs, strict=True):
            cells = [str(len(rows)), range_text([row["MLP executions"] for row in rows], 2)]
            for mode in ("skip", "static"):
                cells += [range_text([row[f"{mode} {what}"] for row in rows], 3) for what in ("cost", "nats")]
            times = one.get("times", {}).get(rows[0]["row"], {})
            cells += [f"{times[size]['median']:.2f}x" if size in times else "" for size in ("1", "16")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *_columns(known)]
    for budget, texts in {k: v for one in known.values() for k, v in one["stories"].items()}.items():
        lines += [f"**{budget}**", "", *(f"> {' '.join(text.split())}\n" for text in texts)]
    return "\n".join(lines)


def _columns(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Three columns, never mixed, of the first seed."""
    for name, one in found.items():
        runs = {run["column"]: run for run in one["runs"] if run["seed"] == 0}
        if len(runs) == 1:
            continue
        yield f"Three columns of {name}, the first seed: MLP executions, cost, nats/token"
        yield ""
        yield f"| row | {' | '.join(runs)} |"
        yield f"|{'---|' * (1 + len(runs))}"
        for rows in zip(*(run["rows"] for run in runs.values()), strict=True):
            cells = [f"{r['MLP executions']:.2f}, {r['skip cost']:.3f}, {r['skip nats']:.3f}" for r in rows]
            yield f"| {rows[0]['row']} | {' | '.join(cells)} |"
        if runs.get("healed", {}).get("undone"):
            yield from ("", "Healing left held-out outputs no nearer to dense and was undone.")
        yield ""


if __name__ == "__main__":
    typer.run(main)
