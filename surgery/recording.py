"""`record`: what a gated model decided for every input, in files that can be read while they grow.

A log is a directory with one Arrow stream per process. A row is one input of one call: its content hash, the decisions
of every pass as packed bits, the scores behind them, cost, latency, and the output's hash. The calling thread only
copies; hashing, packing and writing happen in a thread of the log's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery import context
from surgery.calling import Batch, device_of, read_output
from surgery.context import Tape, default_execution, override, overrides_of, state_of
from surgery.errors import LogError, check_choice
from surgery.log_rows import Call
from surgery.log_writing import Writer

_SCORES = ("float32", "float16", "none")
_LABELS = ("labels", "label")


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
        self._writer = Writer(gated, self.path, scores, rows, seconds)

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
        """Names for the inputs of this thread's next call, in the place of hashes of their content.

        They belong to that call alone, even if it fails. It raises `LogError` where it has another number of inputs.
        """
        self._next_ids.value = tuple(map(str, ids))

    def flush(self) -> None:
        """Write what was recorded so far.

        Raises:
            LogError: If writing failed, now or earlier.
        """
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and end the stream; once it is closed, a call that joined raises `LogError`."""
        self._writer.close()

    def __call__(self, run: Callable[[], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call of the gated model and note what it did.

        Raises:
            LogError: If its inputs were given another number of names, or the log is closed or could not be written.
        """
        ids = self._names_of(Batch(args, {k: v for k, v in kwargs.items() if k not in _LABELS}))
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
        # inputs and outputs are the caller's, who may write into them next
        inputs = Batch(tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items() if k not in _LABELS})
        copy = read_output(output).detach().clone()
        self._writer.put(Call(number, started, elapsed, inputs, ids, events, copy, budget, float(threshold), execution))
        return output

    def _names_of(self, batch: Batch) -> tuple[str, ...] | None:
        """The names of this call's inputs, which are used up by it, or None."""
        ids, self._next_ids.value = getattr(self._next_ids, "value", None), None
        if ids is not None and len(ids) != batch.size:
            raise LogError(f"{len(ids)} names were given for {batch.size} inputs; this call was not run")
        return ids


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

    Yields:
        The open log: it names inputs, lets other threads join, and counts calls.

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


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
