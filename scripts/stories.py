"""A language model that skips: `python -m surgery.scripts.stories --shared ../shared --out out/stories`.

The 260 thousand parameter story writer is converted with per-token gates on attention, on MLPs, and on both, and with one
decision per story, from all of it or from its first half. Nats per token against cost on stories that nothing was fitted
on, beside the frozen policy of the same gates and skip paths (static: whole branches are dropped, in the greedy order),
and what it then writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.sites import Granularity, SkipKind

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
MLP_EXECUTIONS = (0.8, 0.6, 0.5, 0.4)
PROMPTS = ("Once upon a time, there was a little girl", "Tom had a big red ball.")
VARIANTS: dict[str, tuple[tuple[str, ...], Granularity, float]] = {
    "both per token": (("attention", "mlp"), "token", 0.7),
    "MLP per token": (("mlp",), "token", 0.86),
    "attention per token": (("attention",), "token", 0.93),
    "both per story": (("attention", "mlp"), "sample", 0.7),
    "both from the prompt": (("attention", "mlp"), "prefill", 0.7),
}
"""Kinds of sites, granularity, and the budget to convert for, since attention or MLPs alone are a small part of the whole."""


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
    from surgery.calibration import budget_range, point_at
    from surgery.context import state_of

    def off(budget: float, wanted: float) -> float:
        return abs(mlp_executions(gated, point_at(state_of(gated), budget).active_rate) - wanted)

    low, high = budget_range(gated)
    steps = [low + (high - low) * i / 1000 for i in range(1001)]
    return [min(steps, key=lambda budget: off(budget, wanted)) for wanted in executions]


def frontier(gated: nn.Module, test: Sequence[dict[str, Any]], budgets: Sequence[float]) -> Iterator[dict[str, float]]:
    """One row per budget within reach: realised cost and nats per token, routed and static."""
    from surgery import execution, set_budget
    from surgery.calibration import budget_range
    from surgery.context import state_of
    from surgery.costs import observe

    low, high = budget_range(gated)
    for budget in budgets:
        if not low - 0.01 <= budget <= high + 0.01:
            continue
        set_budget(gated, budget)
        row = {"budget": budget}
        for mode in ("skip", "static"):
            with execution(gated, mode):
                usage = observe(gated, test)
            weights = usage.weights / usage.weights.sum()
            costs = usage.costs(state_of(gated).costs)
            row[f"{mode} cost"] = float((costs * weights).sum())
            row[f"{mode} nats"] = nats(usage.outputs, test)
            if mode == "skip":
                row["MLP executions"] = mlp_executions(gated, usage.active_rate)
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


def main(
    shared: Annotated[Path, typer.Option(help="Directory with weights/ and data/.")] = Path("../shared"),
    out: Annotated[Path, typer.Option(help="Where to write one JSON file per variant.")] = Path("out/stories"),
    limit: Annotated[int, typer.Option(help="Training stories.")] = 1500,
    test_limit: Annotated[int, typer.Option(help="Test stories.")] = 400,
    epochs: Annotated[int, typer.Option(help="Passes over the training stories.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Names of the variants; all by default.")] = None,
    skip: Annotated[str, typer.Option(help="Kind of skip path.")] = "auto",
    validate: Annotated[bool, typer.Option(help="Score on training stories that are kept back, to choose by.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Convert the story writer four ways and score each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from surgery import Options, convert, set_budget
    from surgery.context import state_of

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    where = shared / "weights" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    results: dict[str, Any] = {"stories": {"dense": write_stories(model, tokenizer)}}
    for name, (kinds, grain, budget) in VARIANTS.items():
        if only and name not in only:
            continue
        cache = grain != "sample"
        train = batches_of(shared / "data/tinystories/train.parquet", tokenizer, limit, 8, cache=cache)
        test = batches_of(shared / "data/tinystories/test.parquet", tokenizer, test_limit, 16, cache=cache)
        if validate:
            kept = max(1, len(train) // 8)
            train, test = train[:-kept], train[-kept:]
        if "dense nats" not in results:
            with torch.no_grad():
                results["dense nats"] = nats([model(**batch).logits for batch in test], test)
        start = time.perf_counter()
        gated = convert(
            model,
            budget,
            data=train,
            sites=list(kinds),
            granularity=grain,
            skip=cast("SkipKind", skip),
            options=Options(epochs=epochs),
            seed=seed,
        )
        seconds = time.perf_counter() - start
        budgets = budgets_for(gated, MLP_EXECUTIONS) if kinds == ("mlp",) else BUDGETS
        rows = list(frontier(gated, test, budgets))
        results[name] = {
            "seconds": seconds,
            "rows": rows,
            "policy": state_of(gated).policy,
            "notes": state_of(gated).notes,
        }
        if name == "both per token":
            for shown in (0.8, 0.6):
                set_budget(gated, shown)
                results["stories"][str(shown)] = write_stories(gated, tokenizer)
        (out / f"{name.replace(' ', '-')}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        typer.echo(f"{name}: {rows}")
    text = markdown(results)
    (out / "stories.md").write_text(text, encoding="utf-8")
    typer.echo(text)


def markdown(results: dict[str, Any]) -> str:
    """The table and the stories of docs/results.md."""
    lines = [
        "| gates | MLP executions | cost | nats/token | static cost | static nats/token |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in VARIANTS:
        for row in results.get(name, {"rows": []})["rows"]:
            numbers = [f"{row[f'{mode} {what}']:.3f}" for mode in ("skip", "static") for what in ("cost", "nats")]
            lines.append(f"| {name} | {row['MLP executions']:.2f} | {' | '.join(numbers)} |")
    for budget, texts in results["stories"].items():
        lines += ["", f"**{budget}**", *(f"> {' '.join(text.split())}\n" for text in texts)]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
