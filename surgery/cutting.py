"""`cut_order`: the order in which static policies cut sites, the least harmful per cost saved first.

Greedy: the site whose cut raises the divergence from the dense model least, per cost it saves, given those already cut.
A site's rise seldom falls when others are cut, so an old value is nearly a lower bound, and only the few sites that look
best by old values are run again in each round (lazy greedy, Minoux 1978).

Axis letters: `N` samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from surgery.calling import Batch, batches, read_output
from surgery.context import execution, state_of
from surgery.costs import place, run
from surgery.objectives import apart, scale_of
from surgery.policies import constant, decided, static_cost
from surgery.progress import Progress, silent
from surgery.splitting import Head

LOWEST = 0.35
"""Below this cost the remaining sites are ordered by their latest values."""
_TRIES = 6  # sites run again per round; the order hardly changes with more


def cut_order(
    gated: nn.Module, data: Iterable[Any], *, samples: int = 128, progress: Progress | None = None
) -> tuple[str, ...]:
    """Measure the order on the first `samples` samples and keep it in the model, where static policies read it.

    Args:
        gated: A gated model whose skip paths have been fitted.
        data: Batches; labels are not used.
        samples: Number of samples.
        progress: Called with the number of sites ordered.

    Returns:
        Site names, the first to be cut first; those that are always on are not among them.

    Raises:
        DataError: If the data yields nothing.
    """
    state = state_of(gated)
    always = state.plan.always_on
    report = progress or silent
    given = [place(batch, gated) for batch in _first(data, samples)]

    def harm(cut: Sequence[str]) -> float:
        with decided(gated, constant([name for name in state.units if name not in cut])):
            parts = [
                apart(read_output(run(gated, b)), d, b, values=state.gives_values, scale=scale).double()
                for b, d in zip(given, dense, strict=True)
            ]
        return float(torch.cat(parts).mean())

    def price(name: str) -> float:
        site = state.costs.sites[name]
        return max((site.branch - site.skip) / state.costs.dense, 1e-12)

    with torch.no_grad():
        with execution(gated, "dense"):
            dense = [read_output(run(gated, batch)) for batch in given]
        scale = scale_of(dense, given, values=state.gives_values)
        names = [name for name in state.units if name not in always]
        heap = [(harm([name]) / price(name), index, name) for index, name in enumerate(names)]
        heapq.heapify(heap)
        order: list[str] = []
        now = 0.0
        while heap:
            measured = static_cost(state.costs, [*always, *(name for _, _, name in heap)]) > LOWEST
            found: dict[str, float] = {}  # run again what looks best until it stays the best
            while measured and len(found) < _TRIES and (name := heap[0][2]) not in found:
                found[name] = harm([*order, name])
                heapq.heapreplace(heap, ((found[name] - now) / price(name), heap[0][1], name))
            order.append(heapq.heappop(heap)[2])
            if measured:
                now = found[order[-1]] if order[-1] in found else harm(order)
            report("ordering cuts", len(order), len(names))
    state.order = tuple(order)
    return state.order


def _first(data: Iterable[Any], samples: int) -> Iterator[Batch]:
    """The first samples, in the batches that they come in, which are padded to their own longest text each."""
    left = samples
    for batch in batches(Head(data, samples)):
        some = batch if batch.size <= left else batch.rows(torch.arange(left, device=batch.device))
        yield some
        left -= some.size
