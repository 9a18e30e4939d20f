"""Budgets in training: which one a step aims at, and the threshold that gives it.

The threshold is the price of compute: a branch runs where its predicted harm, per cost saved, is above it. So it plays
the part of the Lagrange multiplier, one for every budget, and is corrected after every step by the cost that was seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_POINTS = 12
_GAIN = 1.0
_UNCALIBRATED = 0.0


@dataclass(slots=True)
class Pace:
    """Draws a budget for every step and keeps a table of thresholds.

    Args:
        low: Smallest budget drawn.
        high: Largest budget drawn.
        ramp: Steps in which the smallest budget comes down from `high`.
        seed: Seed of the draws.
        thresholds: One for each of the budgets in `grid`.
    """

    low: float
    high: float
    ramp: float
    seed: int
    thresholds: list[float] = field(default_factory=list)

    @property
    def grid(self) -> list[float]:
        """The budgets of the table, rising; a single one where `low` equals `high`."""
        if self.high - self.low < 1e-6:
            return [self.low]
        return [self.low + (self.high - self.low) * i / (_POINTS - 1) for i in range(_POINTS)]

    def start(self, known: Sequence[tuple[float, float]]) -> None:
        """Begin from `(cost, threshold)` pairs of a calibration, costs rising; may be empty."""
        known = [(cost, threshold) for cost, threshold in known if math.isfinite(threshold)]
        self.thresholds = [_interpolate(known, budget) for budget in self.grid]

    def target(self, step: int) -> float:
        """The budget of a step."""
        done = min(1.0, (step + 1) / max(1.0, self.ramp))
        low = self.high + done * (self.low - self.high)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        return low + (self.high - low) * float(torch.rand((), generator=generator))

    def threshold(self, budget: float) -> float:
        """The threshold that is thought to give a budget."""
        return _interpolate(list(zip(self.grid, self.thresholds, strict=True)), budget)

    def correct(self, budget: float, cost: float) -> None:
        """Learn from a step that aimed at `budget` and cost `cost`; the table stays monotone."""
        grid = self.grid
        if not math.isfinite(cost):
            return  # of a batch whose streams hold NaN, or of padding alone
        for index, point in enumerate(grid):
            spacing = grid[1] - grid[0] if len(grid) > 1 else 1.0
            share = max(0.0, 1 - abs(budget - point) / spacing) if len(grid) > 1 else 1.0
            self.thresholds[index] += _GAIN * share * (cost - budget)
        self.thresholds = list(itertools.accumulate(self.thresholds, min))


def _interpolate(known: Sequence[tuple[float, float]], budget: float) -> float:
    if not known:
        return _UNCALIBRATED
    if budget <= known[0][0]:
        return known[0][1]
    for (c0, t0), (c1, t1) in itertools.pairwise(known):
        if budget <= c1:
            return t0 + (t1 - t0) * (budget - c0) / max(c1 - c0, 1e-12)
    return known[-1][1]
