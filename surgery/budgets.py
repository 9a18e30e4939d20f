"""The table of budgets: which threshold and which static policy a budget means, and `set_budget`.

`surgery.calibration` makes the table.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from surgery.context import override, state_of
from surgery.errors import BudgetError, check_budget
from surgery.state import BudgetPoint, CostModel, GatedState, LookPoint

TOLERANCE = 0.01
"""How far the realised mean cost may be from the budget."""
_STEEP = 10  # times the usual change of cost with the threshold: a step


def set_budget(gated: nn.Module, budget: float) -> None:
    """Set the mean cost that `gated` aims at, by interpolating its table of thresholds; 1.0 runs the dense model.

    Args:
        gated: A gated model.
        budget: Mean cost as a fraction of the dense model's.

    Raises:
        BudgetError: If the budget is outside (0, 1] or outside the table; names the attainable range.
        NotConverted: If the model has no gates.
    """
    budget = check_budget(budget)
    state = state_of(gated)
    state.margin = None
    if budget == 1:
        state.budget, state.threshold, state.static = 1.0, -math.inf, {}
        return
    point, state.margin = passes_at(state, budget)
    state.budget, state.threshold = budget, point.threshold
    state.static = {name: name in point.static for name in state.units}


def point_at(state: GatedState, budget: float) -> BudgetPoint:
    """The table's point at a budget below 1.0, interpolated; nothing is set.

    Raises:
        BudgetError: If the budget is outside the table; names the attainable range.
    """
    if not state.table:
        raise BudgetError(
            "this model was never calibrated, so no budget but 1.0 can be set; run surgery.calibrate first"
        )
    low, high = state.table[0].cost, state.table[-1].cost
    if not low - TOLERANCE <= budget <= high + TOLERANCE:
        raise BudgetError(
            f"budget {budget:g} is outside the calibrated range [{low:.3f}, {high:.3f}] (or 1.0 for dense); take one inside, "
            "or for less convert again with more sites"
        )
    return _point(state, budget)


def passes_at(state: GatedState, budget: float) -> tuple[BudgetPoint, float | None]:
    """What the first pass runs at under a budget below 1.0, and the margin below which inputs are looked at again, or None.

    Raises:
        BudgetError: If the budget is outside the table; names the attainable range.
    """
    point_at(state, budget)  # refuses what is out of range
    look = look_at(state.looks, budget)
    rest = budget - look.cost  # dense costs 1: the rest of the budget is the share of inputs
    return _point(state, look.base), _between(look.margins, rest) if look.margins and rest > 0 else None


@contextmanager
def at_point(state: GatedState, point: BudgetPoint, margin: float | None = None) -> Iterator[None]:
    """Calls in the block run at a point of the table, whatever the model is set to, with a second look at inputs whose margin
    is below `margin`; its own state stays as it is, so other threads see nothing of it.
    """
    with override(state, thresholds=point.threshold, static=frozenset(point.static), margin=margin):
        yield


def look_at(looks: Sequence[LookPoint], budget: float) -> LookPoint:
    """How a budget is shared between the two passes; outside of the table the first pass gets all of it."""
    for low, high in itertools.pairwise(looks):
        if low.budget <= budget <= high.budget:
            share = (budget - low.budget) / (high.budget - low.budget)
            margins = tuple(a + share * (b - a) for a, b in zip(low.margins, high.margins, strict=True))
            base, cost = low.base + share * (high.base - low.base), low.cost + share * (high.cost - low.cost)
            return LookPoint(budget, base, cost, margins)
    return LookPoint(budget, budget, budget, ())


def budget_range(gated: nn.Module) -> tuple[float, float]:
    """Which budgets `gated` can be set to, besides 1.0; `set_budget` allows `TOLERANCE` more.

    Args:
        gated: A gated model.

    Returns:
        The smallest and the largest budget below 1.0 in the table; 1.0 twice before calibration.

    Raises:
        NotConverted: If the model has no gates.
    """
    table = state_of(gated).table
    return (table[0].cost, table[-1].cost) if table else (1.0, 1.0)


def current_point(state: GatedState) -> BudgetPoint:
    """The table's point at the current budget, interpolated."""
    if state.budget is None or state.budget >= 1 or not state.table:
        return BudgetPoint(-math.inf, 1.0, dict.fromkeys(state.units, 1.0), state.units)
    return _point(state, state.budget)


def first_pass(state: GatedState) -> tuple[BudgetPoint, float]:
    """What the first pass does at the current budget, and the largest share of inputs that is to be looked at again."""
    if state.margin is None or state.budget is None:
        return current_point(state), 0.0
    look = look_at(state.looks, state.budget)
    return _point(state, look.base), max(state.budget - look.cost, 0.0)


def static_policy(costs: CostModel, ranks: dict[str, float], budget: float) -> tuple[str, ...]:
    """The sites that a static policy keeps open: highest rank first, while the cost stays within `budget`."""
    total = costs.fixed + sum(site.skip for site in costs.sites.values())
    kept = []
    for name in sorted(ranks, key=lambda n: -ranks[n]):
        extra = costs.sites[name].branch - costs.sites[name].skip
        if (total + extra) / costs.dense <= budget + 1e-9:
            total += extra
            kept.append(name)
    return tuple(name for name in costs.sites if name in kept)


def mixed(low: BudgetPoint, high: BudgetPoint, share: float) -> dict[str, float]:
    """Active rates between those of two points."""
    return {n: low.active_rate[n] + share * (high.active_rate[n] - low.active_rate[n]) for n in low.active_rate}


def _between(margins: Sequence[float], share: float) -> float:
    """The margin below which a share of the inputs lies."""
    at = min(max(share, 0.0), 1.0) * (len(margins) - 1)
    low = min(int(at), len(margins) - 2)
    return margins[low] + (at - low) * (margins[low + 1] - margins[low])


def _point(state: GatedState, budget: float) -> BudgetPoint:
    """The table's point at a budget; its static policy is cut anew where the order of cuts is known."""
    point = _interpolate(state.table, budget)
    return replace(point, static=static_policy(state.costs, state.ranks({}), budget)) if state.order else point


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
    rates = mixed(low, high, share)
    nearer = high if share >= 1 - 1e-9 else low  # the static policy must stay within the budget
    along = float(share >= 0.5) if _is_step(table, low, high) else share
    return BudgetPoint(low.threshold + along * (high.threshold - low.threshold), budget, rates, nearer.static)


def _is_step(table: list[BudgetPoint], low: BudgetPoint, high: BudgetPoint) -> bool:
    """Whether cost jumps between two neighbours, so that no threshold gives what lies between and any may give the farther
    one.
    """

    def slope(first: BudgetPoint, second: BudgetPoint) -> float:
        return (second.cost - first.cost) / max(first.threshold - second.threshold, 1e-12)

    usual = [slope(a, b) for a, b in itertools.pairwise(table) if math.isfinite(a.threshold)]
    return slope(low, high) > _STEEP * statistics.median(usual)
