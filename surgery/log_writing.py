"""A thread that packs recorded calls and writes them, so that callers only copy."""

from __future__ import annotations

import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from surgery.context import state_of
from surgery.errors import LogError
from surgery.log_format import SUFFIX, arrow, check_place, describe, schema_of
from surgery.log_rows import Call, rows_of

WAITING = 64
"""Calls that may wait for the writer; a caller that is faster waits for it, so memory is bounded and nothing is lost."""
_LOOK = 1.0  # seconds after which a caller that waits looks whether there is still a thread to wait for
_GROUP_BYTES = 16 << 20


class Writer:
    """A file of a log, and the thread that writes it.

    Args:
        gated: A gated model.
        path: Directory of the log.
        scores: `float32`, `float16`, or `none`.
        rows: Rows of a group, which is written as a whole.
        seconds: A group is written after that long, full or not.

    Raises:
        LogError: If the log cannot be written, or the directory holds something else.
        MissingDependency: If pyarrow is not installed.
    """

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
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="surgery-log", daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        """Hand over a call; waits while too many wait already.

        Raises:
            LogError: If the log is closed, or could not be written.
        """
        self._check()
        if not self._takes(call):
            raise LogError(f"the log {self._path} is closed; open another one with surgery.record")

    def flush(self) -> None:
        """Wait until everything is written; a closed log is."""
        done = threading.Event()
        if self._takes(done):
            done.wait()
        else:
            self._thread.join()
        self._check()

    def close(self) -> None:
        """Write the rest and end the thread; closing twice does nothing more."""
        self._takes(None)
        self._thread.join()
        self._check()

    def _takes(self, item: Call | threading.Event | None) -> bool:
        """Whether the thread takes an item, which is handed over; None is the last one. A forked process has no thread."""
        with self._lock:
            while not self._closed and self._thread.is_alive():
                try:
                    self._queue.put(item, timeout=_LOOK)
                except queue.Full:
                    continue
                self._closed = item is None
                return True
        return False

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
                self._guarded(self._stream.close)
                self._close()
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
        for column, values in rows_of(call, size, self._state, self._scores).items():
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

    def _close(self) -> None:
        """After an error too."""
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error

    def _vanish(self) -> None:
        """Leave nothing behind where nothing was recorded."""
        Path(self._file.name).unlink(missing_ok=True)
        if self._made and not any(self._path.iterdir()):
            self._path.rmdir()
