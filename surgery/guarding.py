"""`Guard`: a gated model that watches itself against the dense one and gives up savings before it gives up quality.

Axis letters: `N` samples.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.budgets import at_point, budget_range, passes_at, point_at
from surgery.calling import Batch, call
from surgery.context import Event, Execution, draw_unit, execution, override, state_of, tape
from surgery.costs import Decided
from surgery.errors import BudgetError, MissingDependency, SurgeryError, check_budget
from surgery.scoring import agreement_of

_LOG = logging.getLogger(__name__)
_Z = 1.96
SAME = 0.99
"""Embeddings agree with the dense model's where their cosine is at least this."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the budget, and why.

    Args:
        time: Seconds since the epoch.
        calls: Calls until then.
        old: Budget before.
        new: Budget after; 1 is dense.
        reason: `disagreement 6.1 % (95 % interval 4.2 to 8.7 %) above 2.0 %`.
    """

    time: float
    calls: int
    old: float
    new: float
    reason: str


@dataclass(frozen=True, slots=True)
class Health:
    """What a guard knows now.

    Args:
        calls: Calls so far.
        inputs: Inputs so far.
        budget: In force.
        compared: Inputs of the window that were also run dense.
        disagreement: Share of these for which the predictions differ; None where none was.
        low: Lower end of its 95 % interval (Wilson).
        high: Upper end of the same.
        drift: Per site, how far the active rate of the window is from calibration: population stability index.
        active_rate: Per site, of the window.
        cost: Mean cost of the window as a fraction of dense, without the comparisons.
        steps: Changes of the budget.
    """

    calls: int
    inputs: int
    budget: float
    compared: int
    disagreement: float | None
    low: float
    high: float
    drift: Mapping[str, float]
    active_rate: Mapping[str, float]
    cost: float | None
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return asdict(self)


class Guard:
    """Call it in the place of the gated model.

    A sampled share of the calls is also run dense. When the disagreement leaves the agreed bound, or the active rates
    drift away from calibration, the budget goes up by one step, in the end to dense; the reason is logged and kept. The
    model's own state is never changed: each call runs under the threshold that was in force when it began, so calls of
    several threads neither race nor see each other.

    Args:
        gated: A calibrated gated model.
        dense_fraction: Share of calls that also run dense, in [0, 1].
        max_disagreement: Largest share of inputs whose prediction may differ from the dense model's.
        window: Number of inputs looked back on; of comparisons likewise.
        max_drift: Largest population stability index of a site; 0.25 is a usual bound for "it has changed".
        step: How far the budget goes up at a time.
        least: Comparisons (for drift: inputs) before anything is concluded.
        metrics: A `prometheus_client.CollectorRegistry` to which metrics are added, or None.
        seed: Of the sampling.

    Raises:
        BudgetError: If the model was never calibrated.
        SurgeryError: If an argument is out of range.
        MissingDependency: If metrics are asked for and prometheus_client is not installed.
        NotConverted: If the model has no gates.

    Example:
        >>> guard = Guard(gated, dense_fraction=0.01, max_disagreement=0.02)  # doctest: +SKIP
        >>> logits = guard(x)  # doctest: +SKIP
    """

    def __init__(
        self,
        gated: nn.Module,
        *,
        dense_fraction: float = 0.01,
        max_disagreement: float = 0.02,
        window: int = 2000,
        max_drift: float = 0.25,
        step: float = 0.1,
        least: int = 30,
        metrics: Any = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("dense_fraction", dense_fraction), ("max_disagreement", max_disagreement)):
            if not 0 <= value <= 1:
                raise SurgeryError(f"{name} is a share, in [0, 1]; got {value}")
        if window < least or least < 1 or step <= 0:
            raise SurgeryError(f"expected window >= least >= 1 and step > 0; got {window}, {least} and {step}")
        self.gated, self.state = gated, state_of(gated)
        if not self.state.table:
            raise BudgetError(
                "this model was never calibrated, so no budget can be guarded; run surgery.calibrate first"
            )
        self.dense_fraction, self.max_disagreement, self.max_drift = dense_fraction, max_disagreement, max_drift
        self.step, self.least = step, least
        self._lock = threading.Lock()
        self._budget = self.state.budget or 1.0
        self._calls = self._inputs = 0
        self._disagreed: deque[bool] = deque(maxlen=window)
        self._rates, self._costs = _Means(window, len(self.state.units)), _Means(window, 1)
        self._steps: list[Step] = []
        self._seed = seed
        self._metrics = None if metrics is None else _Metrics(metrics, self.state.units)
        self._report()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The gated model's output, at the budget in force."""
        with self._lock:
            number, self._calls = self._calls, self._calls + 1
            budget = self._budget
        batch = Batch(args, kwargs)
        start = time.perf_counter()
        with running(self.gated, budget) as events:
            output = call(self.gated, batch)
        seconds = time.perf_counter() - start
        compared = None
        if budget < 1 and draw_unit(self._seed, number) < self.dense_fraction:
            with (
                torch.no_grad(),
                override(self.state, execution="dense", forced=None, tape=None, handler=None, recorder=None),
            ):
                reference = call(self.gated, batch)
            compared = disagreements(self.gated, batch, output, reference)
        self.note(batch.size, budget, events, compared, seconds)
        return output

    @property
    def budget(self) -> float:
        """The budget in force; 1 is dense."""
        return self._budget

    @property
    def steps(self) -> tuple[Step, ...]:
        """Changes of the budget so far."""
        return tuple(self._steps)

    def reset(self, budget: float) -> None:
        """Set the budget by hand, and forget what was seen at the former one.

        Raises:
            BudgetError: If it is outside the calibrated range and is not 1.
        """
        budget = check_budget(budget)
        if budget < 1:
            point_at(self.state, budget)
        with self._lock:
            self._move(budget, "set by hand")

    def health(self) -> Health:
        """What is known now."""
        with self._lock:
            return self._health()

    # -- deciding -------------------------------------------------------------------------------------------------

    def note(
        self, size: int, budget: float, events: Sequence[Event], compared: Sequence[bool] | None, seconds: float = 0.0
    ) -> None:
        """What one call saw and did; called by the guard itself, and for calls that were made elsewhere.

        Args:
            size: Inputs of the call.
            budget: What it ran at; nothing is concluded from a call that began before a change of the budget.
            events: What the gates did.
            compared: For every input whether the dense model says something else, or None where it was not run.
            seconds: What the call took.
        """
        found = Decided.of(events, self.state.units, size)
        costs = found.costs(self.state.costs)
        with self._lock:
            self._inputs += size
            if budget == self._budget:  # what began before a change of the budget says nothing about the new one
                self._rates.extend(found.rates, found.weights)
                self._costs.extend(costs[:, None], found.weights)
                if compared is not None:
                    self._disagreed.extend(compared)
                reason = None if budget >= 1 else self._reason()
                if reason is not None:
                    self._move(self._next(), reason)
            if self._metrics is not None:
                self._metrics.observe(seconds, size, costs.tolist(), None if compared is None else list(compared))
            self._report()

    def _reason(self) -> str | None:
        """Why the budget must go up, or None."""
        health = self._health()
        # the lower end: chance alone must not explain it
        if health.disagreement is not None and health.compared >= self.least and health.low > self.max_disagreement:
            return (
                f"disagreement {100 * health.disagreement:.1f} % of {health.compared} inputs "
                f"(95 % interval {100 * health.low:.1f} to {100 * health.high:.1f} %) above {100 * self.max_disagreement:g} %"
            )
        if len(self._rates) >= self.least and health.drift:
            site = max(health.drift, key=lambda name: health.drift[name])
            if health.drift[site] > self.max_drift:
                expected = passes_at(self.state, self._budget)[0].active_rate[site]
                return (
                    f"drift at {site}: active rate {100 * health.active_rate[site]:.1f} %, {100 * expected:.1f} % when "
                    f"calibrated (stability index {health.drift[site]:.2f} above {self.max_drift:g})"
                )
        return None

    def _next(self) -> float:
        higher = self._budget + self.step
        return higher if higher < min(1.0, budget_range(self.gated)[1]) else 1.0

    def _move(self, budget: float, reason: str) -> None:
        step = Step(time.time(), self._calls, self._budget, budget, reason)
        self._steps.append(step)
        self._budget = budget
        for values in (self._disagreed, self._rates, self._costs):
            values.clear()
        _LOG.warning("budget %.2f to %.2f: %s", step.old, step.new, reason)

    def _health(self) -> Health:
        count, wrong = len(self._disagreed), sum(self._disagreed)
        low, high = wilson(wrong, count)
        names = self.state.units
        active = dict(zip(names, self._rates.means().clamp(0, 1).tolist(), strict=True)) if len(self._rates) else {}
        drift = {}
        if active and self._budget < 1 and self.state.policy != "static":
            expected = passes_at(self.state, self._budget)[0].active_rate
            drift = {name: stability(active[name], expected[name], len(self._rates)) for name in names}
        return Health(
            calls=self._calls,
            inputs=self._inputs,
            budget=self._budget,
            compared=count,
            disagreement=wrong / count if count else None,
            low=low,
            high=high,
            drift=drift,
            active_rate=active,
            cost=float(self._costs.means()) if len(self._costs) else None,
            steps=tuple(self._steps),
        )

    def _report(self) -> None:
        if self._metrics is not None:
            self._metrics.show(self._health())


@contextmanager
def running(gated: nn.Module, budget: float) -> Iterator[list[Event]]:
    """Calls in the block run at `budget`, whatever the model is set to, with the second look of that budget where there is
    one; its own state stays as it is.

    Yields what the gates do, in order.

    Raises:
        BudgetError: If the budget is outside the calibrated range.
    """
    state = state_of(gated)
    if budget >= 1:
        with override(state, execution="dense"):
            yield []
        return
    point, margin = passes_at(state, budget)
    mode: Execution = "static" if state.policy == "static" else "skip"
    with execution(gated, mode), at_point(state, point, margin), tape(gated) as events:
        yield events


class _Means:
    """Weighted means over the last inputs, with their sums at hand: they are asked for at every call."""

    def __init__(self, window: int, columns: int) -> None:
        self._window: deque[tuple[Tensor, float]] = deque()
        self._most = window
        self._sum, self._weight = torch.zeros(columns, dtype=torch.float64), 0.0

    def __len__(self) -> int:
        return len(self._window)

    def extend(self, values: Tensor, weights: Tensor) -> None:
        """Values `(N, columns)`, and how much each input counts `(N,)`; one of padding alone says nothing."""
        for row, weight in zip(values.double(), weights.tolist(), strict=True):
            if weight <= 0:
                continue
            if len(self._window) == self._most:
                old, its = self._window.popleft()
                self._sum, self._weight = self._sum - its * old, self._weight - its
            self._window.append((row, weight))
            self._sum, self._weight = self._sum + weight * row, self._weight + weight

    def means(self) -> Tensor:
        """Of every column, float64."""
        return self._sum / self._weight

    def clear(self) -> None:
        """Forget all."""
        self._window.clear()
        self._sum, self._weight = torch.zeros_like(self._sum), 0.0


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): sound for few samples and for shares near 0."""
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, _Z * _Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def stability(found: float, expected: float, count: int) -> float:
    """Population stability index of an active rate: `sum (p - q) log(p / q)` over open and closed.

    Shares are held half an input away from 0 and 1, where the index has no value.
    """
    edge = 0.5 / max(count, 1)
    total = 0.0
    for p, q in ((found, expected), (1 - found, 1 - expected)):
        p, q = (min(max(value, edge), 1 - edge) for value in (p, q))
        total += (p - q) * math.log(p / q)
    return total


def disagreements(gated: nn.Module, batch: Batch, output: Any, dense: Any) -> list[bool]:
    """For every input whether the predictions differ (for every token of one, whether any does)."""
    kind, found = agreement_of(gated, batch, output, dense, state_of(gated).outputs)
    same = found.values == found.weights if kind == "argmax" else found.values >= SAME  # NaN is not the same
    differ: list[bool] = (~same).tolist()
    return differ


class _Metrics:
    """Prometheus: counters and gauges."""

    def __init__(self, registry: Any, names: Sequence[str]) -> None:
        try:
            from prometheus_client import Counter, Gauge, Histogram
        except ImportError as error:
            raise MissingDependency('metrics need prometheus_client: pip install "bypass-surgery[monitor]"') from error
        self.names = names
        self.calls = Counter("surgery_calls", "Calls of the gated model", registry=registry)
        self.inputs = Counter("surgery_inputs", "Inputs", registry=registry)
        self.compared = Counter("surgery_compared_inputs", "Inputs also run dense", registry=registry)
        self.differed = Counter("surgery_disagreements", "Of these, predicted otherwise", registry=registry)
        self.latency = Histogram("surgery_latency_seconds", "Of a call, gated run only", registry=registry)
        self.cost = Histogram(
            "surgery_cost_fraction",
            "Of an input, share of dense",
            buckets=[i / 10 for i in range(1, 11)],
            registry=registry,
        )
        self.active = Gauge("surgery_active_rate", "Of the window", ["site"], registry=registry)
        self.drift = Gauge("surgery_drift", "Stability index against calibration", ["site"], registry=registry)
        self.disagreement = Gauge(
            "surgery_disagreement", "Of the window, with its interval", ["bound"], registry=registry
        )
        self.budget = Gauge("surgery_budget", "In force; 1 is dense", registry=registry)
        self.steps = Gauge("surgery_budget_steps", "Changes of the budget so far", registry=registry)

    def observe(self, seconds: float, size: int, costs: Sequence[float], compared: Sequence[bool] | None) -> None:
        """One call."""
        self.calls.inc()
        self.inputs.inc(size)
        self.latency.observe(seconds)
        for cost in costs:
            self.cost.observe(cost)
        if compared is not None:
            self.compared.inc(len(compared))
            self.differed.inc(sum(compared))

    def show(self, health: Health) -> None:
        """The window."""
        for gauge, values in ((self.active, health.active_rate), (self.drift, health.drift)):
            for name, value in values.items():
                gauge.labels(name).set(value)
        for bound, value in (("low", health.low), ("mean", health.disagreement or 0.0), ("high", health.high)):
            self.disagreement.labels(bound).set(value)
        self.budget.set(health.budget)
        self.steps.set(len(health.steps))
