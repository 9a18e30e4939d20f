"""A lab page: static policies with one kind of skip path or another, fitted in closed form, without any training.

    python -m surgery.scripts.skips_trial python:scripts/networks.py:resnet56 --data ../shared/data/cifar10/train.parquet \
        --kind depthwise --kind narrow:0.375

Sites are cut in the order that is measured for each kind; static policies of like cost are compared on other training data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.running import note


@dataclass(frozen=True, slots=True)
class Row:
    """One static policy.

    Args:
        kind: Of its skip paths, with the width of narrow ones.
        asked: The cost that was looked for.
        cost: That of the nearest cut, as a fraction of dense.
        divergence: Mean KL divergence from the dense model.
        agreement: Share of inputs with the same largest logit.
    """

    kind: str
    asked: float
    cost: float
    divergence: float
    agreement: float


def main(
    model: Annotated[str, typer.Argument(help="MODEL: a classifier.")],
    data: Annotated[str, typer.Option(help="Training data.")],
    kinds: Annotated[list[str], typer.Option("--kind", help="Repeatable: depthwise, linear, …, narrow:0.5.")],
    limit: options.FitLimit = 2000,
    held: options.Held = 500,
    batch_size: options.BatchSize = 50,
    costs: Annotated[list[float] | None, typer.Option("--cost", help="Repeatable; 0.75, 0.6, 0.5, 0.4.")] = None,
    augment: Annotated[bool, typer.Option(help="Whether pictures are flipped and shifted.")] = True,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    threads: options.Threads = 1,
) -> None:
    """Print a table."""
    options.set_up(threads, seed)
    typer.echo("| skip path | cost | KL | agreement |\n|---|---|---|---|")
    sizes = (limit, held, batch_size)
    for row in compare(model, data, kinds, costs or [0.75, 0.6, 0.5, 0.4], sizes, augment=augment, seed=seed):
        typer.echo(f"| {row.kind} | {row.cost:.3f} | {row.divergence:.4f} | {row.agreement:.3f} |")


def compare(
    model: str,
    data: str,
    kinds: list[str],
    costs: list[float],
    sizes: tuple[int, int, int],
    *,
    augment: bool,
    seed: int,
) -> Iterator[Row]:
    """Fit each kind and score the cuts nearest to `costs`; a cut that is nearest to several is given once."""
    import torch

    import surgery
    from surgery.adapters import load_data, load_model
    from surgery.calling import batches, read_output
    from surgery.context import state_of
    from surgery.costs import place, run
    from surgery.objectives import divergence
    from surgery.orders import settle_order
    from surgery.policies import static_cost

    limit, held, size = sizes
    loaded = load_model(model)
    common: dict[str, Any] = {"batch_size": size, "limit": limit + held, "seed": seed, "shuffle": True}
    rows = list(batches(load_data(data, loaded, split="train", augment=augment, **common)))
    fit, other = rows[: limit // size], rows[limit // size :]
    sites = surgery.find_sites(loaded.model, fit[0])
    for kind in kinds:
        started = time.process_time()
        name, _, width = kind.partition(":")
        more: Any = {"skip": name, **({"width": float(width)} if width else {})}
        gated = surgery.insert_gates(loaded.model, sites.plan(granularity="sample", **more))
        surgery.fit_skip_paths(gated, fit, seed=seed)
        settle_order(gated, fit, other, rounds=1, seed=seed)
        note(f"{kind}: {time.process_time() - started:.0f} s of CPU")
        state = state_of(gated)
        priced = {static_cost(state.costs, state.order[count:]): count for count in range(1, len(state.order) + 1)}
        nearest = {min(priced, key=lambda c: abs(c - asked)): asked for asked in reversed(costs)}
        for cost, asked in reversed(nearest.items()):
            cut = state.order[: priced[cost]]
            far, alike = [], []
            with torch.no_grad():
                for batch in (place(one, gated) for one in other):
                    with surgery.execution(gated, "dense"):
                        dense = read_output(run(gated, batch))
                    with surgery.force(gated, {site: site not in cut for site in state.order}):
                        output = read_output(run(gated, batch))
                    far.append(divergence(output, dense, batch))
                    alike.append((output.argmax(-1) == dense.argmax(-1)).double())
            yield Row(kind, asked, cost, float(torch.cat(far).mean()), float(torch.cat(alike).mean()))


if __name__ == "__main__":
    typer.run(main)
