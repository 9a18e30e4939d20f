"""`replay`: run what a log says was decided, instead of what the routers say now, and compare.

Axis letters: `N` samples.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.branches import Branch
from surgery.calling import Batch, batches, call, read_output
from surgery.context import Event, Tape, execution, force, handled, state_of, tape
from surgery.costs import costs_of, place
from surgery.errors import ForceError, LogError, shortened
from surgery.gates import Gate
from surgery.log_format import describe
from surgery.log_rows import input_hashes, output_hash
from surgery.logs import Log, Row, read_log
from surgery.sites import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Difference:
    """An input whose replay is not what was recorded.

    Args:
        input: Its hash or name.
        call: Number of the recorded call.
        row: Its place there.
        largest: Largest difference of an output by the largest recorded value; NaN where only hashes were kept.
        site: First site whose router now sees something else than it saw then (by its score), or "" where all agree.
        prediction: Recorded and replayed prediction, or None where the output has none.
    """

    input: str
    call: int
    row: int
    largest: float
    site: str
    prediction: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay found; prints as a table.

    Args:
        rows: Recorded rows that were run again.
        missing: Recorded rows whose input is not in the data.
        same_batches: Rows that ran in a batch as recorded.
        exact: Whether dtype, device, threads and versions are those of the log, so that outputs must be bit-equal there.
        equal: Rows whose output is equal bit for bit.
        close: Rows whose output is within the tolerance (bit-equal ones included).
        tolerance: Largest difference allowed elsewhere, by the largest recorded value.
        differing: Rows that are neither equal nor, where that is enough, close.
        opened: Sites forced open.
        closed: Sites forced closed.
        changed: Predictions that are not the recorded ones.
        cost: Mean cost of the replay as a fraction of dense.
        recorded_cost: Mean recorded cost of the same rows.
        notes: What differs between then and now.
    """

    rows: int
    missing: int
    same_batches: int
    exact: bool
    equal: int
    close: int
    tolerance: float
    differing: tuple[Difference, ...]
    opened: tuple[str, ...]
    closed: tuple[str, ...]
    changed: int
    cost: float
    recorded_cost: float
    notes: tuple[str, ...]

    @property
    def faithful(self) -> bool:
        """Whether every row was found and came out as it must."""
        return not self.differing and not self.missing

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        rows = [{**asdict(d), "largest": d.largest if math.isfinite(d.largest) else None} for d in self.differing]
        return {**asdict(self), "differing": rows, "faithful": self.faithful}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from surgery.tables import percent, rows_table

        forced = [f"{name} open" for name in self.opened] + [f"{name} closed" for name in self.closed]
        what = f"what if: {', '.join(forced)}" if forced else "as recorded"
        lines = [
            f"Replayed {self.rows:,} rows, {what}; {self.missing:,} recorded rows are not in the data",
            f"batches as recorded: {self.same_batches:,} rows; bit-equal: {self.equal:,}; "
            f"within {self.tolerance:g}: {self.close:,}; differing: {len(self.differing):,}",
            f"predictions changed: {self.changed:,}; cost {percent(self.cost)}, recorded {percent(self.recorded_cost)}",
            *(f"note: {note}" for note in self.notes),
        ]
        shown = [
            {
                "call": str(d.call),
                "row": str(d.row),
                "input": d.input[:12],
                "largest_difference": "" if math.isnan(d.largest) else f"{d.largest:.2g}",
                "prediction": "" if d.prediction is None else " to ".join(map(str, d.prediction)),
                "first_differs_at": d.site or "after the last site",
            }
            for d in self.differing[:_SHOWN]
        ]
        parts: list[Any] = [Text(line) for line in lines]
        if shown:
            parts.append(rows_table(f"Rows that differ (first {len(shown)})", shown))
        return Group(*parts)

    def __str__(self) -> str:
        from surgery.tables import render

        return render(self.__rich__())


def replay(
    gated: nn.Module,
    log: Log | str | Path,
    data: Iterable[Any],
    *,
    opened: Sequence[str] = (),
    closed: Sequence[str] = (),
    tolerance: float = 1e-4,
) -> Replay:
    """Run the recorded decisions on the same inputs, which are recognised by their content.

    Outputs must be bit-equal where a batch holds the rows of one recorded call in their order, and dtype, device,
    threads and versions are as recorded; elsewhere they must be within `tolerance`. With `opened` or `closed` these
    sites are forced, the others stay as recorded, and the report says what that would have changed.

    Args:
        gated: The model that the log was recorded from.
        log: What `surgery.read_log` gave, or the directory of the log.
        data: Batches; best the recorded ones, in any order.
        opened: Sites to force open.
        closed: Sites to force closed.
        tolerance: Largest difference allowed, by the largest recorded value.

    Returns:
        How many rows came out as they were, and every row that did not.

    Raises:
        LogError: If the log is of a model with other sites, names its inputs instead of hashing them, or none of its
            inputs is in the data.
        ForceError: If a site to force is unknown, or is both opened and closed.
        DataError: If the data yields nothing.
    """
    state = state_of(gated)
    log = log if isinstance(log, Log) else read_log(log)
    if log.sites != state.names:
        raise LogError(
            f"{log.path} was recorded from a model with the sites {', '.join(log.sites)}; this one has "
            f"{', '.join(state.names)}: give the checkpoint that it was recorded from"
        )
    notes = _conditions(gated, log)
    if both := [name for name in opened if name in closed]:
        raise ForceError(f"{shortened(both)} cannot be forced both open and closed; name it once")
    what_if = {**dict.fromkeys(opened, True), **dict.fromkeys(closed, False)}
    waiting: dict[str, deque[Row]] = defaultdict(deque)
    total = 0
    for row in log:
        waiting[row.input].append(row)
        total += 1
    run = _Run(gated, what_if, tolerance, exact=not notes and not what_if)
    with torch.no_grad():
        for batch in batches(data):
            batch = place(batch, gated)
            found = _match(input_hashes(batch), waiting)
            if found:
                run.add(batch.rows(torch.tensor([index for index, _ in found])), [row for _, row in found])
    if not run.rows:
        raise LogError(
            f"none of the {total} recorded inputs is in this data; give the data that was recorded "
            "(inputs are recognised by their content, so preprocessing must be the same, and rows without names of their own)"
        )
    return Replay(
        rows=run.rows,
        missing=total - run.rows,
        same_batches=run.same,
        exact=run.exact,
        equal=run.equal,
        close=run.close,
        tolerance=tolerance,
        differing=tuple(run.differing),
        opened=tuple(opened),
        closed=tuple(closed),
        changed=run.changed,
        cost=run.cost / run.rows,
        recorded_cost=run.recorded / run.rows,
        notes=tuple(notes),
    )


class _Run:
    """Sums over batches."""

    def __init__(self, gated: nn.Module, what_if: Mapping[str, bool], tolerance: float, *, exact: bool) -> None:
        self.gated, self.what_if, self.tolerance, self.exact = gated, what_if, tolerance, exact
        self.state = state_of(gated)
        self.rows = self.same = self.equal = self.close = self.changed = 0
        self.cost = self.recorded = 0.0
        self.differing: list[Difference] = []

    def add(self, batch: Batch, rows: list[Row]) -> None:
        """Run one batch whose rows were all recorded."""
        first, size = rows[0], batch.size
        same = [row.row for row in rows] == list(range(first.size)) and len({(row.part, row.call) for row in rows}) == 1
        output, events, places = self._run(batch, rows)
        outputs = list(output.cpu()) if output.shape[:1] == (size,) else [output.cpu()] * size
        costs = costs_of(events, self.state.costs, size).tolist()
        self.rows, self.same = self.rows + size, self.same + size * same
        for index, (row, value) in enumerate(zip(rows, outputs, strict=True)):
            self.cost, self.recorded = self.cost + costs[index], self.recorded + row.cost
            self._judge(row, value, places[index], must_equal=same and self.exact)

    def _run(self, batch: Batch, rows: list[Row]) -> tuple[Tensor, list[Event], list[str]]:
        if self.what_if:
            forced = {**_forced(rows, self.state.plan, _length(batch)), **self.what_if}
            with force(self.gated, forced), tape(self.gated) as events:
                output = read_output(call(self.gated, batch))
            return output, events, [next(name for name in self.state.names if name in self.what_if)] * batch.size
        player = _Player(rows)
        with handled(self.gated, player, healed=True):
            output = read_output(call(self.gated, batch))
        looked = torch.tensor([row.looked for row in rows])
        if looked.any():
            again = looked.nonzero().squeeze(1)
            with execution(self.gated, "dense"):
                dense = read_output(call(self.gated, batch.rows(again)))
            output = output.index_copy(0, again.to(output.device), dense.to(output.dtype))
            player.events.looked.append(looked)
        return output, player.events, player.places

    def _judge(self, row: Row, value: Tensor, place: str, *, must_equal: bool) -> None:
        equal = output_hash(value) == row.output_hash
        largest = _gap(value, row.output) if row.output is not None else 0.0 if equal else math.nan
        close = equal or largest <= self.tolerance
        prediction = None
        if row.prediction is not None:
            prediction = (row.prediction, int(value.argmax()))
            self.changed += prediction[0] != prediction[1]
        self.equal, self.close = self.equal + equal, self.close + close
        if not (equal if must_equal else close):
            self.differing.append(Difference(row.input, row.call, row.row, largest, place, prediction))


class _Player:
    """Gate handler that decides as recorded and notes where a router would now see something else."""

    def __init__(self, rows: list[Row]) -> None:
        self.left: list[dict[str, deque[Any]]] = []
        for row in rows:
            queues: dict[str, deque[Any]] = defaultdict(deque)
            for decision in (one for taken in row.passes for one in taken):
                queues[decision.site].append(decision)
            self.left.append(queues)
        self.events = Tape()
        self.places = [""] * len(rows)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Execute one gate."""
        name = gate.site.name
        own = [queues[name].popleft() if queues[name] else None for queues in self.left]
        if all(one is None for one in own):  # the call was dense
            return gate.open(branch, left, inputs)
        scores = gate.scores(residual) if any(one is not None and one.scores is not None for one in own) else None
        length = residual.shape[1] if gate.per_token and residual.dim() == 3 else None
        decisions = torch.stack([_widened(one and one.values, own, length) for one in own]).to(residual.device)
        if scores is not None:
            for index, one in enumerate(own):
                if not self.places[index] and one is not None and one.scores is not None:
                    if not _same_scores(one.scores, scores[index].cpu()):
                        self.places[index] = name
        padding = gate.padding(residual) if gate.per_token else None
        self.events.append(Event(name, gate, decisions, scores, padding))
        return gate.skip(branch, left, residual, inputs, decisions)


def _match(hashes: list[str], waiting: dict[str, deque[Row]]) -> list[tuple[int, Row]]:
    """The recorded row of every input that has one; a row is used once."""
    return [(index, waiting[one].popleft()) for index, one in enumerate(hashes) if waiting.get(one)]


def _widened(value: Tensor | None, own: Sequence[Any], length: int | None) -> Tensor:
    """Decisions of one input at the length of this batch: recorded ones may have had more padding, or less."""
    if value is None:
        shape = next(one.values.shape for one in own if one is not None)
        value = torch.ones(shape, dtype=torch.bool)
    if value.dim() != 1 or length is None or len(value) == length:
        return value
    return torch.cat([value, value.new_zeros(max(0, length - len(value)))])[:length]


def _forced(rows: list[Row], plan: Plan, length: int | None) -> dict[str, bool | Tensor]:
    """Recorded decisions of a batch by site, all open for inputs that got a second look; sites that decided more than once in a
    call are left to the routers.
    """
    result: dict[str, bool | Tensor] = {}
    for planned in plan.sites:
        name, tokens = planned.site.name, planned.granularity == "token"
        own = [[d for taken in row.passes for d in taken if d.site == name] for row in rows]
        if all(not found for found in own):
            result[name] = True  # the call was dense
        elif all(len(found) == 1 for found in own):
            values = [found[0] for found in own]
            longest = max((len(one.values) for one in values if one.values.dim() == 1), default=None)
            fits = (longest if length is None else length) if tokens else None
            own_rows = [_widened(one.values, values, fits) for one in values]
            result[name] = torch.stack([one | row.looked for one, row in zip(own_rows, rows, strict=True)])
    return result


def _length(batch: Batch) -> int | None:
    """Tokens of a padded batch of texts, to which recorded decisions are brought."""
    ids = batch.kwargs.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None


def _same_scores(recorded: Tensor, now: Tensor) -> bool:
    """Equal within what half precision keeps; padded positions do not count."""
    if recorded.dim() == 1 and len(recorded) != len(now):
        count = min(len(recorded), len(now))
        recorded, now = recorded[:count], now[:count]
    return bool(torch.allclose(recorded, now.float(), rtol=2e-3, atol=1e-3))


def _gap(value: Tensor, recorded: Tensor) -> float:
    flat = value.float().flatten()
    if flat.shape != recorded.shape:
        return math.inf
    return float((flat - recorded).abs().max() / recorded.abs().max().clamp_min(1e-12))


def _conditions(gated: nn.Module, log: Log) -> list[str]:
    """What is not as it was when the log was recorded."""
    now = describe(gated, "none")
    notes = []
    for then in log.metadata:
        for key in ("base_sha256", "gates_sha256", "dtype", "device", "threads"):
            if then[key] != now[key]:
                old, new = (str(value)[:16] for value in (then[key], now[key]))
                notes.append(f"{key} was {old} and is {new}: outputs need only be close")
        for name, version in then["versions"].items():
            if now["versions"].get(name) != version:
                notes.append(f"{name} was {version} and is {now['versions'].get(name)}: outputs need only be close")
    return list(dict.fromkeys(notes))


_SHOWN = 20
