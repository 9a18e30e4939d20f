"""`calibrate_second_look`: for every budget, how cheap the first pass is and which margins are looked at again.

Axis letters: `N` samples, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.budgets import budget_range, set_budget
from surgery.context import execution, state_of
from surgery.costs import observe
from surgery.errors import BudgetError, SurgeryError
from surgery.objectives import distances
from surgery.progress import Progress, silent
from surgery.second_look import least_certain, margin_of
from surgery.state import LookPoint

_GRID = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
_QUANTILES = 101
_MOST = 0.6  # the largest share of inputs that is worth a second look
_FEWEST = 100  # with fewer inputs the share of second looks comes in steps of more than 0.01
_BEYOND_CHANCE = 1.64  # standard errors, one-sided: 95 %


@dataclass(frozen=True, slots=True)
class _Pass:
    """A first pass over the data at one budget.

    Args:
        cost: As a fraction of dense.
        distances: From the dense outputs, `(N,)`.
        margins: `(N,)`.
        weights: How much each input counts, summing to 1, `(N,)`.
    """

    cost: float
    distances: Tensor
    margins: Tensor
    weights: Tensor


def calibrate_second_look(
    gated: nn.Module, data: Iterable[Any], *, mode: Literal["auto", True] = "auto", progress: Progress | None = None
) -> bool:
    """Decide for every budget how to share it between a first pass and a second look; the current budget is set again.

    One pass over the data at every first-pass budget gives outputs and margins; what any share of second looks would
    change follows from these and the dense outputs. Since the share among few inputs may be small by chance, fewer are looked
    at than there is budget for: so many that the true share is within the budget with about 95 % confidence (the score
    interval's end, Wilson 1927, "Probable inference, the law of succession, and statistical inference"). What the first
    pass costs is taken as it is.

    Args:
        gated: A calibrated gated model whose budget is set.
        data: Held-out batches; re-iterable.
        mode: `auto` turns it on for the budgets at which it brings the outputs nearer to the dense model's beyond chance, if
            there are at least 100 inputs; True for all at which it does not do harm.
        progress: Called after every pass.

    Returns:
        Whether it is on at any budget.

    Raises:
        NotConverted: If the model has no gates.
        SurgeryError: If the model is no classifier (its output is not `(N, K)` logits) and `mode` is True.
        BudgetError: If the model was never calibrated.
    """
    if not state_of(gated).table:
        raise BudgetError(
            "this model was never calibrated, so there is no budget to share; run surgery.calibrate first"
        )
    with state_of(gated).restored_on_error():
        return _calibrate(gated, data, mode, progress or silent)


def _calibrate(gated: nn.Module, data: Iterable[Any], mode: Literal["auto", True], report: Progress) -> bool:
    state = state_of(gated)
    budget = state.budget
    state.looks, state.margin = [], None
    if budget is None or budget >= 1:
        return False
    with execution(gated, "dense"):
        dense = observe(gated, data)
    if not _may_look(gated, dense.outputs, mode):
        return False
    low, high = budget_range(gated)
    wanted = {*_GRID, budget, *(round(budget - step, 3) for step in (0.05, 0.1, 0.15))}
    bases = sorted(base for base in wanted if low <= base <= min(high, 0.95))
    passes: dict[float, _Pass] = {}
    for index, base in enumerate(bases):
        set_budget(gated, base)
        usage = observe(gated, data)
        left = distances(usage.outputs, dense.outputs, data, values=False).double()
        margins = margin_of(torch.cat(usage.outputs)).double()
        weights = usage.decided.weights.double()
        passes[base] = _Pass(usage.decided.cost(state.costs), left, margins, weights / weights.sum())
        report("looking again", index + 1, len(bases))
    points = [_best(goal, passes, _BEYOND_CHANCE if mode == "auto" else 0.0) for goal in bases]
    on = any(point.cost < point.budget for point in points)
    state.looks = points if on else []
    set_budget(gated, budget)
    return on


def _may_look(gated: nn.Module, dense: Sequence[Tensor], mode: Literal["auto", True]) -> bool:
    """Whether outputs are class logits, and of enough inputs where nobody asked for it.

    Raises:
        SurgeryError: If somebody asked for it and they are none.
    """
    values = state_of(gated).gives_values
    if values or any(output.dim() != 2 or output.shape[1] < 2 for output in dense):
        if mode is True:
            kind = "values " if values else ""
            raise SurgeryError(
                f"a second look needs class logits (N, K); {type(gated).__name__} gives {kind}{tuple(dense[0].shape)}"
            )
        return False
    return mode is True or sum(map(len, dense)) >= _FEWEST


def _best(goal: float, passes: Mapping[float, _Pass], errors: float) -> LookPoint:
    """How a budget is shared best: one pass, unless a cheaper one and second looks come nearer to dense by more than so many
    standard errors with the whole share, and nearer at all with what the reserve leaves of it.
    """
    found, gain = LookPoint(goal, goal, goal, _quantiles(passes[goal].margins, passes[goal].weights)), 0.0
    for base, one in passes.items():
        share = goal - one.cost
        if base > goal or not 0 < share <= _MOST:
            continue
        mean, error = _gain(passes[goal], one, share)
        given, _ = _gain(passes[goal], one, float(_cautious(torch.tensor(share), one.weights)))
        if mean > max(gain, errors * error) and given > 0:
            found, gain = LookPoint(goal, base, one.cost, _quantiles(one.margins, one.weights)), mean
    return found


def _gain(alone: _Pass, first: _Pass, share: float) -> tuple[float, float]:
    """How much nearer to dense a first pass and so many second looks are than one pass alone: mean and standard error."""
    looked = least_certain(first.margins, first.weights, share)
    change = alone.distances - torch.where(looked, 0.0, first.distances)
    return float(change.mean()), float(change.std()) / math.sqrt(len(change))


def _quantiles(margin: Tensor, weights: Tensor) -> tuple[float, ...]:
    """The margin for a share of 0, 1, …, 100 % of the weight, less the reserve."""
    order = margin.argsort(stable=True)
    total = weights[order].cumsum(0) - weights[order] / 2  # the nearest number of inputs, not the next lower one
    wanted = _cautious(torch.linspace(0, 1, _QUANTILES, dtype=torch.float64), weights)
    index = torch.searchsorted(total, wanted).clamp_max(len(order) - 1)
    return tuple(margin[order][index].tolist())


def _cautious(share: Tensor, weights: Tensor) -> Tensor:
    """The share among these inputs at which the true one is within `share`, with about 95 % confidence."""
    error = (share * (1 - share) * weights.square().sum()).sqrt()  # of equal weights: share * (1 - share) / N
    return (share - _BEYOND_CHANCE * error).clamp_min(0)
