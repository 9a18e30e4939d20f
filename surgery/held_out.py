"""Held-out data while training: which weights were nearest to the dense model, at the cost of the budgets that they serve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from surgery.budgets import TOLERANCE
from surgery.context import execution, override, state_of
from surgery.cost_curves import CostCurve
from surgery.costs import observe
from surgery.objectives import distances

_TRIES = 4  # passes over the data until the cost is that of the budget


class HeldOut:
    """Looks at held-out data, and keeps the weights that were nearest to the dense model at the cost of every budget.

    A look's score is the mean over the budgets of the divergence by that of the first look.

    Args:
        gated: A gated model.
        data: Held-out batches, or None, which looks at nothing.
        budgets: Fractions of the dense model's cost; the first is the one whose threshold is kept.
    """

    def __init__(self, gated: nn.Module, data: Iterable[Any] | None, budgets: Sequence[float]) -> None:
        self.gated, self.data, self.budgets = gated, data, budgets
        self.dense: list[Tensor] | None = None
        self.first: list[float] = []
        self.score = math.inf
        self.last = [state_of(gated).threshold] * len(budgets)
        self.threshold = self.last[0]
        self.best: dict[str, Tensor] | None = None

    def look(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Run the data at the thresholds that give the budgets with the weights of now; the row to log, which tells of the
        first budget.
        """
        if self.data is None:
            return {}
        if self.dense is None:
            with execution(self.gated, "dense"):
                self.dense = observe(self.gated, self.data).outputs
        found = [self._at(index) for index in range(len(self.budgets))]
        means = [mean for mean, _ in found]
        self.first = self.first or means
        score = sum(mean / max(first, 1e-12) for mean, first in zip(means, self.first, strict=True)) / len(means)
        if score <= self.score:
            self.score, self.threshold = score, self.last[0]
            self.best = {name: p.detach().clone() for name, p in parameters.items()}
        return {"held_divergence": means[0], "held_cost": found[0][1], "held_score": score}

    def _at(self, index: int) -> tuple[float, float]:
        """Divergence of the weights of now at the cost of a budget, and that cost.

        The training's own thresholds are of decisions with noise, which cost more than those without.
        """
        assert self.data is not None and self.dense is not None
        costs, budget = state_of(self.gated).costs, self.budgets[index]
        for attempt in range(_TRIES):
            curve = CostCurve(costs)
            with (
                override(state_of(self.gated), thresholds=self.last[index], forced=None),
                execution(self.gated, "skip"),
            ):
                usage = observe(self.gated, self.data, inspect=curve.collect)
            cost = usage.decided.cost(costs)
            if abs(cost - budget) <= TOLERANCE or attempt == _TRIES - 1:
                break
            self.last[index] = curve.finish().solve(budget)
        values = state_of(self.gated).gives_values
        return float(distances(usage.outputs, self.dense, self.data, values=values).mean()), cost

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        best = None if self.best is None else {name: value.cpu() for name, value in self.best.items()}
        kept = {"score": self.score, "first": list(self.first), "threshold": self.threshold, "last": list(self.last)}
        return {**kept, "best": best}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from it."""
        self.score, self.first, self.threshold = saved["score"], saved["first"], saved["threshold"]
        self.last, self.best = saved["last"], saved["best"]
