"""`measure`: quality, cost and speed of a gated model, beside dense and beside other policies at the same cost.

Axis letters: `N` samples, `S` sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from surgery import policies
from surgery.calling import (
    Batch,
    batches,
    call,
    call_dense,
    check_batches,
    device_of,
    dtype_of,
    evaluating,
    is_causal,
    length_of,
    read_output,
)
from surgery.context import Event, execution, handled, state_of, tape
from surgery.costs import place
from surgery.errors import BaseMismatch, DataError
from surgery.model_timing import times_of
from surgery.peers import Contest, Judge, Parts, within
from surgery.phases import count_phases
from surgery.policies import Importance, decided
from surgery.progress import Progress, silent
from surgery.reports import Other, Peer, Report
from surgery.rewriting import remove
from surgery.scoring import LOWER_IS_BETTER, Scores, entropy
from surgery.second_look import given_to_others
from surgery.timing import conditions

IMPORTANCE_INPUTS = 512
"""Block importance is averaged over at most this many inputs."""
FEW_INPUTS = 30
"""Reports of fewer inputs say so."""


def measure(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    dense: nn.Module | None = None,
    speed: Sequence[int] = (1, 8),
    peers: bool = True,
    others: Callable[[float], Sequence[Other]] | None = None,
    time_peers: bool = False,
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
        peers: Whether to compare with other policies at the same cost, all with the same skip paths:
            `static`: sites cut in the order of `surgery.cutting`, or by active rate where none was measured, the two
            neighbouring costs interpolated. `static+look`: a cheaper static cut, and a second look at the inputs of
            smallest margin; of four splits the one nearest to the dense model on this data. `frozen`: the same by the
            routers' active rates. `importance`: a training-free cut of the branches that change the stream least.
            `random`: the same rates. `shuffled`: the same decisions, given to other inputs of the batch. `one pass`:
            where the model has a second look, itself without. `unhealed`: where its backbone is healed, itself without
            that; all others are healed like it.
        others: Makes other networks to compare with, given the realised cost of the gated model.
        time_peers: Whether to time peers, in turns with the gated and the dense model.
        seed: For random and shuffled decisions, and the bootstrap.
        repeats: Timed pairs per batch size.
        resamples: Of the bootstrap.
        progress: Called after every batch.

    Returns:
        Quality, cost and times beside the dense model and the peers; prints as tables.

    Raises:
        DataError: If the data yields nothing, can be read only once, changes its order, is refused by the model, or its
            labels do not fit.
        BaseMismatch: If the outputs of `dense` have another shape.
        NotConverted: If the model has no gates.
    """
    check_batches(data)
    if iter(data) is data:
        raise DataError("the data is an iterator that can be read once; pass a list or a DataLoader")
    state, progress = state_of(gated), progress or silent
    reference = remove(gated).eval() if dense is None else dense
    with evaluating(gated), evaluating(reference):
        run = _Run(gated, reference, data, seed, progress)
        run.observe(peers=peers)
        notes = [*state.notes, *run.notes(peers=peers)]
        contest = run.compare(() if others is None else others(run.cost)) if peers and run.decides else None
        runs: dict[Any, Any] = {} if contest is None or not time_peers or not speed else contest.runs()
        times, untimed = times_of({None: within(gated, nullcontext), **runs}, reference, data, speed, repeats, progress)
        rows = () if contest is None else contest.rows(resamples, times)
        if rows:
            notes += _verdict(run.name or f"agreement ({run.judge.agreed})", rows)
        counted = run.name == "nats_per_token" and is_causal(reference)
        phases = count_phases(gated, reference, data) if counted else ()
    active = run.ours.decided.active_rate
    report = Report(
        data=run.description,
        samples=len(run.ours.agreement.values),
        metric={} if run.name is None else {run.name: run.ours.score.mean},
        dense_metric={} if run.name is None else {run.name: run.dense_score.mean},
        agreement=run.ours.agreement.mean,
        agreement_of=run.judge.agreed,
        cost=run.cost,
        cost_unit=state.costs.unit,
        budget=state.budget,
        submodules=sum(active.values()) / len(active),
        active_rate=active,
        entropy={name: entropy((rate, 1 - rate)) for name, rate in run.ours.decided.first_rate.items()},
        policies=len(run.distinct),
        deciding=f"{run.decisions:,} {'tokens' if run.per_token else 'inputs'}",
        speed={size: ratios[None] for size, ratios in times.items()},
        conditions=conditions(device_of(gated), dtype_of(gated)),
        peers=rows,
        absent={} if contest is None else contest.absent,
        notes=(*notes, *untimed),
        phases=phases,
        healed="" if state.healing is None else state.healing.kind,
    )
    state.report = {**state.report, "dense" if state.budget is None else f"{state.budget:g}": report.to_dict()}
    return report


class _Run:
    """Two passes over the data: one for the gated model, one for the policies that its rates lead to."""

    def __init__(
        self, gated: nn.Module, reference: nn.Module, data: Iterable[Any], seed: int, progress: Progress
    ) -> None:
        self.gated, self.reference, self.data, self.seed, self.progress = gated, reference, data, seed, progress
        self.state = state_of(gated)
        self.names = self.state.units
        self.judge = Judge(reference, self.names, self.state.outputs)
        self.ours, self.shuffled, self.dense = Parts(), Parts(), Parts()
        self.importance = Importance()
        self.distinct: set[bytes] = set()
        self.inputs = 0
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
            self.inputs += batch.size
            dense = call_dense(self.reference, batch)
            self.judge.add(self.dense, batch, dense, dense, None)
            with tape(self.gated) as events:
                output = call(self.gated, batch)
            if index == 0:
                _check_alike(self.reference, dense, self.gated, output)
            self.judge.add(self.ours, batch, output, dense, events)
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
            self.judge.add(self.shuffled, batch, output, dense, others)
            if self.inputs - batch.size < IMPORTANCE_INPUTS:
                with execution(self.gated, "dense"), handled(self.gated, self.importance):
                    call(self.gated, batch)

    @property
    def name(self) -> str | None:
        """The metric, or None where there is none."""
        return self.judge.metric

    @property
    def cost(self) -> float:
        """Realised mean cost of ours."""
        return self.ours.decided.cost(self.state.costs)

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

    def compare(self, others: Sequence[Other]) -> Contest:
        """Run the other policies at our rates and our cost, and other networks."""
        contest = Contest(
            self.gated, self.judge, self.ours, self.shuffled, self.dense, self.importance.scores, others, self.seed
        )
        for index, batch in enumerate(self._batches("comparing")):
            if index >= len(self.seen) or _mark(batch) != self.seen[index]:
                raise DataError("the data gave other batches the second time; switch off shuffling and augmentation")
            looked = self.looked[index] if index < len(self.looked) else None
            contest.see(batch, call(self.reference, batch) if contest.needs_dense(looked) else None, looked)
        return contest

    def notes(self, *, peers: bool) -> list[str]:
        """What to know before believing the numbers."""
        budget, found = self.state.budget, []
        if not self.decides:
            found.append("every gate was open for every input, so this is the dense model; set a budget below 1")
        elif budget is not None and budget < 1 and abs(self.cost - budget) > 0.01:
            below, looks = self.cost < budget, self.state.margin is not None
            why = "no further branch fits in, or " * (below and self.state.policy == "static" and not looks)
            why += "second looks leave a reserve for chance, or " * (below and looks)
            why += "it was calibrated on other data"
            found.append(f"the cost on this data is {self.cost:.3f}, the budget is {budget:g}: {why}")
        if self.state.policy == "static":
            alike = "its first pass treats all inputs alike" if self.state.margin else "all inputs are treated alike"
            found.append(f"this model runs its static policy: no router runs, and {alike}")
        if self.state.margin is not None:
            found.append(
                f"the least certain {self.ours.decided.again:.1%} of the inputs were run again in full (second look); both "
                "passes count in cost, submodules and time"
            )
        inputs = len(self.ours.agreement.values)
        if inputs < FEW_INPUTS:
            found.append(
                f"this is of {inputs} input{'s' * (inputs != 1)} only: on others, quality and cost may be far from it"
            )
        alone = peers and self.decides and not self.per_token and all(size == 1 for size, _ in self.seen)
        if alone:
            found.append("shuffled decisions are our own here, since every batch holds one input; use larger batches")
        return found

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


def _check_alike(reference: nn.Module, dense: Any, gated: nn.Module, output: Any) -> None:
    """Refuse a dense model whose output has another shape."""
    theirs, ours = tuple(read_output(dense).shape), tuple(read_output(output).shape)
    if theirs != ours:
        raise BaseMismatch(
            f"dense is a {type(reference).__name__} whose output has the shape {theirs}, that of the gated "
            f"{type(gated).__name__} is {ours}; give the model that was converted, or leave dense out"
        )


def _mark(batch: Batch) -> tuple[int, float]:
    """Enough of a batch to tell whether it comes again."""
    first = next(v for v in batch.tensors if v.dim())
    return batch.size, float(first.double().sum())
