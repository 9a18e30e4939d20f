"""Budgets in time: what every site costs on this device, and what the gated model really takes.

Sites are timed inside the running model, so caches are as warm as they will be. The sum of the parts misses what
gathering and scattering cost, so the table of budgets is then corrected with measured ratios.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.branches import Branch
from surgery.calling import Batch, batches, call, device_of
from surgery.context import execution, handled, override, state_of
from surgery.costs import place
from surgery.errors import BudgetError
from surgery.gates import Gate
from surgery.head_gates import HeadGate
from surgery.progress import Progress, silent
from surgery.state import BudgetPoint, CostModel, GatedState, SiteCost
from surgery.timing import compare

_PASSES = 9
_REPEATS = 15
_BATCHES = 3
_POINTS = 5
_GOAL = 0.02


def measure_costs(gated: nn.Module, batch: Batch, *, progress: Progress | None = None) -> CostModel:
    """Seconds per call at this batch size: whole model, and branch, skip path and router of every site."""
    report = progress or silent
    batch = place(batch, gated)
    clock = _Clock(device_of(gated))
    timer = _Timer(clock)
    whole = []
    with torch.no_grad():
        for index in range(_PASSES + 2):
            with execution(gated, "dense"):
                seconds = clock(lambda: call(gated, batch))
            with handled(gated, timer):
                call(gated, batch)
            if index < 2:  # warm-up
                timer.seen.clear()
            else:
                whole.append(seconds)
            report("timing sites", index + 1, _PASSES + 2)
    sites = {
        name: SiteCost(*(statistics.median(part) for part in zip(*timer.seen[name], strict=True)))
        for name in state_of(gated).units
    }
    dense = max(statistics.median(whole), sum(site.branch for site in sites.values()))
    return CostModel("seconds", dense, sites)


def measure_ratio(gated: nn.Module, data: Iterable[Any], threshold: float | None = None) -> float:
    """Time of the gated model over that of the dense model on a few batches, measured side by side."""
    state = state_of(gated)
    gated_time = dense_time = 0.0
    for batch in itertools.islice(batches(data), _BATCHES):
        batch = place(batch, gated)

        def routed(batch: Batch = batch) -> None:
            with override(state, thresholds=threshold), execution(gated, "skip"):
                call(gated, batch)

        def dense(batch: Batch = batch) -> None:
            with execution(gated, "dense"):
                call(gated, batch)

        with torch.no_grad():
            ratio = compare(routed, dense, repeats=_REPEATS, warmup=2, device=device_of(gated))
        gated_time += ratio.median * ratio.b_ms
        dense_time += ratio.b_ms
    return gated_time / dense_time


def correct_table(gated: nn.Module, data: Iterable[Any], budget: float, *, progress: Progress | None = None) -> None:
    """Replace the predicted costs in the table of budgets by measured ratios, and close in on `budget`.

    Raises:
        BudgetError: If the measured range does not hold `budget`.
    """
    state, report = state_of(gated), progress or silent
    finite = [p for p in state.table if abs(p.threshold) < float("inf")]
    step = max(1, len(finite) // _POINTS)
    measured: list[BudgetPoint] = []
    for index, point in enumerate(finite[::step]):
        measured.append(replace(point, cost=measure_ratio(gated, data, point.threshold)))
        report("timing budgets", index + 1, None)
    if budget < 1:
        for _ in range(4):
            measured.sort(key=lambda p: -p.threshold)
            nearest = min(measured, key=lambda p: abs(p.cost - budget))
            if abs(nearest.cost - budget) <= _GOAL:
                break
            pairs = [
                (a, b) for a, b in itertools.pairwise(measured) if min(a.cost, b.cost) <= budget <= max(a.cost, b.cost)
            ]
            if not pairs:
                low, high = min(p.cost for p in measured), max(p.cost for p in measured)
                raise _out_of_reach(state, budget, f"{low:.3f} to {high:.3f}")
            below, above = min(pairs, key=lambda pair: abs(pair[0].cost - pair[1].cost))
            share = (budget - below.cost) / (above.cost - below.cost) if above.cost != below.cost else 0.5
            threshold = below.threshold + share * (above.threshold - below.threshold)
            rates = {
                n: below.active_rate[n] + share * (above.active_rate[n] - below.active_rate[n]) for n in state.units
            }
            measured.append(BudgetPoint(threshold, measure_ratio(gated, data, threshold), rates, below.static))
            report("timing budgets", len(measured), None)
    measured.sort(key=lambda p: -p.threshold)
    rising = list(itertools.accumulate((p.cost for p in measured), max))
    state.table = [replace(point, cost=cost) for point, cost in zip(measured, rising, strict=True)]


def check_time_floor(gated: nn.Module, data: Iterable[Any], budget: float) -> None:
    """Refuse a budget that is out of reach in time, before anything is fitted: every gate closed is the fastest.

    Args:
        gated: A gated model.
        data: A few batches of the size to be timed; re-iterable.
        budget: Mean time as a fraction of the dense model's.

    Raises:
        BudgetError: If it cannot be reached, as `correct_table` does.
    """
    low = measure_ratio(gated, data, math.inf)
    if budget < low - _GOAL:
        raise _out_of_reach(state_of(gated), budget, f"{low:.3f} with every gate closed")


def _out_of_reach(state: GatedState, budget: float, measured: str) -> BudgetError:
    tokens = any(planned.granularity == "token" for planned in state.plan.sites)
    instead = "; granularity='sample' leaves out whole branches, which a single input gains from" * tokens
    return BudgetError(
        f"budget {budget:g} of the dense model's time cannot be reached on this device: measured {measured} (or 1.0 for "
        f"dense); routers and gathering take their share of small batches{instead}"
    )


class _Clock:
    """Seconds that a call takes, the device's queue emptied before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


@dataclass(slots=True)
class _Timer:
    """Gate handler that times branch, skip path and router."""

    clock: _Clock
    seen: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        result: list[Any] = []
        opened = self.clock(lambda: result.append(gate.open(branch, left, inputs)))
        if isinstance(gate, HeadGate):
            self._heads(gate, branch, left, residual, inputs, opened)
            return result[0]
        times = (
            opened,
            0.0 if gate.skip_path.is_identity else self.clock(lambda: gate.skip_path(residual)),
            self._router(gate, residual),
        )
        self.seen.setdefault(gate.site.name, []).append(times)
        return result[0]

    def _router(self, gate: Gate, residual: Tensor) -> float:
        return 0.0 if gate.always_on else self.clock(lambda: bool(gate.decide(residual)[0].any()))

    def _heads(
        self,
        gate: HeadGate,
        branch: Branch,
        left: Tensor | None,
        residual: Tensor,
        inputs: Sequence[Any],
        opened: float,
    ) -> None:
        """Each head's share of what the branch takes longer with all heads than with none."""
        none = torch.zeros(gate.shape_of(residual), dtype=torch.bool, device=residual.device)
        closed = self.clock(lambda: bool(gate.skip(branch, left, residual, inputs, none) is None))
        router = self._router(gate, residual)
        count = len(gate.site.units)
        for unit in gate.site.units:
            self.seen.setdefault(unit, []).append((max(opened - closed, 0.0) / count, 0.0, router / count))
