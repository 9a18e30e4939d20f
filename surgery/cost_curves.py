"""What a threshold would cost, from the scores of one pass.

Axis letters: `N` samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.context import Event
from surgery.state import CostModel


class CostCurve:
    """Cost as a function of the threshold, predicted from the scores of one pass: `collect` every batch, then `finish`.

    Exact at the threshold of that pass; elsewhere it misses that other upstream decisions would change the scores.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.scores: dict[str, list[Tensor]] = {}

    def collect(self, events: Sequence[Event]) -> None:
        """Take the scores of one batch."""
        for event in events:
            if event.scores is None:  # always on
                continue
            units = event.gate.site.units
            if len(units) > 1:
                for name, scores in zip(units, event.scores.unbind(1), strict=True):
                    self.scores.setdefault(name, []).append(scores.cpu())
                continue
            scores = event.scores.flatten()
            kept = scores if event.weights is None else scores[event.weights.flatten()]
            self.scores.setdefault(event.site, []).append(kept.cpu())

    def finish(self) -> CostCurve:
        """Sort; a score that is no number opens nothing, as one below every threshold."""
        joined = {name: torch.cat(parts) for name, parts in self.scores.items()}
        self.sorted = {
            name: scores.masked_fill(scores.isnan(), -torch.inf).sort().values for name, scores in joined.items()
        }
        self.scores.clear()
        return self

    def cost(self, threshold: float) -> float:
        """Predicted cost as a fraction of dense."""
        rates = {
            name: 1 - int(torch.searchsorted(scores, threshold, right=True)) / len(scores)
            for name, scores in self.sorted.items()
        }
        return self.costs.cost(rates)

    def solve(self, goal: float) -> float:
        """The threshold whose predicted cost is nearest to `goal`."""
        finite = [scores[scores.isfinite()] for scores in self.sorted.values()]  # first tokens have infinite ones
        low = min((float(scores[0]) for scores in finite if len(scores)), default=0.0) - 1.0
        high = max((float(scores[-1]) for scores in finite if len(scores)), default=0.0) + 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(middle) > goal else (low, middle)
        return (low + high) / 2
