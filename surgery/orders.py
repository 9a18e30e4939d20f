"""`settle_order`: several cut orders with skip paths refitted for each, of which the best is kept.

A greedy order hangs on the samples that it was measured on: what is cut first decides what the later skip paths can
repair. On ResNet-56 the divergence of the static policy of cost 0.58 was between 0.21 and 0.38 for orders from four draws of
samples, and more samples did not make it less. So orders are judged by what they lead to, on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from surgery.calling import Batch, batches, read_output
from surgery.context import execution, state_of
from surgery.costs import place, run
from surgery.cutting import cut_order
from surgery.fitting import fit_skip_paths
from surgery.gates import iter_gates
from surgery.objectives import Scale, apart
from surgery.policies import constant, cut, decided
from surgery.progress import Progress

COSTS = (0.5, 0.6, 0.75)
"""Static policies of these costs are compared."""


def settle_order(
    gated: nn.Module,
    data: Iterable[Any],
    held: Iterable[Any],
    *,
    rounds: int,
    samples: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Measure `rounds` orders on other samples each, refit skip paths on nested cuts, and keep the best order and its paths.

    Args:
        gated: A gated model whose skip paths have been fitted.
        data: Batches to measure and fit on; labels are not used.
        held: Other batches, on which the rounds are compared.
        rounds: Number of orders.
        samples: Number of samples that an order is measured on.
        seed: Seed of the refits.
        progress: Called with the number of sites done.

    Returns:
        What the rounds are compared by, the mean log divergence of their static policies from the dense model; empty where
        there is only one round.

    Raises:
        DataError: If the data yields nothing.
    """
    state = state_of(gated)
    paths = [parameter for _, gate in iter_gates(gated) for parameter in gate.skip_path.parameters()]
    before = [parameter.detach().clone() for parameter in paths]
    found: list[float] = []
    best: tuple[tuple[str, ...], list[torch.Tensor]] | None = None
    for number in range(rounds):
        _copy(before, paths)
        cut_order(gated, _Later(data, number * samples), samples=samples, progress=progress)
        fit_skip_paths(gated, data, decisions="nested", seed=seed, progress=progress)
        if rounds == 1:
            return found
        found.append(_distance(gated, held))
        if best is None or found[-1] <= min(found):
            best = state.order, [parameter.detach().clone() for parameter in paths]
    if best is not None:
        state.order = best[0]
        _copy(best[1], paths)
    return found


class _Later:
    """The batches of `data` after the first `samples` samples, and these after them."""

    def __init__(self, data: Iterable[Any], samples: int) -> None:
        self.data, self.samples = data, samples

    def __iter__(self) -> Iterator[Batch]:
        first: list[Batch] = []
        left = self.samples
        for batch in batches(self.data):
            if left > 0:
                first.append(batch)
            else:
                yield batch
            left -= batch.size
        yield from first


def _copy(values: list[torch.Tensor], parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _distance(gated: nn.Module, held: Iterable[Any]) -> float:
    """Mean over `COSTS` of the log of the divergence of the static policy of that cost, the two nearest ones interpolated."""
    state = state_of(gated)
    ranks = {name: float(place) for place, name in enumerate(state.order)}
    around = [cut(state.costs, {**dict.fromkeys(state.costs.sites, math.inf), **ranks}, cost) for cost in COSTS]
    policies: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for one in around:
        policies |= {one.lower: [], one.upper: []}
    scale = Scale()
    with torch.no_grad():
        for given in batches(held):
            batch = place(given, gated)
            with execution(gated, "dense"):
                dense = read_output(run(gated, batch))
            scale.add(dense, batch, values=state.gives_values)
            for kept, parts in policies.items():
                with decided(gated, constant(kept)):
                    output = read_output(run(gated, batch))
                    parts.append(apart(output, dense, batch, values=state.gives_values, scale=1.0).double().cpu())
    means = {kept: float(torch.cat(parts).mean()) / scale.value for kept, parts in policies.items()}
    mixed = [(1 - one.share) * means[one.lower] + one.share * means[one.upper] for one in around]
    return sum(math.log(max(value, 1e-12)) for value in mixed) / len(mixed)
