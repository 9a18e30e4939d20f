"""`measure`: quality, cost and speed of a gated model, beside dense and beside other policies at the same cost.

Axis letters: `N` samples, `S` sites.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery import policies
from surgery.calling import Batch, batches, call, device_of, dtype_of, length_of
from surgery.context import Event, execution, handled, state_of, tape
from surgery.costs import place
from surgery.errors import DataError
from surgery.policies import Cut, Decided, Importance, decided
from surgery.progress import Progress, silent
from surgery.reports import Peer, Report
from surgery.rewriting import remove
from surgery.scoring import LOWER_IS_BETTER, Scores, agreement_of, metric_of
from surgery.second_look import given_to_others
from surgery.timing import Ratio, compare, conditions

IMPORTANCE_INPUTS = 512
"""Block importance is averaged over at most this many inputs."""


def measure(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    dense: nn.Module | None = None,
    speed: Sequence[int] = (1, 8),
    peers: bool = True,
    seed: int = 0,
    repeats: int = 30,
    resamples: int = 1000,
    progress: Progress | None = None,
) -> Report:
    """Run `gated` on data that nothing was fitted on and say what it is worth.

    The metric is accuracy where labels are integers, nats per token where the model predicts next tokens, and else only
    the agreement with the dense model.

    The report is also kept in the gated model under its budget, so that a checkpoint and its model card can say it.

    Args:
        gated: A gated model, as it is set now.
        data: Batches, read several times: a list or a DataLoader in a fixed order.
        dense: The original model; None takes the gates out of a copy of `gated`.
        speed: Batch sizes to time against dense, on rows of the data; empty for none.
        peers: Whether to compare with other policies at the same cost: `static` (sites ranked by active rate, opened
            until the cost is reached, the two neighbouring costs interpolated), `random` (the same rates), `shuffled`
            (the same decisions, given to other inputs of the batch), `importance` (a training-free cut of the branches
            that change the stream least).
        seed: For random and shuffled decisions, and the bootstrap.
        repeats: Timed pairs per batch size.
        resamples: Of the bootstrap.
        progress: Called after every batch.

    Raises:
        DataError: If the data yields nothing, can be read only once, changes its order, or its labels do not fit.
        NotConverted: If the model has no gates.
    """
    if iter(data) is data:
        raise DataError("the data is an iterator that can be read once; pass a list or a DataLoader")
    state, progress = state_of(gated), progress or silent
    reference = remove(gated).eval() if dense is None else dense
    with _evaluating(gated), _evaluating(reference), torch.no_grad():
        run = _Run(gated, reference, data, seed, progress)
        run.observe(peers=peers)
        others: tuple[Peer, ...] = ()
        notes = [*state.notes, *run.notes(peers=peers)]
        if peers and run.decides:
            others = run.compare(resamples)
            notes += _verdict(run.name or f"agreement ({run.agreed})", others)
        times, untimed = _times(gated, reference, data, speed, repeats, progress)
    active = run.ours.decided.active(run.names)
    report = Report(
        data=run.description,
        samples=len(run.ours.agreement.values),
        metric={} if run.name is None else {run.name: run.ours.score.mean},
        dense_metric={} if run.name is None else {run.name: run.dense_score.mean},
        agreement=run.ours.agreement.mean,
        agreement_of=run.agreed,
        cost=run.cost,
        cost_unit=state.costs.unit,
        budget=state.budget,
        submodules=sum(active.values()) / len(active),
        active_rate=active,
        entropy={name: entropy(rate) for name, rate in active.items()},
        policies=len(run.distinct),
        deciding=f"{run.decisions:,} {'tokens' if run.per_token else 'inputs'}",
        speed=times,
        conditions=conditions(device_of(gated), dtype_of(gated)),
        peers=others,
        notes=(*notes, *untimed),
    )
    state.report = {**state.report, "dense" if state.budget is None else f"{state.budget:g}": report.to_dict()}
    return report


def entropy(rate: float) -> float:
    """Of a decision that is True at `rate`, in bits."""
    return -sum(p * math.log2(p) for p in (rate, 1 - rate) if 0 < p < 1) + 0.0


def interval(ours: Scores, other: Scores, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the difference of two means on the same inputs, by resampling inputs with replacement."""
    generator = torch.Generator().manual_seed(seed)
    gap, weights = ours.values - other.values, ours.weights
    count = len(gap)
    means = []
    chunk = max(1, 2_000_000 // max(count, 1))
    for start in range(0, resamples, chunk):
        index = torch.randint(count, (min(chunk, resamples - start), count), generator=generator)
        means.append(gap[index].sum(1) / weights[index].sum(1).clamp_min(1e-12))
    ends = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


@dataclass(slots=True)
class _Parts:
    """Scores of one policy, batch by batch."""

    scores: list[Scores] = field(default_factory=list)
    agreements: list[Scores] = field(default_factory=list)
    decisions: list[Decided] = field(default_factory=list)

    @property
    def agreement(self) -> Scores:
        return Scores.joined(self.agreements)

    @property
    def score(self) -> Scores:
        """The metric's, or the agreement's where there is none."""
        return Scores.joined(self.scores or self.agreements)

    @property
    def decided(self) -> Decided:
        return Decided.joined(self.decisions)


class _Run:
    """Two passes over the data: one for the gated model, one for the policies that its rates lead to."""

    def __init__(
        self, gated: nn.Module, reference: nn.Module, data: Iterable[Any], seed: int, progress: Progress
    ) -> None:
        self.gated, self.reference, self.data, self.seed, self.progress = gated, reference, data, seed, progress
        self.state = state_of(gated)
        self.names = self.state.units
        self.name: str | None = None
        self.agreed = "argmax"
        self.ours, self.shuffled, self.dense = _Parts(), _Parts(), _Parts()
        self.importance = Importance()
        self.distinct: set[bytes] = set()
        self.decisions = 0
        self.per_token = False
        self.decides = False
        self.seen: list[tuple[int, float]] = []
        self.looked: list[Tensor | None] = []

    # -- first pass -----------------------------------------------------------------------------------------------

    def observe(self, *, peers: bool) -> None:
        """Run dense, ours, and ours with its decisions shuffled."""
        for index, batch in enumerate(self._batches("measuring")):
            self.seen.append(_mark(batch))
            dense = call(self.reference, batch)
            found = metric_of(self.reference, batch, dense)
            if index == 0:
                self.name = None if found is None else found[0]
            if found is not None:
                self.dense.scores.append(found[1])
            with tape(self.gated) as events:
                output = call(self.gated, batch)
            self._add(self.ours, batch, output, dense, events)
            self._count_policies(events, batch.size)
            self.decides = self.decides or any(not bool(event.decisions.all()) for event in events)
            if not (peers and events):
                continue
            with decided(self.gated, policies.shuffled(events, self.seed + index)) as others:
                output = call(self.gated, batch)
            if events.looked:
                output, rows = given_to_others(output, dense, events.looked[-1], self.seed + index)
                others.looked.append(rows)
            self.looked.append(events.looked[-1] if events.looked else None)
            self._add(self.shuffled, batch, output, dense, others)
            if sum(size for size, _ in self.seen[:-1]) < IMPORTANCE_INPUTS:
                with execution(self.gated, "dense"), handled(self.gated, self.importance):
                    call(self.gated, batch)

    @property
    def cost(self) -> float:
        """Realised mean cost of ours."""
        return self.ours.decided.cost(self.names, self.state.costs)

    @property
    def dense_score(self) -> Scores:
        """The metric of the dense model."""
        return self.dense.score

    @property
    def description(self) -> str:
        """What the metric was measured on."""
        inputs = f"{len(self.ours.agreement.values):,} inputs"
        if self.name in ("nats_per_token", "token_accuracy"):
            return f"{self.ours.score.count:,} tokens of {inputs}"
        return inputs if self.name is None else f"{len(self.ours.agreement.values):,} labelled inputs"

    # -- second pass ----------------------------------------------------------------------------------------------

    def compare(self, resamples: int) -> tuple[Peer, ...]:
        """Run the other policies at our rates and our cost."""
        again, costs = self.ours.decided.again, self.state.costs
        rates = {name: rate - again for name, rate in self.ours.decided.active(self.names).items()}  # of the first pass
        cuts = {
            "static": policies.cut(costs, self.state.ranks(rates), self.cost),
            "importance": policies.cut(costs, self.importance.scores, self.cost),
        }
        kept = {names for one in cuts.values() for names in (one.lower, one.upper)}
        parts: dict[Any, _Parts] = {key: _Parts() for key in (*kept, "random")}
        start = 0
        for index, batch in enumerate(self._batches("comparing")):
            if index >= len(self.seen) or _mark(batch) != self.seen[index]:
                raise DataError("the data gave other batches the second time; switch off shuffling and augmentation")
            looked = self.looked[index] if index < len(self.looked) else None
            dense = call(self.reference, batch) if self.name is None or looked is not None else None
            for names in kept:
                self._run(parts[names], batch, dense, policies.constant(names))
            self._run(parts["random"], batch, dense, policies.random(rates, self.seed, start), looked)
            start += batch.size
        ours = self.ours.score
        rows = [self._cut_row(name, cuts[name], parts, ours, resamples) for name in ("static", "importance")]
        for name, part in (("random", parts["random"]), ("shuffled", self.shuffled)):
            decisions = part.decided
            if name == "shuffled":  # the routers had to run to make these decisions
                decisions = replace(decisions, routed=self.ours.decided.routed)
            rows.append(self._row(name, decisions.cost(self.names, costs), ours, part.score, resamples))
        order = ("static", "random", "shuffled", "importance")
        return tuple(sorted(rows, key=lambda row: order.index(row.name)))

    def notes(self, *, peers: bool) -> list[str]:
        """What to know before believing the numbers."""
        budget, found = self.state.budget, []
        if not self.decides:
            found.append("every gate was open for every input, so this is the dense model; set a budget below 1")
        elif budget is not None and budget < 1 and abs(self.cost - budget) > 0.01:
            found.append(
                f"the cost on this data is {self.cost:.3f}, the budget is {budget:g}: it was calibrated on other data"
            )
        if self.state.policy == "static":
            alike = "its first pass treats all inputs alike" if self.state.margin else "all inputs are treated alike"
            found.append(f"this model runs its static policy: no router runs, and {alike}")
        if self.state.margin is not None:
            found.append(
                f"the least certain {self.ours.decided.again:.1%} of the inputs were run again in full (second look); both "
                "passes count in cost, submodules and time"
            )
        alone = peers and self.decides and not self.per_token and all(size == 1 for size, _ in self.seen)
        if alone:
            found.append("shuffled decisions are our own here, since every batch holds one input; use larger batches")
        return found

    def _run(
        self, parts: _Parts, batch: Batch, dense: Any, choose: policies.Choose, looked: Tensor | None = None
    ) -> None:
        with decided(self.gated, choose) as events:
            output = call(self.gated, batch)
        if looked is not None:
            output, rows = given_to_others(output, dense, looked, self.seed)
            events.looked.append(rows)
        self._add(parts, batch, output, dense, events)

    def _add(self, parts: _Parts, batch: Batch, output: Any, dense: Any, events: Sequence[Event]) -> None:
        found = metric_of(self.reference, batch, output)
        if (None if found is None else found[0]) != self.name:
            raise DataError(
                f"some batches can be scored by {self.name or 'agreement only'}, others by {found and found[0]}"
            )
        if found is not None:
            parts.scores.append(found[1])
        if dense is not None:
            self.agreed, agreement = agreement_of(self.reference, batch, output, dense)
            parts.agreements.append(agreement)
        parts.decisions.append(Decided.of(events, self.names, batch.size))

    def _cut_row(self, name: str, found: Cut, parts: dict[Any, _Parts], ours: Scores, resamples: int) -> Peer:
        score = parts[found.lower].score.mixed(parts[found.upper].score, found.share)
        low, high = (policies.static_cost(self.state.costs, names) for names in (found.lower, found.upper))
        return self._row(name, low + found.share * (high - low), ours, score, resamples)

    def _row(self, name: str, cost: float, ours: Scores, other: Scores, resamples: int) -> Peer:
        low, high = interval(ours, other, resamples, self.seed)
        return Peer(name, cost, other.mean, ours.mean - other.mean, low, high)

    def _count_policies(self, events: Sequence[Event], size: int) -> None:
        if not events:
            self.decisions += size
            self.distinct.add(b"")
            return
        shapes = {event.decisions.shape for event in events}
        self.per_token = len(shapes) == 1 and events[0].gate.per_token
        if self.per_token:
            rows = torch.stack([event.decisions.flatten() for event in events], 1).cpu()  # N*T S
            mask = events[0].weights
            rows = rows if mask is None else rows[mask.flatten().bool().cpu()]
        else:
            rows = torch.stack([rates.cpu() for event in events for rates in event.by_unit().values()], 1)  # N S
        self.decisions += len(rows)
        self.distinct.update(row.numpy().tobytes() for row in rows.unique(dim=0))

    def _batches(self, stage: str) -> Iterator[Batch]:
        total = length_of(self.data)
        for index, batch in enumerate(batches(self.data)):
            yield place(batch, self.gated)
            self.progress(stage, index + 1, total)


# -- time -------------------------------------------------------------------------------------------------------------


def _times(
    gated: nn.Module, dense: nn.Module, data: Iterable[Any], sizes: Sequence[int], repeats: int, progress: Progress
) -> tuple[dict[int, Ratio], list[str]]:
    """Ratios for each batch size, on as many different rows as there are; and what could not be timed."""
    result, notes = {}, []
    for index, size in enumerate(sizes):
        groups = list(itertools.islice(_groups(data, size), repeats))
        if not groups:
            notes.append(f"batch {size} was not timed: no {size} rows of equal shape follow each other in the data")
            continue
        placed = [place(group, gated) for group in groups]
        result[size] = compare(
            _stepping(gated, placed), _stepping(dense, placed), repeats=repeats, device=device_of(gated)
        )
        progress("timing", index + 1, len(sizes))
    return result, notes


def _stepping(model: nn.Module, groups: Sequence[Batch]) -> Callable[[], Any]:
    """Every call takes the next group of rows."""
    following = itertools.cycle(groups)
    return lambda: call(model, next(following))


def _groups(data: Iterable[Any], size: int) -> Iterator[Batch]:
    """Consecutive rows of the data, `size` at a time, across batches where their shapes are equal."""
    rest: list[Batch] = []
    for batch in batches(data):
        rows = [batch.rows(torch.tensor([index])) for index in range(batch.size)]
        if rest and _shapes(rest[0]) != _shapes(rows[0]):
            rest = []
        rest += rows
        while len(rest) >= size:
            yield _joined(rest[:size])
            rest = rest[size:]


def _shapes(batch: Batch) -> list[Any]:
    values = (*batch.args, *batch.kwargs.values())
    return [value.shape if isinstance(value, Tensor) else None for value in values]


def _joined(rows: Sequence[Batch]) -> Batch:
    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        return torch.cat(list(values)) if isinstance(first, Tensor) and first.dim() and len(first) == 1 else first

    return Batch(
        tuple(join(column) for column in zip(*(row.args for row in rows), strict=True)),
        {name: join([row.kwargs[name] for row in rows]) for name in rows[0].kwargs},
    )


# -- small things -----------------------------------------------------------------------------------------------------


def _verdict(metric: str, peers: Sequence[Peer]) -> list[str]:
    """An honest sentence where the routing is not worth more than a static cut."""
    static = next(peer for peer in peers if peer.name == "static")
    sign = -1 if metric in LOWER_IS_BETTER else 1
    gain = sign * static.difference
    low, high = sorted((sign * static.low, sign * static.high))
    if low > 0:
        return []
    if high < 0:
        return [f"the static policy at the same cost is better in {metric} by {-gain:.4g}, beyond the 95 % interval"]
    return [
        f"input-dependent routing does not beat the static policy at the same cost beyond the 95 % interval: "
        f"{metric} {static.difference:+.4g} ({static.low:+.4g} … {static.high:+.4g})"
    ]


def _mark(batch: Batch) -> tuple[int, float]:
    """Enough of a batch to tell whether it comes again."""
    first = next(v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor) and v.dim())
    return batch.size, float(first.double().sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training
