"""A lab page: second looks that begin in the middle of a network.

    python -m surgery.scripts.looks_trial DIR --data TEST --first 0.5 --start layer2.5

The least certain inputs of a static first pass run again, either the dense model from its start, or from a stored residual
stream on, with everything open behind a site. Such a pass is the static policy before the site and open gates from there, so
its outputs are had by forcing decisions, and its cost is that of what runs again. Shares are of the data that is scored, so
that rows compare at equal cost; what a share costs on other data is another matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.scripts import options

if TYPE_CHECKING:
    from surgery.state import CostModel

SHARES = (0.05, 0.1, 0.15, 0.2)


def main(
    directory: options.DirectoryArgument,
    data: Annotated[str, typer.Option(help="Labelled data that nothing was fitted on.")],
    first: Annotated[list[float], typer.Option("--first", help="Budget of a first pass; repeatable.")],
    start: Annotated[
        list[str] | None,
        typer.Option(help="Site from which a second look runs; repeatable. The whole model always does."),
    ] = None,
    base: options.Base = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 50,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
) -> None:
    """Print a table."""
    import torch

    from surgery.adapters import load_data
    from surgery.budgets import point_at
    from surgery.calling import batches
    from surgery.context import execution, force, state_of
    from surgery.costs import observe
    from surgery.scripts.loading import Machine
    from surgery.second_look import least_certain, margin_of

    gated, loaded = Machine(threads=threads, seed=seed).load_converted(Path(directory), base)
    state = state_of(gated)
    state.looks, state.margin = [], None
    read = load_data(data, loaded, split="test", batch_size=batch_size, limit=limit, seed=0, shuffle=limit is not None)
    inputs = list(batches(read))
    with execution(gated, "dense"):
        dense = observe(gated, inputs)
    labels = torch.cat([one for one in dense.labels if one is not None])
    whole = torch.cat(dense.outputs)
    typer.echo(
        "| first pass | its cost | alone | again from | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"
    )
    typer.echo("|" + "---|" * (4 + len(SHARES)))
    for budget in first:
        kept = set(point_at(state, budget).static)
        cost = state.costs.cost({name: float(name in kept) for name in state.names}, ())
        with force(gated, {name: name in kept for name in state.names}):
            passed = torch.cat(observe(gated, inputs).outputs)
        margins, weights = margin_of(passed).double(), torch.full((len(passed),), 1 / len(passed), dtype=torch.float64)
        for place in (None, *(start or ())):
            again, price = whole, 1.0
            if place is not None:
                behind = tail(state.names, place)
                with force(gated, {name: name in kept or name in behind for name in state.names}):
                    again = torch.cat(observe(gated, inputs).outputs)
                price = price_of(state.costs, behind)
            cells = []
            for share in SHARES:
                looked = least_certain(margins, weights, share)
                right = torch.where(looked[:, None], again, passed).argmax(-1) == labels
                cells.append(f"{right.double().mean():.4f} @{cost + price * float(looked.double().mean()):.3f}")
            alone = float((passed.argmax(-1) == labels).double().mean())
            where = "the start" if place is None else f"{place} ({price:.2f})"
            typer.echo(f"| {budget:.2f} | {cost:.3f} | {alone:.4f} | {where} | {' | '.join(cells)} |")


def tail(names: Sequence[str], start: str) -> tuple[str, ...]:
    """The sites from `start` on.

    Raises:
        typer.BadParameter: If there is no such site.
    """
    if start not in names:
        raise typer.BadParameter(f"no site named {start!r}; there are: {', '.join(names)}", param_hint="--start")
    return tuple(names[names.index(start) :])


def price_of(costs: CostModel, sites: Sequence[str]) -> float:
    """What running these sites and everything that has no gate costs, as a fraction of dense."""
    return (costs.fixed + sum(costs.sites[name].branch for name in sites)) / costs.dense


if __name__ == "__main__":
    typer.run(main)
