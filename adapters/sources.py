"""From a `source` string to a dataset: files, directories, Hub names, and scikit-learn's digits."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from surgery.adapters.base import library
from surgery.adapters.digits import digits
from surgery.adapters.specs import near_files
from surgery.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")  # how `datasets` says it: csv, parquet
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SPLITS = frozenset({"train", "test", "validation", "val", "valid", "dev", "eval"})
SYNONYMS = {"validation": ("val", "valid", "dev", "eval"), "val": ("validation", "valid", "dev")}


class Table(Protocol):
    """What is needed of a dataset: rows by number, and the types of its columns."""

    @property
    def features(self) -> Any:
        """Column name -> type."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class DigitsTable:
    """scikit-learn's digits as rows."""

    images: Tensor
    labels: Tensor

    @property
    def features(self) -> Mapping[str, Any]:
        """An image and a class."""
        return {"image": Image(), "label": ClassLabel([str(digit) for digit in range(10)])}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any, /) -> dict[str, Any]:
        if isinstance(index, int):
            return {"image": self.images[index], "label": int(self.labels[index])}
        return {"image": [self.images[i] for i in index], "label": [int(self.labels[i]) for i in index]}


class Image:
    """Named as in `datasets`, whose types are recognised by name."""


@dataclass(frozen=True)
class ClassLabel:
    """Named as in `datasets`, whose types are recognised by name."""

    names: Sequence[str]


@dataclass(frozen=True)
class AmongClasses:
    """Rows whose classes are numbered among more than those that occur.

    Args:
        table: The rows.
        column: Where their classes are.
        names: All classes.
    """

    table: Table
    column: str
    names: Sequence[str]

    @property
    def features(self) -> Mapping[str, Any]:
        """With all classes."""
        return {**self.table.features, self.column: ClassLabel(self.names)}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any, /) -> Any:
        found = self.table[index]
        if isinstance(index, str):
            return self._numbered(found) if index == self.column else found
        return {**found, self.column: self._numbered(found[self.column])}

    def _numbered(self, value: Any) -> Any:
        if not isinstance(value, int):
            return [self._numbered(one) for one in value]
        return self.names.index(self.table.features[self.column].names[value])


def open_source(source: str, split: str) -> Table:
    """Open what a `source` string names.

    Files and folders without splits are read whole; this is logged where another split than `train` is asked for and their
    name is not that of the split.

    Raises:
        DataError: If it names nothing, or has no such split.
        MissingDependency: If `datasets` is not installed.
    """
    name, _, rest = source.partition(":")
    if name == "digits":
        try:
            size = int(rest or 8)
        except ValueError as error:
            raise DataError(f"{source!r}: expected digits or digits:<size>, got {rest!r}") from error
        return DigitsTable(*digits(split, size=size))
    path = Path(source).expanduser()
    if path.is_file():
        return _whole(_file(path, path), path, split)
    if path.is_dir():
        return _directory(path, split)
    return _hub(source, split)


def _file(path: Path, asked: Path) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{asked}: cannot read {path.suffix or 'a file without a suffix'}; {_readable()}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    options = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    table = _load(str(path), reader, data_files=[_literal(path)], split="train", **options)
    name, *more = table.features
    if reader == "csv" and not more and any(mark in name for mark in ";\t|"):
        raise DataError(
            f"{asked}: its only column is {name!r}; columns are separated by commas, or by tabs in a .tsv file"
        )
    return table


def _directory(path: Path, split: str) -> Table:
    names = (split, *SYNONYMS.get(split, ()))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    for place in (path, path / "data"):
        for name in names:
            here = sorted(f for f in place.glob("*") if f.suffix.lower() in READERS)
            # train.parquet, or shards as the Hub names them: train-00000-of-00003.parquet
            match = [f for f in here if f.stem == name] or [f for f in here if f.stem.startswith(f"{name}-")]
            if match:
                reader = READERS[match[0].suffix.lower()]
                return _load(str(path), reader, data_files=[_literal(f) for f in match], split="train")
    if files and not any(file.name == "metadata.csv" or file.name == "metadata.jsonl" for file in files):
        raise DataError(f"{path} has no split {split!r}; found: {', '.join(file.name for file in files)}")

    folders = {one.name: one for one in sorted(path.iterdir()) if one.is_dir()}
    chosen = next((folders[name] for name in names if name in folders), None)
    if chosen is None and SPLITS & set(folders):
        raise DataError(f"{path} has no split {split!r}; found: {', '.join(folders)}")
    root = chosen or path
    if next(_pictures(root), None) is None:
        found = ", ".join(sorted(one.name for one in path.iterdir())[:8]) or "nothing"
        raise DataError(f"{root} holds neither data files nor folders of images; found: {found}; {_readable()}")
    table = _load(str(path), "imagefolder", data_dir=str(root), split="train", drop_labels=None)
    return _among_classes(table, root, folders) if chosen else _whole(table, path, split)


def _among_classes(table: Table, root: Path, splits: Mapping[str, Path]) -> Table:
    """Classes numbered among those of all splits: one without pictures of some class has the same numbers as the others."""
    found = {column: list(getattr(feature, "names", None) or ()) for column, feature in table.features.items()}
    every = {name for split, folder in splits.items() if split in SPLITS for name in _classes(folder)}
    for column, names in found.items():
        if names and set(names) <= _classes(root) and set(names) < every:
            return AmongClasses(table, column, sorted(every))
    return table


def _classes(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir() if one.is_dir() and next(_pictures(one), None) is not None}


def _whole(table: Table, path: Path, split: str) -> Table:
    """What has no splits, as it is: rows that a conversion saw may be among them."""
    named = set(re.split(r"[\W_]+", path.resolve().stem.lower()))
    if split != "train" and not named & {split, *SYNONYMS.get(split, ())}:
        logger.warning(
            "%s has no splits: all %s rows are read as the split %r; rows that a conversion was fitted on may be among them",
            path,
            f"{len(table):,}",
            split,
        )
    return table


def _hub(source: str, split: str) -> Table:
    name, _, config = source.partition(":")
    suffix = Path(source).suffix.lower()
    if suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source} does not exist{did_you_mean(near_files(Path(source).expanduser()), _readable())}")
    return _load(source, name, config or None, split=split)


def _load(what: str, *args: Any, **kwargs: Any) -> Table:
    datasets = library("datasets", "bypass-surgery[data]")
    bars, loud = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()  # tables and reports are the commands' business, not this library's
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
    try:
        dataset = datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # datasets raises whatever its readers raise
        reason = f"{error.__cause__ or error}".strip().rstrip(".!") or type(error).__name__
        if any(one in reason for one in NO_ROWS):
            raise DataError(f"{what} has no rows; give data with at least one") from error
        raise DataError(f"{what} cannot be read: {reason}; {_readable()}") from error
    finally:
        datasets.logging.set_verbosity(loud)
        if bars:
            datasets.enable_progress_bars()
    return dataset


def _pictures(root: Path) -> Iterator[Path]:
    return (file for file in root.rglob("*") if file.suffix.lower() in IMAGES)


def _literal(path: Path) -> str:
    """A path that `datasets` does not read as a pattern."""
    text = str(path.resolve())
    for character in "[]*?":
        if character in text:
            raise DataError(f"{path}: rename it without {character!r}, which `datasets` reads as a pattern")
    return text


def _readable() -> str:
    return (
        "a source is a Hugging Face dataset (name or name:config), a .parquet, .csv, .tsv, .jsonl or .json file, "
        "a directory with train.parquet and test.parquet, a folder of images by class, or digits"
    )
