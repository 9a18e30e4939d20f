"""How the library reports progress without printing: a callback given by the caller."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, "int | None"], None]
"""`progress(stage, done, total)`; `total` is None where it is not known."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Report to nobody."""
