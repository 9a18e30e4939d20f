"""`python -m surgery.scripts.heads_runs`: heads against query tokens, with and without MLPs, on MiniLM and SST-2.

Every set of sites is converted once, in closed form, from training texts without their labels, and scored at several budgets on
test data that nothing was fitted, tuned or calibrated on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

SETS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "heads": (("heads",), (0.95, 0.9, 0.85)),
    "query tokens": (("attention",), (0.95, 0.9, 0.85)),
    "heads, MLP tokens": (("heads", "mlp"), (0.85, 0.75, 0.65)),
    "query and MLP tokens": (("attention", "mlp"), (0.85, 0.75, 0.65)),
}
"""Kinds of sites, and budgets."""


@dataclass(frozen=True, slots=True)
class Row:
    """One budget of one set of sites.

    Args:
        sites: Name of the set.
        budget: What was asked for.
        cost: Mean cost on test data.
        accuracy: Of the routed model.
        static_cost: Mean cost of the static policy of the same budget.
        static: Its accuracy.
        dense: Accuracy of the dense model.
    """

    sites: str
    budget: float
    cost: float
    accuracy: float
    static_cost: float
    static: float
    dense: float


def main(
    shared: Annotated[Path, typer.Option(help="Directory with weights/ and data/.")] = Path("../shared"),
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("out/heads.json"),
    limit: Annotated[int, typer.Option(help="Training texts read.")] = 6000,
    samples: Annotated[int, typer.Option(help="Texts that routers are fitted on.")] = 2048,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Convert MiniLM four times and score it."""
    import torch

    from surgery import convert, set_budget
    from surgery.adapters import load_data, load_model
    from surgery.budgets import budget_range

    torch.set_num_threads(threads)
    loaded = load_model(str(shared / "weights" / "minilm-sst2"))
    common: dict[str, Any] = {"batch_size": 64, "seed": seed}
    source = shared / "data" / "sst2"
    train = load_data(
        str(source / "train.parquet"), loaded, split="train", shuffle=True, limit=limit, whole_texts="auto", **common
    )
    test = list(load_data(str(source / "test.parquet"), loaded, split="test", **common))
    rows: list[Row] = []
    for name, (kinds, budgets) in SETS.items():
        gated = convert(loaded.model, budgets[1], data=train, sites=kinds, tune="oneshot", samples=samples, seed=seed)
        low, high = budget_range(gated)
        for budget in budgets:
            if low <= budget <= high:
                set_budget(gated, budget)
                rows.append(_scored(gated, test, name, budget))
                typer.echo(markdown(rows[-1:]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    typer.echo(markdown(rows))


def _scored(gated: nn.Module, test: Sequence[Any], name: str, budget: float) -> Row:
    from surgery import execution
    from surgery.context import state_of
    from surgery.costs import observe

    found = {}
    for mode in ("skip", "static", "dense"):
        with execution(gated, mode):
            usage = observe(gated, test)
        pairs = [(a, b) for a, b in zip(usage.outputs, usage.labels, strict=True) if b is not None]
        right = sum(int((a.argmax(1) == b).sum()) for a, b in pairs)
        found[mode] = usage.decided.cost(state_of(gated).costs), right / sum(len(b) for _, b in pairs)
    return Row(name, budget, *found["skip"], *found["static"], found["dense"][1])


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/lab/texts.md."""
    lines = ["| sites | budget | cost | accuracy | static (cost) | dense |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row.sites} | {row.budget} | {row.cost:.3f} | {row.accuracy:.4f} | {row.static:.4f} ({row.static_cost:.3f}) | "
            f"{row.dense:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
