"""Which of two results of a conversion stays: routing or the static policy, one-shot or trained, by held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.budgets import set_budget
from surgery.context import execution, state_of
from surgery.costs import Usage, observe
from surgery.objectives import distances
from surgery.training import trainable


@dataclass(slots=True)
class Snapshot:
    """Routers, skip paths and table of a gated model, and how far the better of its two policies is from dense on held-out
    data.
    """

    tensors: dict[str, Tensor]
    table: list[Any]
    divergence: float

    @classmethod
    def of(cls, gated: nn.Module, data: Iterable[Any]) -> Snapshot:
        """Take one."""
        tensors = {name: p.detach().clone() for name, p in trainable(gated).items()}
        routed = float(distances_from_dense(gated, data, observe(gated, data)).mean())
        with execution(gated, "static"):
            static = float(distances_from_dense(gated, data, observe(gated, data)).mean())
        return cls(tensors, list(state_of(gated).table), min(routed, static))

    def restore(self, gated: nn.Module, budget: float) -> None:
        """Go back to it."""
        with torch.no_grad():
            for name, parameter in trainable(gated).items():
                parameter.copy_(self.tensors[name])
        state_of(gated).table = self.table
        set_budget(gated, budget)


def distances_from_dense(gated: nn.Module, data: Iterable[Any], usage: Usage) -> Tensor:
    """Divergence from the dense model per sample, `(N,)`, of outputs that were collected earlier."""
    with execution(gated, "dense"):
        dense = observe(gated, data)
    return distances(usage.outputs, dense.outputs, data, values=state_of(gated).gives_values)


def keep_the_better(gated: nn.Module, held: Iterable[Any], before: Snapshot, budget: float) -> None:
    """Go back to what was before training where that was nearer to dense on held-out batches, with a note."""
    if not Snapshot.of(gated, held).divergence <= before.divergence:  # NaN is no better
        before.restore(gated, budget)
        state_of(gated).note(
            "training did not improve on the one-shot conversion on held-out data; the one-shot result is kept"
        )


def prefer_static_where_it_wins(gated: nn.Module, held: Iterable[Any], *, ties: bool = False) -> bool:
    """Let the static policy run where it is closer to dense, beyond chance, than routing at the same cost.

    Args:
        gated: A gated model with a budget.
        held: Held-out batches.
        ties: Whether the static policy, which needs no router, also runs where neither is closer beyond chance.

    Returns:
        Whether it runs.
    """
    state = state_of(gated)
    routed = distances_from_dense(gated, held, observe(gated, held))
    with execution(gated, "static"):
        static = distances_from_dense(gated, held, observe(gated, held))
    difference = routed - static
    if len(difference) < 2:
        return False
    mean, chance = float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
    if not (mean >= -chance if ties else mean > chance > 0):
        return False
    state.policy = "static"
    means = f"(mean divergence {float(routed.mean()):.4g} against {float(static.mean()):.4g})"
    found = "was farther from" if mean > chance else "was not closer beyond chance to"
    state_of(gated).note(
        f"input-dependent routing {found} the dense model than the static policy of the same cost on held-out data "
        f"{means}, so the static policy runs"
    )
    return True
