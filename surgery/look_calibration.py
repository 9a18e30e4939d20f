"""`calibrate_second_look`: for every budget, how cheap the first pass is and which margins are looked at again.

Axis letters: `N` samples, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
_BEYOND_CHANCE = 1.64  # one-sided: a second look that does nothing is left out anyway


def calibrate_second_look(
    gated: nn.Module, data: Iterable[Any], *, mode: Literal["auto", True] = "auto", progress: Progress | None = None
) -> bool:
    """Decide for every budget how to share it between a first pass and a second look; the current budget is set again.

    One pass over the data at every first-pass budget gives outputs and margins; what any share of second looks would
    change follows from these and the dense outputs.

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
    if state.gives_values or any(output.dim() != 2 or output.shape[1] < 2 for output in dense.outputs):
        if mode is True:
            kind = "values " if state.gives_values else ""
            raise SurgeryError(
                f"a second look needs class logits (N, K); {type(gated).__name__} gives {kind}{tuple(dense.outputs[0].shape)}"
            )
        return False
    if mode == "auto" and sum(len(output) for output in dense.outputs) < _FEWEST:
        return False
    low, high = budget_range(gated)
    wanted = {*_GRID, budget, *(round(budget - step, 3) for step in (0.05, 0.1, 0.15))}
    bases = sorted(base for base in wanted if low <= base <= min(high, 0.95))
    left: dict[float, Tensor] = {}
    margins: dict[float, Tensor] = {}
    spent: dict[float, float] = {}
    for index, base in enumerate(bases):
        set_budget(gated, base)
        usage = observe(gated, data)
        weights = usage.decided.weights.double() / usage.decided.weights.double().sum()
        spent[base] = usage.decided.cost(state.costs)
        left[base] = distances(usage.outputs, dense.outputs, data, values=state.gives_values).double()
        margins[base] = margin_of(torch.cat(usage.outputs)).double()
        report("looking again", index + 1, len(bases))
    points = []
    for goal in bases:
        best, gain, first = goal, 0.0, goal
        for base in bases:
            share = goal - spent[base]
            if base > goal or not 0 < share <= _MOST:
                continue
            looked = least_certain(margins[base], weights, share)
            change = left[goal] - torch.where(looked, 0.0, left[base])
            error = float(change.std()) / math.sqrt(len(change))
            if float(change.mean()) > max(gain, _BEYOND_CHANCE * error if mode == "auto" else 0.0):
                best, gain, first = base, float(change.mean()), spent[base]
        points.append(LookPoint(goal, best, first, _quantiles(margins[best], weights)))
    on = any(point.cost < point.budget for point in points)
    state.looks = points if on else []
    set_budget(gated, budget)
    return on


def _quantiles(margin: Tensor, weights: Tensor) -> tuple[float, ...]:
    """The margin below which a share of 0, 1, …, 100 % of the weight lies."""
    order = margin.argsort(stable=True)
    total = weights[order].cumsum(0) - weights[order] / 2  # the nearest number of inputs, not the next lower one
    wanted = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)
    index = torch.searchsorted(total, wanted).clamp_max(len(order) - 1)
    return tuple(margin[order][index].tolist())
