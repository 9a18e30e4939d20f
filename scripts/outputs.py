"""Where a command is asked to write: refused before its work, not after it."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from tempfile import TemporaryFile

from surgery.errors import CheckpointError, OutputExists, SurgeryError


def check_file(option: str, out: Path) -> None:
    """Refuse a file that could not be written. Nothing is left there; `write` makes its directory.

    Args:
        option: What named it.
        out: The file; an older one is replaced.

    Raises:
        OutputExists: If a directory has that name.
        SurgeryError: If the file system refuses.
    """
    if out.is_dir():
        raise OutputExists(f"{option} {out} is a directory; give the name of a file")
    check_writable(option, out)


def check_directory(option: str, out: Path, names: Container[str], what: str) -> None:
    """Refuse a directory that could not be written, or that holds anything else than an earlier run wrote there.

    Args:
        option: What named it.
        out: The directory.
        names: What an earlier run may have left in it.
        what: What such a run wrote, in words.

    Raises:
        OutputExists: If something else is there.
        SurgeryError: If the file system refuses.
    """
    if out.exists() and (not out.is_dir() or any(one.name not in names for one in out.iterdir())):
        raise OutputExists(f"{out} exists and holds something else than {what}; give another {option}")
    check_writable(option, out)


def check_conversion(option: str, out: Path, *, force: bool) -> None:
    """Refuse a directory for a conversion that is there already, unless it holds an older one and may be replaced.

    Args:
        option: What named it.
        out: The directory.
        force: Whether an older conversion may be replaced.

    Raises:
        OutputExists: If something is there that must not be replaced.
        CheckpointError: If the file system refuses.
    """
    from surgery.configs import is_checkpoint

    if out.exists() and not is_checkpoint(out) and any(out.iterdir() if out.is_dir() else [out]):
        raise OutputExists(f"{out} exists and is no converted model, so it is not replaced; give another {option}")
    if out.exists() and not force:
        raise OutputExists(f"{out} exists; pass --force to replace it, or another {option}")
    check_writable(option, out, CheckpointError)


def check_writable(option: str, out: Path, kind: type[SurgeryError] = SurgeryError) -> None:
    """Try whether a file or directory of that name can be made, and leave no trace.

    Args:
        option: What named it.
        out: The file or directory.
        kind: Of the error.

    Raises:
        SurgeryError: If the file system refuses; of the class `kind`.
    """
    place = out.expanduser().absolute()
    above = next(one for one in (place, *place.parents) if one.is_dir() or (one.exists() and one != place))
    try:
        with place.open("ab") if place.is_file() else TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise kind(f"{option} {out} cannot be written: {error.strerror}; give another {option}") from error


def write(out: Path, content: bytes) -> None:
    """Write a file, and make the directory that it is in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)
