"""One pass over many samples in parts that wait for each other.

What is solved at a site needs the rows of all samples; what runs between two sites need not hold more than one part of them.
Each part runs in a thread of its own, one at a time and always in the same order, so results do not hang on scheduling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any

import torch

from surgery.errors import SurgeryError

_UNLIKE = "parts of one pass went through different sites: the model does not treat its samples alike"


class Lockstep:
    """Runs jobs that call `meet` equally often.

    Args:
        count: Number of jobs.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._turn, self._ended = 0, 0
        self._values: list[Any] = []
        self._results: list[Any] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def run(self, jobs: Sequence[Callable[[], Any]], device: torch.device) -> None:
        """Run one job per part to its end; a single one runs in the thread of the caller.

        Args:
            jobs: One for every part, in order.
            device: What they compute on.

        Raises:
            SurgeryError: If they do not meet equally often.
            BaseException: What a job raised.
        """
        if self.count == 1:
            jobs[0]()
            return
        settings = _settings(device)
        threads = [
            threading.Thread(target=copy_context().run, args=(self._work, part, job, settings), daemon=True)
            for part, job in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C reaches the main thread only
            self._stop(error)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def meet(self, part: int, value: Any, together: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """Wait until every part is here.

        Args:
            part: Number of the caller's part.
            value: What it brings.
            together: Called once, by the last part, with what all have brought; returns something for each of them.

        Returns:
            What there is for this part.
        """
        if self._ended:
            raise SurgeryError(_UNLIKE)
        self._values.append(value)
        last = part == self.count - 1
        if last:
            values, self._values = self._values, []
            self._results = list(together(values))
        if self.count > 1:
            self._pass_on(0 if last else part + 1)
            self._wait(part)
        result, self._results[part] = self._results[part], None
        return result

    def _work(self, part: int, job: Callable[[], Any], settings: Callable[[], Any]) -> None:
        try:
            self._wait(part)
            with settings():
                job()
            if self._values:
                raise SurgeryError(_UNLIKE)
            self._ended += 1
            self._pass_on(part + 1)
        except _Stopped:
            return
        except BaseException as error:
            self._stop(error)

    def _wait(self, part: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == part or self._error is not None)
        if self._error is not None:
            raise _Stopped

    def _pass_on(self, turn: int) -> None:
        with self._changed:
            self._turn = turn
            self._changed.notify_all()

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class _Stopped(BaseException):
    """Another part failed."""


def _settings(device: torch.device) -> Callable[[], Any]:
    """What torch keeps per thread, as it is in this one."""
    kind = device.type
    grad, default = torch.is_grad_enabled(), torch.get_default_device()
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if cast else None

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            if cast:
                stack.enter_context(torch.autocast(kind, dtype))
            if default.type != "cpu":
                stack.enter_context(default)
            if kind == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield

    return entered
