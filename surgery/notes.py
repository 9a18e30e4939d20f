"""What hooks of transformers note while a model runs, to be returned beside its output: attention weights, logits of experts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def collector() -> Any:
    """Where hooks put what the running `forward` returns of its modules' outputs, or None where it returns none of that."""
    notes = _variable()
    return None if notes is None else notes.get() or None


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
    return getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
