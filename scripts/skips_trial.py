"""A lab page: static policies with one kind of skip path or another, fitted in closed form, without any training.

    python -m surgery.scripts.skips_trial python:scripts/networks.py:resnet56 --data ../shared/data/cifar10/train.parquet \
        --kind depthwise --kind narrow:0.375

Sites are cut in the order that is measured for each kind; static policies of like cost are compared on other training data.
With `--per-site 0.42` there is one more: each site has the kind that repairs most of its error for what it costs, at a price of
error for cost at which the network with all sites skipped costs 0.42 at most.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.running import note

if TYPE_CHECKING:
    from surgery.sites import Plan


_DEAREST = 1e6  # at this price only the cost counts


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


@dataclass(frozen=True, slots=True)
class Fitted:
    """One kind of skip path at every site.

    Args:
        plan: What was fitted.
        left: Site -> error that is left, as a share of that of skipping without a path.
        closed: Site -> cost of its path, as a fraction of dense.
        fixed: Cost of what always runs, likewise.
    """

    plan: Plan
    left: Mapping[str, float]
    closed: Mapping[str, float]
    fixed: float


def main(
    model: Annotated[str, typer.Argument(help="MODEL: a classifier.")],
    data: Annotated[str, typer.Option(help="Training data.")],
    kinds: Annotated[list[str], typer.Option("--kind", help="Repeatable: depthwise, linear, …, narrow:0.5.")],
    limit: options.FitLimit = 2000,
    held: options.Held = 500,
    batch_size: options.BatchSize = 50,
    costs: Annotated[list[float] | None, typer.Option("--cost", help="Repeatable; 0.75, 0.6, 0.5, 0.4.")] = None,
    per_site: Annotated[
        list[float] | None,
        typer.Option(
            help="Repeatable: also the best of these kinds at each site, at that cost with all of them skipped."
        ),
    ] = None,
    augment: Annotated[bool, typer.Option(help="Whether pictures are flipped and shifted.")] = True,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    threads: options.Threads = 1,
) -> None:
    """Print a table."""
    options.set_up(threads, seed)
    typer.echo("| skip path | cost | KL | agreement |\n|---|---|---|---|")
    sizes = (limit, held, batch_size)
    wanted = costs or [0.75, 0.6, 0.5, 0.4]
    for row in compare(model, data, kinds, wanted, sizes, augment=augment, seed=seed, per_site=per_site or []):
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
    per_site: Sequence[float] = (),
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

    def scored(label: str, plan: Plan) -> tuple[Fitted, list[Row]]:
        started = time.process_time()
        gated = surgery.insert_gates(loaded.model, plan)
        left = surgery.fit_skip_paths(gated, fit, seed=seed)
        settle_order(gated, fit, other, rounds=1, seed=seed)
        note(f"{label}: {time.process_time() - started:.0f} s of CPU")
        state = state_of(gated)
        closed = {site: one.skip / state.costs.dense for site, one in state.costs.sites.items()}
        priced = {static_cost(state.costs, state.order[count:]): count for count in range(1, len(state.order) + 1)}
        nearest = {min(priced, key=lambda c: abs(c - asked)): asked for asked in reversed(costs)}
        found = []
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
            found.append(Row(label, asked, cost, float(torch.cat(far).mean()), float(torch.cat(alike).mean())))
        return Fitted(plan, left, closed, state.costs.fixed / state.costs.dense), found

    tried = []
    for kind in kinds:
        name, _, width = kind.partition(":")
        more: Any = {"skip": name, **({"width": float(width)} if width else {})}
        fitted, found = scored(kind, sites.plan(granularity="sample", **more))
        tried.append(fitted)
        yield from found
    for floor in per_site:
        plan = best_kinds(tried, floor)
        note(", ".join(f"{one.site.name} {one.skip} {one.rank or ''}".strip() for one in plan.sites))
        yield from scored(f"per site, {floor:g}", plan)[1]


def best_kinds(tried: Sequence[Fitted], floor: float) -> Plan:
    """For each site the kind for which error left plus price times cost is least, at the lowest price that reaches `floor`.

    Args:
        tried: Plans of the same sites.
        floor: Largest cost with all sites skipped, as a fraction of dense.

    Raises:
        ValueError: If no price reaches it.
    """

    def at(price: float) -> list[Fitted]:
        names = [planned.site.name for planned in tried[0].plan.sites]
        return [min(tried, key=lambda one: one.left[name] + price * one.closed[name]) for name in names]

    def cost(price: float) -> float:
        parts = zip(at(price), tried[0].plan.sites, strict=True)
        return tried[0].fixed + sum(one.closed[planned.site.name] for one, planned in parts)

    low, high = 0.0, _DEAREST
    if cost(high) > floor:
        raise ValueError(
            f"with the cheapest of these kinds everywhere {cost(high):.3f} of the cost is left, above {floor:g}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= floor else (middle, high)
    chosen = [one.plan.sites[index] for index, one in enumerate(at(high))]
    return replace(tried[0].plan, sites=tuple(chosen))


if __name__ == "__main__":
    typer.run(main)
