"""`calibrate`: one threshold per budget, from the realised cost on held-out data.

Axis letters: `N` samples, `S` sites.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from surgery.budgets import TOLERANCE, current_point, mixed, set_budget, static_policy
from surgery.calling import Batch, batches, check_batches
from surgery.context import execution, override, state_of
from surgery.cost_curves import CostCurve
from surgery.costs import observe
from surgery.errors import BudgetError, DataError, check_budget, check_choice
from surgery.padding import is_unread
from surgery.progress import Progress, silent
from surgery.sites import Cost
from surgery.state import BudgetPoint

_GOAL = 0.002
_GRID_GOAL = 0.02
_GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_NEAR_CLOSED = 0.04  # above the cost of all gates closed, where thresholds run off to infinity
_STEP = 0.02  # largest gap in the table of budgets
_TRIES = 10
_FEW = 16  # samples: fewer have too few scores for thresholds to lie between


def calibrate(
    gated: nn.Module,
    data: Iterable[Any],
    budget: float,
    *,
    cost: Cost = "flops",
    grid: Sequence[float] = _GRID,
    progress: Progress | None = None,
) -> BudgetPoint:
    """Find the threshold at which the realised mean cost on `data` equals `budget`, and a table of others; set the
    budget.

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
        BudgetError: If the budget is outside (0, 1] or cannot be reached; names the attainable range, or how many samples
            there were where these are too few. The calibration before it stays in force.
        DataError: If the data yields nothing, or can be read only once.
    """
    budget = check_budget(budget)
    check_choice("cost", cost, get_args(Cost))
    state = state_of(gated)
    with state.restored_on_error():
        _calibrate(gated, data, budget, cost, grid, progress)
    return current_point(state)


def _calibrate(
    gated: nn.Module,
    data: Iterable[Any],
    budget: float,
    cost: Cost,
    grid: Sequence[float],
    progress: Progress | None,
) -> None:
    state = state_of(gated)
    state.looks = []  # they belong to the thresholds that are replaced
    stored = _Repeatable(data)
    state.padding_is_unread = is_unread(gated, stored)
    if cost == "latency":
        from surgery.latency import measure_costs

        state.costs = measure_costs(gated, stored.first(), progress=progress)
    elif state.costs.unit != "flops":
        from surgery.rewriting import flop_costs

        state.costs = flop_costs(state.plan)
    search = _Search(gated, stored, progress or silent)
    low, high = search.range
    _check_reachable(budget, low)
    for goal in sorted({*grid, low + _NEAR_CLOSED, budget} - {1.0}, reverse=True):
        if low + 0.005 <= goal <= high or goal == budget:
            search.solve(goal, _GOAL if goal == budget else _GRID_GOAL, _TRIES if goal == budget else 2)
    state.table = search.filled(_monotone(search.points(budget)))
    state.report = {}  # what was measured was measured at other thresholds
    if cost == "latency":
        from surgery.latency import correct_table

        correct_table(gated, stored, budget, progress=progress)
    set_budget(gated, budget)


class _Repeatable:
    """Data that was seen to give the same number of batches twice."""

    def __init__(self, data: Iterable[Any]) -> None:
        check_batches(data)
        self.data = data
        self.count: int | None = None

    def first(self) -> Batch:
        """The first batch."""
        return next(batches(self.data))

    def __iter__(self) -> Any:
        count = 0
        for value in self.data:
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
        self.curves: dict[float, CostCurve] = {}
        self.passes = 0
        self.samples = 0
        closed, opened = (
            BudgetPoint(threshold, self.state.costs.cost(rates), rates)
            for threshold, rates in (
                (math.inf, self.state.constant_rates(0.0)),
                (-math.inf, self.state.constant_rates(1.0)),
            )
        )
        if self.state.plan.first_tokens:  # what they cost depends on how long sequences are
            closed = self.evaluate(math.inf)
        self.seen = [closed, opened]
        self.range = (closed.cost, min(opened.cost, 1.0))

    def evaluate(self, threshold: float) -> BudgetPoint:
        """Run the data once at a threshold."""
        curve = CostCurve(self.state.costs)
        with override(self.state, thresholds=threshold, forced=None), execution(self.gated, "skip"):
            usage = observe(self.gated, self.data, outputs=False, inspect=curve.collect)
        point = BudgetPoint(threshold, usage.decided.cost(self.state.costs), usage.decided.active_rate)
        self.curves[point.cost] = curve.finish()
        self.passes += 1
        self.samples = len(usage.decided.weights)
        self.progress("calibrating", self.passes, None)
        return point

    def solve(self, goal: float, tolerance: float, tries: int) -> None:
        """Find a threshold whose realised cost is near `goal`: by the nearest pass's curve, then by bisection."""
        if not self.curves:
            self.evaluate(-math.inf)
        goal = max(goal, self.range[0])  # a budget may lie below by rounding
        for attempt in range(tries):
            below = max((p for p in self.seen if p.cost <= goal), key=lambda p: (p.cost, -p.threshold))
            above = min((p for p in self.seen if p.cost >= goal), key=lambda p: (p.cost, -p.threshold))
            if min(goal - below.cost, above.cost - goal) <= tolerance:
                return
            guess = self.curves[min(self.curves, key=lambda cost: abs(cost - goal))].solve(goal)
            if not above.threshold < guess < below.threshold or attempt >= tries // 2:
                if not (math.isfinite(above.threshold) and math.isfinite(below.threshold)):
                    guess = above.threshold + 1 if math.isfinite(above.threshold) else below.threshold - 1
                else:
                    guess = (above.threshold + below.threshold) / 2
            if not above.threshold < guess < below.threshold:
                return
            self.seen.append(self.evaluate(guess))

    def points(self, budget: float) -> list[BudgetPoint]:
        """Everything evaluated, static policies added.

        Raises:
            BudgetError: If nothing came near the budget.
        """
        costs, ranks = self.state.costs, self.state.ranks
        points = [
            replace(p, static=static_policy(costs, ranks(p.active_rate), p.cost))
            for p in self.seen
            if p.threshold > -math.inf
        ]
        if budget < 1:
            nearest = min(points, key=lambda p: abs(p.cost - budget))
            if abs(nearest.cost - budget) > TOLERANCE:
                few = f"it holds {self.samples} sample{'s' * (self.samples != 1)} only: more data is needed"
                alike = "the routers give the same score to many inputs: use more or other data"
                raise BudgetError(
                    f"no threshold gives a mean cost within {TOLERANCE} of {budget:g} on this calibration data "
                    f"(nearest: {nearest.cost:.3f}); {few if self.samples < _FEW else alike}"
                )
            # scores come in steps, and a threshold between two of them would give either cost
            points[points.index(nearest)] = replace(nearest, cost=budget)
            if nearest.cost in self.curves:
                self.curves[budget] = self.curves[nearest.cost]
        return points

    def filled(self, table: list[BudgetPoint]) -> list[BudgetPoint]:
        """The table with points in between, since costs fall along the scores' distribution and not along a line.

        Thresholds are read from the curves of both neighbours, each of which is exact at its own end.
        """
        result = table[:1]
        for low, high in itertools.pairwise(table):
            count = math.ceil((high.cost - low.cost) / _STEP)
            upper, lower = self.curves.get(high.cost), self.curves.get(low.cost)
            for index in range(1, count):
                if upper is None:
                    break
                share = index / count
                goal = low.cost + share * (high.cost - low.cost)
                guess = upper.solve(goal)
                threshold = guess if lower is None else share * guess + (1 - share) * lower.solve(goal)
                last = result[-1]
                if (
                    not high.threshold < threshold < last.threshold
                ):  # the curves disagree about the order: along the line
                    along = (goal - last.cost) / (high.cost - last.cost)
                    threshold = last.threshold + along * (high.threshold - last.threshold)
                if high.threshold < threshold < last.threshold:
                    rates = mixed(low, high, share)
                    static = static_policy(self.state.costs, self.state.ranks(rates), goal)
                    result.append(BudgetPoint(threshold, goal, rates, static))
            result.append(high)
        return result


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


def check_floor(gated: nn.Module, budget: float) -> None:
    """Refuse a budget that the plan puts out of reach, before anything is fitted: FLOPs with every gate closed count.

    Args:
        gated: A gated model whose costs are counted in FLOPs.
        budget: Mean cost as a fraction of dense.

    Raises:
        BudgetError: If it cannot be reached, as `calibrate` does.
    """
    state = state_of(gated)
    _check_reachable(budget, state.costs.cost(state.constant_rates(0.0)))


def _check_reachable(budget: float, low: float) -> None:
    if budget >= 1 or budget >= low - 1e-9:
        return
    raise BudgetError(
        f"budget {budget:g} cannot be reached: with every gate closed the model still costs {low:.3f} of dense "
        f"(attainable: {low:.3f} to 1); choose a larger budget, cheaper skip paths, or more sites"
    )
