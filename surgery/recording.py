"""`record`: what a gated model decided for every input, in files that can be read while they grow.

A log is a directory with one Arrow stream per process. A row is one input of one call: its content hash, the decisions
of every pass as packed bits, the scores behind them, cost, latency, and the output's hash. The calling thread only
copies; hashing, packing and writing happen in a thread of the log's own.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery import context
from surgery.calling import Batch, device_of, read_output
from surgery.context import Event, Tape, default_execution, override, overrides_of, state_of
from surgery.errors import DataError, LogError, MissingDependency, check_choice, shortened
from surgery.fingerprints import fingerprint
from surgery.gates import iter_gates
from surgery.state import CostModel, GatedState

FORMAT_VERSION = 1
SUFFIX = ".arrow"
WAITING = 64
"""Calls that may wait for the writer; a caller that is faster waits for it, so memory is bounded and nothing is lost."""
_SCORES = ("float32", "float16", "none")
_GROUP_BYTES = 16 << 20
_MOST_OUTPUTS = 4096  # values of one input's output that are kept whole; of larger ones only the hash


@dataclass(frozen=True, slots=True)
class Call:
    """What the calling thread hands to the writer."""

    number: int
    started: float
    milliseconds: float
    batch: Batch
    ids: tuple[str, ...] | None
    events: Tape
    output: Tensor
    budget: float | None
    threshold: float
    execution: str


class Recorder:
    """An open log. Calls in the context that opened it are recorded; other threads join with `with log.joined():`.

    Args:
        gated: A gated model.
        path: Directory of the log; other processes may write there too.
        scores: `float32`, `float16`, or `none`.
        rows: Rows of a group, which is written as a whole.
        seconds: A group is written after that long, full or not.
    """

    def __init__(self, gated: nn.Module, path: str | Path, scores: str, rows: int, seconds: float) -> None:
        self.state = state_of(gated)
        self.path = Path(path).expanduser()
        self._device = device_of(gated)
        self._next_ids = threading.local()
        self._count, self._lock = 0, threading.Lock()
        self._writer = _Writer(gated, self.path, scores, rows, seconds)

    @property
    def calls(self) -> int:
        """Calls recorded so far."""
        return self._count

    @contextmanager
    def joined(self) -> Iterator[Recorder]:
        """Record the calls of this thread too: a new thread does not see what the opening one has set."""
        with override(self.state, recorder=self):
            yield self

    def name_inputs(self, ids: Sequence[str]) -> None:
        """Names for the inputs of this thread's next call, in the place of hashes of their content."""
        self._next_ids.value = tuple(map(str, ids))

    def flush(self) -> None:
        """Write what was recorded so far.

        Raises:
            LogError: If writing failed, now or earlier.
        """
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and end the stream."""
        self._writer.close()

    def __call__(self, run: Callable[[], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call of the gated model and note what it did."""
        state, over = self.state, overrides_of(self.state)
        events = Tape()
        # a dense call keeps its own path: with a tape every gate would be asked, and fused kernels left out
        changes: dict[str, Any] = (
            {"recorder": None} if context.runs_dense(state) else {"recorder": None, "tape": events}
        )
        budget, threshold, execution = state.budget, state.threshold, default_execution(state, over)
        if over.thresholds is not None and not isinstance(over.thresholds, Mapping):
            threshold, budget = over.thresholds, None
        started, clock = time.time(), time.perf_counter()
        with override(state, **changes):
            output = run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed = 1e3 * (time.perf_counter() - clock)
        if over.tape is not None:
            over.tape.extend(events)
            if isinstance(over.tape, Tape):
                over.tape.looked += events.looked
        with self._lock:
            number, self._count = self._count, self._count + 1
        ids, self._next_ids.value = getattr(self._next_ids, "value", None), None
        # inputs and outputs are the caller's, who may write into them next
        inputs = Batch(tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items() if k not in _LABELS})
        copy = read_output(output).detach().clone()
        self._writer.put(Call(number, started, elapsed, inputs, ids, events, copy, budget, float(threshold), execution))
        return output


@contextmanager
def record(
    gated: nn.Module,
    path: str | Path,
    *,
    scores: Literal["float32", "float16", "none"] = "float32",
    rows: int = 1024,
    seconds: float = 1.0,
) -> Iterator[Recorder]:
    """Write down what every call of `gated` inside the block decides, costs and takes.

    Args:
        gated: A gated model.
        path: Directory of the log. It may hold a log: every process adds a file of its own, `surgery.read_log` reads all.
        scores: How router scores are kept.
        rows: Inputs that are written together.
        seconds: What was recorded is on disk after that long; after a crash everything older can be read.

    Raises:
        LogError: If the log cannot be written, or the directory holds something else than logs.
        MissingDependency: If pyarrow is not installed.
        NotConverted: If the model has no gates.

    Example:
        >>> with record(gated, "log") as log:  # doctest: +SKIP
        ...     gated(x)
    """
    check_choice("scores", scores, _SCORES)
    recorder = Recorder(gated, path, scores, rows, seconds)
    try:
        with recorder.joined():
            yield recorder
    finally:
        recorder.close()


def check_place(path: Path) -> None:
    """Refuse a directory that belongs to something else, such as a converted model that is replaced one day.

    Raises:
        LogError: If it holds anything else than parts of a log; hidden files do not count.
    """
    others = sorted(one.name for one in path.iterdir() if not one.name.startswith(".")) if path.is_dir() else []
    others = [name for name in others if not name.endswith(SUFFIX)]
    if others:
        raise LogError(f"{path} holds {shortened(others, 3)}, so it is no log's; give a directory of its own")


def input_hashes(batch: Batch) -> list[str]:
    """128-bit hash of every sample's content, in hexadecimal; padding does not count.

    Raises:
        DataError: If the batch holds no tensor.
    """
    size = batch.size
    values = (*batch.args, *(batch.kwargs[k] for k in sorted(batch.kwargs)))
    mask = batch.kwargs.get("attention_mask")
    real = mask.bool().cpu() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    tensors = [
        v.detach().cpu()
        for v in values
        if isinstance(v, Tensor) and v.dim() > 0 and len(v) == size and not (real is not None and v is mask)
    ]
    found = []
    for row in range(size):
        digest = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            value = tensor[row]
            if real is not None and tensor.shape[:2] == real.shape:
                value = value[real[row]]
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(bytes_of(value))
        found.append(digest.hexdigest())
    return found


def output_hash(output: Tensor) -> bytes:
    """64-bit hash of the bytes of one sample's output."""
    return hashlib.blake2b(bytes_of(output), digest_size=8).digest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes, on the CPU, whatever its dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def _settled(events: Tape) -> list[Event]:
    """The decisions behind the output: every gate was open for inputs that got a second look."""
    if not events.looked:
        return list(events)
    looked = events.looked[-1]
    return [replace(e, decisions=e.decisions | looked.view(-1, *(1,) * (e.decisions.dim() - 1))) for e in events]


def passes_of(events: Sequence[Event], size: int) -> list[tuple[list[int], list[Event]]]:
    """The passes of one call: which rows of the batch went through it, and its events, which hold these rows."""
    return [(list(range(size)), list(events))] if events else []


def costs_of(events: Sequence[Event], costs: CostModel, size: int) -> Tensor:
    """Cost of each sample of one call as a fraction of dense, float64 `(N,)`; a router counts where it ran, a second
    look costs 1."""
    total = torch.full((size,), costs.fixed, dtype=torch.float64)
    rates: dict[str, list[Tensor]] = {}
    routed = set()
    for event in events:
        for unit, active in event.by_unit().items():
            rates.setdefault(unit, []).append(active.double().cpu())
            if event.scores is not None:
                routed |= {unit, event.gate.planned.leader}
    for unit, site in costs.sites.items():
        rate = torch.stack(rates[unit]).mean(0) if unit in rates else torch.ones(size, dtype=torch.float64)
        total += rate * site.branch + (1 - rate) * site.skip + (unit in routed) * site.router
    looked = events.looked[-1].double().cpu() if isinstance(events, Tape) and events.looked else 0.0
    return total / costs.dense + looked


def arrow() -> Any:
    """pyarrow, imported late.

    Raises:
        MissingDependency: If it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependency('a log needs pyarrow: pip install "bypass-surgery[data]"') from error
    return pyarrow


def schema_of(metadata: Mapping[str, Any]) -> Any:
    """Columns of a log, and what is the same for all of its rows."""
    pa = arrow()
    fields = [
        ("time", pa.timestamp("us", tz="UTC")),
        ("call", pa.int64()),
        ("row", pa.int32()),
        ("size", pa.int32()),
        ("input", pa.string()),
        ("budget", pa.float64()),
        ("threshold", pa.float64()),
        ("execution", pa.string()),
        ("latency_ms", pa.float32()),
        ("cost", pa.float32()),
        ("prediction", pa.int32()),
        ("sites", pa.list_(pa.list_(pa.int16()))),  # of every pass
        ("shapes", pa.list_(pa.list_(pa.list_(pa.int32())))),
        ("decisions", pa.list_(pa.binary())),
        ("scores", pa.list_(pa.binary())),
        ("real", pa.list_(pa.binary())),  # where decisions are of real tokens, not padding; empty: everywhere
        ("output_hash", pa.binary(8)),
        ("output", pa.list_(pa.float32())),
    ]
    return pa.schema(fields, metadata={"surgery": json.dumps(metadata)})


class _Writer:
    """A thread that packs and writes; its queue is bounded."""

    def __init__(self, gated: nn.Module, path: Path, scores: str, rows: int, seconds: float) -> None:
        self._state, self._scores, self._rows, self._seconds = state_of(gated), scores, rows, seconds
        pa = arrow()
        check_place(path)
        self._schema = schema_of(describe(gated, scores))
        try:
            self._made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._file = (path / f"{time.time_ns()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}").open("wb")
            options = pa.ipc.IpcWriteOptions(compression="zstd" if pa.Codec.is_available("zstd") else None)
            self._stream = pa.ipc.new_stream(self._file, self._schema, options=options)
            self._file.flush()
        except OSError as error:
            raise LogError(f"cannot write a log to {path}: {error}; give another directory") from error
        self._path = path
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._bytes, self._oldest = 0, time.monotonic()
        self._error: Exception | None = None
        self._any = False
        self._queue: queue.Queue[Call | threading.Event | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="surgery-log", daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        self._check()
        self._queue.put(call)

    def flush(self) -> None:
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self._check()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise LogError(f"the log {self._path} could not be written: {self._error}") from self._error

    def _work(self) -> None:
        while True:
            wait = max(0.01, self._oldest + self._seconds - time.monotonic()) if self._columns["call"] else None
            try:
                item = self._queue.get(timeout=wait)
            except queue.Empty:
                self._guarded(self._write)
                continue
            if isinstance(item, Call):
                self._guarded(self._add, item)
            else:
                self._guarded(self._write)
            if isinstance(item, threading.Event):
                item.set()
            if item is None:
                self._guarded(self._end)
                if not self._any:
                    self._vanish()
                return

    def _guarded(self, step: Callable[..., None], *args: Any) -> None:
        """What goes wrong here is raised where the model is called; the thread lives on, so that no caller waits."""
        if self._error is not None:
            return
        try:
            step(*args)
        except Exception as error:
            self._error = error

    def _add(self, call: Call) -> None:
        if not self._columns["call"]:
            self._oldest = time.monotonic()
        size = call.batch.size
        for column, values in _rows_of(call, size, self._state, self._scores).items():
            self._columns[column] += values
        self._bytes += sum(len(p) for one in self._columns["scores"][-size:] for p in one) + 512 * size
        full = len(self._columns["call"]) >= self._rows or self._bytes >= _GROUP_BYTES
        if full or time.monotonic() - self._oldest >= self._seconds:
            self._write()

    def _write(self) -> None:
        if not self._columns["call"]:
            return
        pa = arrow()
        arrays = [pa.array(self._columns[f.name], type=f.type) for f in self._schema]
        self._any = True
        self._stream.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._file.flush()
        for values in self._columns.values():
            values.clear()
        self._bytes = 0

    def _end(self) -> None:
        self._stream.close()
        self._file.close()

    def _vanish(self) -> None:
        """Leave nothing behind where nothing was recorded."""
        Path(self._file.name).unlink(missing_ok=True)
        if self._made and not any(self._path.iterdir()):
            self._path.rmdir()


def _rows_of(call: Call, size: int, state: GatedState, scores: str) -> dict[str, list[Any]]:
    """The columns of one call."""
    names = state.names
    ids = list(call.ids) if call.ids is not None else input_hashes(call.batch)
    if len(ids) != size:
        raise DataError(f"{len(ids)} names were given for {size} inputs")
    outputs = call.output.cpu()
    parts = list(outputs) if outputs.shape[:1] == (size,) else [outputs] * size
    keep = outputs.shape[:1] == (size,) and parts[0].numel() <= _MOST_OUTPUTS
    predicted = parts[0].dim() == 1 and parts[0].numel() > 1
    same = {
        "time": int(1e6 * call.started),
        "call": call.number,
        "size": size,
        "budget": call.budget,
        "threshold": call.threshold,
        "execution": call.execution,
        "latency_ms": call.milliseconds,
    }
    passes: dict[str, list[list[Any]]] = {
        name: [[] for _ in range(size)] for name in ("sites", "shapes", "decisions", "scores", "real")
    }
    for rows, events in passes_of(_settled(call.events), size):
        sites = [names.index(event.site) for event in events]
        shapes = [list(event.decisions.shape[1:]) for event in events]
        packed = _packed([event.decisions for event in events])
        behind = [b"" for _ in rows] if scores == "none" else _scores(events, scores)
        padded = any(event.weights is not None for event in events)
        real = _packed([_real(event) for event in events]) if padded else [b"" for _ in rows]
        for row, bits, values, tokens in zip(rows, packed, behind, real, strict=True):
            kept = {"sites": sites, "shapes": shapes, "decisions": bits, "scores": values, "real": tokens}
            for name, value in kept.items():
                passes[name][row].append(value)
    return {
        **{name: [value] * size for name, value in same.items()},
        "row": list(range(size)),
        "input": ids,
        "cost": costs_of(call.events, state.costs, size).tolist(),
        "prediction": [int(one.argmax()) if predicted else None for one in parts],
        **passes,
        "output_hash": [output_hash(one) for one in parts],
        "output": [one.float().flatten().tolist() if keep else None for one in parts],
    }


def _packed(decisions: Sequence[Tensor]) -> list[bytes]:
    """Of every row the decisions of all events, one after the other, eight to a byte."""
    import numpy

    rows = torch.cat([one.reshape(len(one), -1) for one in decisions], 1).cpu().numpy()
    return [row.tobytes() for row in numpy.packbits(rows, axis=1)]


def _real(event: Event) -> Tensor:
    """Which decisions of an event are of real tokens."""
    if event.weights is None or event.weights.shape != event.decisions.shape:
        return torch.ones_like(event.decisions)
    return event.weights.bool()


def _scores(events: Sequence[Event], dtype: str) -> list[bytes]:
    """Of every row the scores of all events, NaN where no router ran."""
    rows = torch.cat([_filled(event).reshape(len(event.decisions), -1) for event in events], 1).cpu()
    return [row.tobytes() for row in rows.to(getattr(torch, dtype)).numpy()]


def _filled(event: Event) -> Tensor:
    if event.scores is not None:
        return event.scores.detach().float()
    return torch.full(event.decisions.shape, torch.nan, device=event.decisions.device)


def describe(gated: nn.Module, scores: str) -> dict[str, Any]:
    """What is the same for all rows: model, weights, gates, versions and the conditions of the run."""
    from surgery.configs import versions

    state = state_of(gated)
    digest = hashlib.sha256()
    for name, gate in iter_gates(gated):
        for key, tensor in sorted(gate.state_dict().items()):
            digest.update(f"{name}.{key}".encode() + bytes_of(tensor))
    plan = json.dumps(state.plan.to_dict(), sort_keys=True).encode()
    dtype = next((p.dtype for p in gated.parameters() if p.is_floating_point()), None)
    return {
        "format_version": FORMAT_VERSION,
        "model": f"{type(gated).__module__}.{type(gated).__qualname__}",
        "base": {key: value for key, value in state.base.items() if isinstance(value, (str, type(None)))},
        "base_sha256": fingerprint(gated),
        "gates_sha256": digest.hexdigest(),
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "sites": list(state.names),
        "granularity": [planned.granularity for planned in state.plan.sites],
        "scores": scores,
        "costs": asdict(state.costs),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_of(gated).type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "process": os.getpid(),
    }


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


_LABELS = ("labels", "label")
