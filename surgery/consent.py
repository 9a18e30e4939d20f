"""Code that a checkpoint names is run only where this user ran it before, or says so.

A `MODEL` string such as `python:nets.py:make` runs a file. Typed by the user that is an order; read from somebody's checkpoint it
is an attack. So what `load_model` was told to run is remembered, and `load` runs nothing else unless `trust_code=True`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from surgery.errors import CheckpointError

logger = logging.getLogger(__name__)

OWN = "python:surgery.scripts.digits_model:trained?"
"""The demo's network, which comes with this package."""
_here: set[str] = set()


def runs_code(spec: str) -> bool:
    """Whether building the model of a `MODEL` string runs code that is not a library's."""
    return spec.startswith("python:") or "trust_remote_code" in spec


def remember(spec: str) -> None:
    """Note that the user asked for this `MODEL` string himself; later processes know it too."""
    key = _key(spec)
    if not runs_code(spec) or key in _here:
        return
    _here.add(key)
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="ascii") as opened:
            opened.write(key + "\n")
    except OSError as error:
        logger.info("later processes will ask for %s again: %s", spec, error)


def check(spec: str, place: object, *, trust_code: bool = False) -> None:
    """Refuse a checkpoint's `MODEL` string that would run code which this user never ran.

    Raises:
        CheckpointError: If so.
    """
    if trust_code or not runs_code(spec) or spec.startswith(OWN) or _key(spec) in _here | _known():
        return
    raise CheckpointError(
        f"{place} names a base that runs code: {spec!r}; look at that code, then pass the model "
        "(surgery.load(…, model=…), or --model on the command line) or trust_code=True"
    )


def _known() -> set[str]:
    try:
        return set(_file().read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SURGERY_CACHE") or Path(cache) / "bypass-surgery") / "code-that-was-run"


def _key(spec: str) -> str:
    """A hash of the string, with the path of its file made absolute."""
    head, mark, options = spec.partition("?")
    prefix, _, rest = head.partition(":")
    where, _, function = rest.rpartition(":")
    if where.endswith(".py"):
        head = f"{prefix}:{Path(where).resolve()}:{function}"
    return hashlib.sha256(f"{head}{mark}{options}".encode()).hexdigest()
