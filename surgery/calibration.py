"""`calibrate`: one threshold per budget, from the realised cost on held-out data; `set_budget` moves between them.

Axis letters: `N` samples, `S` sites.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from surgery.calling import Batch
from surgery.context import execution, override, state_of
from surgery.costs import Usage, observe
from surgery.errors import BudgetError, DataError
from surgery.progress import Progress, silent
from surgery.state import BudgetPoint, CostModel, GatedState

TOLERANCE = 0.01
"""How far the realised mean cost may be from the budget."""
_GOAL = 0.002
_GRID = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_TRIES = 12


def calibrate(
    gated: nn.Module,
    data: Iterable[Any],
    budget: float,
    *,
    cost: Literal["flops", "latency"] = "flops",
    grid: Sequence[float] = _GRID,
    progress: Progress | None = None,
) -> BudgetPoint:
    """Find the threshold at which the realised mean cost on `data` equals `budget`, and a table of others; set the budget.

    Args:
        gated: A gated model whose routers have been fitted.
        data: Held-out batches; re-iterable.
        budget: Fraction of the dense model's cost in (0, 1].
        cost: `flops`, or `latency` measured on this device.
        grid: Further budgets for the table (those out of reach are left out).
        progress: Called after every pass over the data.

    Returns:
        The point that is now set.

    Raises:
        BudgetError: If the budget is outside (0, 1] or cannot be reached; names the attainable range.
        DataError: If the data yields nothing, or can be read only once.
    """
    check_budget(budget)
    state = state_of(gated)
    stored = _Repeatable(data)
    if cost == "latency":
        from surgery.latency import measure_costs

        state.costs = measure_costs(gated, stored.first, progress=progress)
    elif state.costs.unit != "flops":
        from surgery.rewriting import flop_costs

        state.costs = flop_costs(state.plan)
    search = _Search(gated, stored, progress or silent)
    low, high = search.range
    if budget < 1 and not low - 1e-9 <= budget:
        raise BudgetError(_unreachable(budget, low))
    for goal in sorted({*grid, budget} - {1.0}, reverse=True):
        if low + 0.005 <= goal <= high or goal == budget:
            search.solve(goal, _GOAL if goal == budget else 4 * _GOAL, _TRIES if goal == budget else 2)
    state.table = _monotone(search.points(budget))
    if cost == "latency":
        from surgery.latency import correct_table

        correct_table(gated, stored, budget, progress=progress)
    set_budget(gated, budget)
    return current_point(state)


def set_budget(gated: nn.Module, budget: float) -> None:
    """Set the mean cost that `gated` aims at, by interpolating its table of thresholds; 1.0 runs the dense model.

    Raises:
        BudgetError: If the budget is outside (0, 1] or outside the table; names the attainable range.
        NotConverted: If the model has no gates.
    """
    check_budget(budget)
    state = state_of(gated)
    if budget == 1:
        state.budget, state.threshold, state.static = 1.0, -math.inf, {}
        return
    if not state.table:
        raise BudgetError("this model was never calibrated, so no budget but 1.0 can be set; run surgery.calibrate first")
    low, high = state.table[0].cost, state.table[-1].cost
    if not low - TOLERANCE <= budget <= high + TOLERANCE:
        raise BudgetError(f"budget {budget:g} is outside the calibrated range [{low:.3f}, {high:.3f}] (or 1.0 for dense)")
    point = _interpolate(state.table, budget)
    state.budget, state.threshold = budget, point.threshold
    state.static = {name: name in point.static for name in state.names}


def budget_range(gated: nn.Module) -> tuple[float, float]:
    """Smallest and largest budget below 1.0 that `set_budget` accepts."""
    table = state_of(gated).table
    return (table[0].cost, table[-1].cost) if table else (1.0, 1.0)


def current_point(state: GatedState) -> BudgetPoint:
    """The table's point at the current budget, interpolated."""
    if state.budget is None or state.budget >= 1 or not state.table:
        return BudgetPoint(-math.inf, 1.0, dict.fromkeys(state.names, 1.0), state.names)
    return _interpolate(state.table, state.budget)


def check_budget(budget: float) -> None:
    """Raise `BudgetError` unless `budget` is a number in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise BudgetError(f"budget is the mean cost as a fraction of the dense model's, in (0, 1]; got {budget!r}")


def static_policy(costs: CostModel, rates: dict[str, float], budget: float) -> tuple[str, ...]:
    """The sites that a static policy keeps open: highest active rate first, while the cost stays within `budget`."""
    total = costs.fixed + sum(site.skip for site in costs.sites.values())
    kept = []
    for name in sorted(rates, key=lambda n: -rates[n]):
        extra = costs.sites[name].branch - costs.sites[name].skip
        if (total + extra) / costs.dense <= budget + 1e-9:
            total += extra
            kept.append(name)
    return tuple(name for name in costs.sites if name in kept)


class _Repeatable:
    """Data that was seen to give the same number of batches twice."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.first: Batch | None = None
        self.count: int | None = None

    def __iter__(self) -> Any:
        from surgery.calling import as_batch

        count = 0
        for value in self.data:
            if self.first is None:
                self.first = as_batch(value)
            count += 1
            yield value
        if self.count is not None and count != self.count:
            raise DataError(
                f"the calibration data gave {self.count} batches first and {count} the next time; "
                "pass a list or a DataLoader, not an iterator that can be read once"
            )
        self.count = count


class _Search:
    """Realised cost as a function of the threshold, evaluated by running the model."""

    def __init__(self, gated: nn.Module, data: _Repeatable, progress: Progress) -> None:
        self.gated, self.data, self.progress = gated, data, progress
        self.state = state_of(gated)
        self.seen: list[BudgetPoint] = []
        self.passes = 0
        with execution(gated, "mask"):
            scores = self._scores()
        self.quantiles = scores
        costs = self.state.costs
        closed = costs.cost(dict.fromkeys(self.state.names, 0.0))
        opened = costs.cost(dict.fromkeys(self.state.names, 1.0))
        self.seen.append(BudgetPoint(math.inf, closed, dict.fromkeys(self.state.names, 0.0)))
        self.seen.append(BudgetPoint(-math.inf, opened, dict.fromkeys(self.state.names, 1.0)))

    @property
    def range(self) -> tuple[float, float]:
        """Cost with everything closed, and with everything open."""
        return self.seen[0].cost, min(self.seen[1].cost, 1.0)

    def evaluate(self, threshold: float) -> BudgetPoint:
        """Run the data once at a threshold."""
        with override(self.state, thresholds=threshold), execution(self.gated, "skip"):
            usage = observe(self.gated, self.data, outputs=False)
        point = BudgetPoint(threshold, self._mean(usage), usage.active_rate)
        self.seen.append(point)
        self.passes += 1
        self.progress("calibrating", self.passes, None)
        return point

    def solve(self, goal: float, tolerance: float, tries: int) -> None:
        """Bracket `goal` and close in by regula falsi on the score quantiles, halving when that stalls."""
        for attempt in range(tries):
            below, above = self._bracket(goal)
            if min(abs(below.cost - goal), abs(above.cost - goal)) <= tolerance:
                return
            guess = self._guess(goal, below, above, halve=attempt % 3 == 2)
            if not above.threshold < guess < below.threshold:
                return
            self.evaluate(guess)

    def points(self, budget: float) -> list[BudgetPoint]:
        """Everything evaluated at a finite threshold, static policies added."""
        costs = self.state.costs
        found = [p for p in self.seen if math.isfinite(p.threshold)] + [p for p in self.seen if p.threshold == math.inf]
        points = [replace(p, static=static_policy(costs, p.active_rate, p.cost)) for p in found]
        if budget < 1:
            nearest = min(points, key=lambda p: abs(p.cost - budget))
            if abs(nearest.cost - budget) > TOLERANCE:
                raise BudgetError(
                    f"no threshold gives a mean cost within {TOLERANCE} of {budget:g} on this calibration data "
                    f"(nearest: {nearest.cost:.3f}); the routers give the same score to many inputs: use more or other data"
                )
        return points

    def _bracket(self, goal: float) -> tuple[BudgetPoint, BudgetPoint]:
        below = max((p for p in self.seen if p.cost <= goal), key=lambda p: (p.cost, -p.threshold))
        above = min((p for p in self.seen if p.cost >= goal), key=lambda p: (p.cost, -p.threshold))
        return below, above

    def _guess(self, goal: float, below: BudgetPoint, above: BudgetPoint, *, halve: bool) -> float:
        """A threshold between the bracket's, by position in the sorted scores."""
        scores = self.quantiles
        last = len(scores) - 1
        first = 0 if above.threshold == -math.inf else bisect_left(scores, above.threshold)
        end = last if below.threshold == math.inf else bisect_left(scores, below.threshold)
        share = 0.5 if halve or above.cost == below.cost else (above.cost - goal) / (above.cost - below.cost)
        place = first + min(max(share, 0.02), 0.98) * (end - first)
        index = min(max(int(place), 0), max(last - 1, 0))
        between = scores[index] + (place - int(place)) * (scores[min(index + 1, last)] - scores[index])
        if above.threshold < between < below.threshold:
            return between
        if math.isfinite(above.threshold) and math.isfinite(below.threshold):
            return (above.threshold + below.threshold) / 2
        if math.isfinite(above.threshold):
            return above.threshold + 1.0
        return below.threshold - 1.0 if math.isfinite(below.threshold) else 0.0

    def _scores(self) -> list[float]:
        """Sorted scores of all gates with everything open, weighted by savings through repetition."""
        from surgery.calling import batches, call
        from surgery.context import tape
        from surgery.costs import place

        found: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad(), override(self.state, thresholds=-math.inf):
            for batch in batches(self.data):
                with tape(self.gated) as events:
                    call(self.gated, place(batch, self.gated))
                for event in events:
                    assert event.scores is not None
                    scores = event.scores.flatten()
                    kept = scores if event.weights is None else scores[event.weights.flatten()]
                    found.setdefault(event.site, []).append(kept.cpu())
        costs = self.state.costs
        pooled = []
        for name, parts in found.items():
            scores = torch.cat(parts).sort().values
            share = (costs.sites[name].branch - costs.sites[name].skip) / costs.dense
            count = max(2, int(2000 * max(share, 0.0)))
            pooled.append(torch.quantile(scores[torch.linspace(0, len(scores) - 1, min(len(scores), 10000)).long()], torch.linspace(0, 1, count)))
        return torch.cat(pooled).sort().values.tolist()

    def _mean(self, usage: Usage) -> float:
        costs = usage.costs(self.state.costs)
        weights = usage.weights.double()
        return float((costs * weights).sum() / weights.sum())


def _monotone(points: list[BudgetPoint]) -> list[BudgetPoint]:
    """Sort by cost; thresholds made to fall with it (pool adjacent violators)."""
    points = sorted(points, key=lambda p: (p.cost, -p.threshold))
    blocks: list[list[BudgetPoint]] = []
    for point in points:
        blocks.append([point])
        while len(blocks) > 1 and _level(blocks[-2]) < _level(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    table = []
    for block in blocks:
        level = _level(block)
        middle = block[len(block) // 2]
        table.append(replace(middle, threshold=level))
    unique: dict[float, BudgetPoint] = {}
    for point in table:
        unique.setdefault(point.threshold, point)
    return sorted(unique.values(), key=lambda p: p.cost)


def _level(block: list[BudgetPoint]) -> float:
    return sum(p.threshold for p in block) / len(block)


def _interpolate(table: list[BudgetPoint], budget: float) -> BudgetPoint:
    costs = [p.cost for p in table]
    index = bisect_left(costs, budget)
    if index == 0:
        return table[0]
    if index == len(table):
        return table[-1]
    low, high = table[index - 1], table[index]
    share = (budget - low.cost) / (high.cost - low.cost) if high.cost > low.cost else 0.0
    if not math.isfinite(low.threshold):
        return low if share < 0.5 else high
    rates = {n: low.active_rate[n] + share * (high.active_rate[n] - low.active_rate[n]) for n in low.active_rate}
    nearer = high if share >= 1 - 1e-9 else low  # the static policy must stay within the budget
    return BudgetPoint(low.threshold + share * (high.threshold - low.threshold), budget, rates, nearer.static)


def _unreachable(budget: float, low: float) -> str:
    return (
        f"budget {budget:g} cannot be reached: with every gate closed the model still costs {low:.3f} of dense "
        f"(attainable: {low:.3f} to 1); choose a larger budget, cheaper skip paths, or more sites"
    )
