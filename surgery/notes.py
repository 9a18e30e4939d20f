"""What hooks of transformers note while a model runs, to be returned beside its output: attention weights, logits of experts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MODULE = "transformers.utils.output_capturing"


def collector() -> Any:
    """Where hooks put what the running `forward` returns of its modules' outputs, or None where it returns none of that."""
    notes = _variable()
    return None if notes is None else notes.get() or None


def is_idle(hook: Any) -> bool:
    """Whether a hook only notes what the running call does not return; the first call that returns any installs them all."""
    if getattr(hook, "__module__", "") != _MODULE:
        return False
    notes = collector()
    kept = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    return notes is None or ("key" in kept and kept["key"].cell_contents not in notes)


@contextmanager
def unnoted() -> Iterator[None]:
    """Inside the block modules may run once more, and that is not noted."""
    notes = _variable()
    if notes is None:
        yield
        return
    token = notes.set(None)
    try:
        yield
    finally:
        notes.reset(token)


def _variable() -> Any:
    return getattr(sys.modules.get(_MODULE), "_active_collector", None)
