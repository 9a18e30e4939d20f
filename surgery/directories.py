"""Writing a directory so that it is there in full or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import CheckpointError, OutputExists


@contextmanager
def written_directory(
    target: str | Path, *, marker: str | Callable[[Path], bool], overwrite: bool = False
) -> Iterator[Path]:
    """Yield a new directory beside `target` that takes its name when the block ends well and vanishes when it does not.

    Args:
        target: Where the directory shall be; its parents are made.
        marker: Name of a file by which an older directory of the same kind is recognised, or a function that says whether
            it is one: nothing else is replaced.
        overwrite: Whether such a directory, or an empty one, may be replaced.

    Raises:
        OutputExists: If `target` is there and must not be replaced.
        CheckpointError: If the file system refuses.
    """
    place = Path(os.path.realpath(Path(target).expanduser()))  # a link stays, what it points to is replaced
    _check_free(place, target, marker, overwrite)
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            _give_modes(temporary)
            _check_free(place, target, marker, overwrite)
            _move(temporary, place)
        except OutputExists:
            raise
        except OSError as error:
            raise CheckpointError(f"cannot write {target}: {error}; nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(place: Path, target: str | Path, marker: str | Callable[[Path], bool], overwrite: bool) -> None:
    if not place.exists():
        return
    same = marker if callable(marker) else lambda older: (older / marker).is_file()
    if not place.is_dir() or (any(place.iterdir()) and not same(place)):
        what = "is no converted model" if callable(marker) else f"holds no {marker}"
        raise OutputExists(f"{target} exists and {what}, so it is not replaced; give another directory")
    if not overwrite:
        raise OutputExists(f"{target} exists; give another directory, or overwrite=True to replace it")


def _give_modes(made: Path) -> None:
    """Files get the mode that new ones have here: safetensors makes its own readable by nobody else."""
    probe = made / f".{uuid.uuid4().hex}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in made.rglob("*"):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


def _move(new: Path, place: Path) -> None:
    """Give `new` its name; what stood there goes only once `new` is in place."""
    if not place.exists():
        new.rename(place)
        return
    old = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.old")
    place.rename(old)
    try:
        new.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
