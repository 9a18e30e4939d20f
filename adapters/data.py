"""`load_data`: from a `source` string to a re-iterable loader of what the model is called with.

Axis letters: `N` samples, `C` channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from surgery.adapters.augmenting import augment as augmented
from surgery.adapters.base import Loaded
from surgery.adapters.columns import find_columns
from surgery.adapters.labels import Labels, read_labels
from surgery.adapters.lengths import group_by_length as in_groups
from surgery.adapters.phrases import is_phrase_set
from surgery.adapters.phrases import whole_texts as find_whole_texts
from surgery.adapters.sources import Table, open_source
from surgery.errors import DataError, SurgeryError, shortened


class Loader:
    """A dataset in batches, the same rows in the same order on every pass.

    Without data augmentation the batches are equal on every pass too; with it only the rows are.

    Args:
        table: The rows.
        order: Which rows, in which order.
        columns: Role -> column name.
        labels: How the label column is read; None for data without labels.
        loaded: The model's preprocessing.
        batch_size: Samples per batch; the last batch may be smaller.
        seed: Of the augmentation.
        augment: Change samples at random, anew on every pass; see `load_data`.
        parts: How many rows were left out since their text is part of another one.
    """

    def __init__(
        self,
        table: Table,
        order: Sequence[int],
        columns: Mapping[str, str],
        labels: Labels | None,
        loaded: Loaded,
        *,
        batch_size: int,
        seed: int = 0,
        augment: bool = False,
        parts: int = 0,
    ) -> None:
        self.parts = parts
        self.columns = dict(columns)
        self.batch_size = batch_size
        self.labels = labels
        self._table, self._order, self._loaded = table, list(order), loaded
        self._seed, self._augment, self._passes = seed, augment, 0

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._order) // self.batch_size)

    @property
    def samples(self) -> int:
        """Number of rows."""
        return len(self._order)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the columns that have no role."""
        return tuple(name for name in self._table.features if name not in self.columns.values())

    def column(self, name: str) -> list[Any]:
        """The values of one column in the order of the batches.

        Raises:
            DataError: If there is no such column.
        """
        return self.cells(name, range(len(self._order)))

    def cells(self, name: str, places: Sequence[int]) -> list[Any]:
        """Some values of one column, by their places in the order of the batches.

        Raises:
            DataError: If there is no such column.
        """
        if name not in self._table.features:
            raise DataError(f"there is no column {name!r}; there are: {', '.join(self._table.features)}")
        return list(self._table[[self._order[place] for place in places]][name])

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self._seed + 7919 * self._passes)
        self._passes += 1
        for start in range(0, len(self._order), self.batch_size):
            yield self._batch(self._order[start : start + self.batch_size], generator)

    def __repr__(self) -> str:
        return f"<Loader of {self.samples} samples in {len(self)} batches, columns {self.columns}>"

    def _batch(self, rows: Sequence[int], generator: torch.Generator) -> Any:
        try:
            table = self._table[list(rows)]
        except Exception as error:  # datasets raises whatever its decoders raise
            raise DataError(f"{self._unreadable(rows)} cannot be read: {error}") from error
        roles = {role: name for role, name in self.columns.items() if role != "label"}
        samples = []
        for index, row in enumerate(rows):
            cells = {role: table[name][index] for role, name in roles.items()}
            empty = [roles[role] for role, cell in cells.items() if cell is None]
            if empty:
                raise DataError(f"row {row}: column {empty[0]!r} is empty")
            try:
                samples.append(self._loaded.preprocess(cells))
            except DataError as error:
                raise DataError(f"row {row}: {error} ({_kinds(roles, cells)})") from error
            except SurgeryError:
                raise
            except Exception as error:  # a function of the user's, or a library's
                raise DataError(
                    f"row {row}: preprocessing failed: {type(error).__name__}: {error} ({_kinds(roles, cells)})"
                ) from error
            if not _finite(samples[-1]):
                raise DataError(
                    f"row {row}: {' and '.join(roles.values())} holds NaN or infinity; clean or leave out this row"
                )
        hold = True
        if self._augment:
            samples, hold = augmented(samples, generator, getattr(self._loaded.preprocess, "text_keys", ()))
        labels: Tensor | None = None
        if self.labels is not None and hold:
            labels = self.labels.read(table[self.labels.column], rows)
        return self._loaded.collate(samples, labels)

    def _unreadable(self, rows: Sequence[int]) -> str:
        """The first of some rows that cannot be read alone, by its number."""
        for row in rows:
            try:
                self._table[row]
            except Exception:  # what it raises is said by who read them together
                return f"row {row}"
        return f"one of the rows {shortened([str(row) for row in sorted(rows)])}"


def load_data(
    source: str,
    loaded: Loaded,
    *,
    split: str = "train",
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
    columns: Mapping[str, str] | None = None,
    augment: bool = False,
    whole_texts: bool | Literal["auto"] = False,
    group_by_length: bool = False,
) -> Loader:
    """Open a dataset for a model.

    Args:
        source: A Hugging Face dataset (`name` or `name:config`), a `.parquet`, `.csv`, `.tsv`, `.jsonl` or `.json` file
            (the whole of it, whatever the split), a directory with `train.parquet` and `test.parquet`, a folder of
            images by class (with folders per split above them, else the whole of it), or `digits` (`digits:16` for 16x16).
        loaded: What `load_model` returned.
        split: Name of the split.
        batch_size: Samples per batch.
        limit: Use that many rows: the first ones, or with `shuffle` random ones.
        seed: Of shuffling and augmentation.
        shuffle: Mix the rows once; their order stays the same on every pass, so that batches held out stay held out.
        columns: Role -> column name where the right column is not found by itself; roles are image, text, pair, audio,
            value, target, label.
        augment: Change samples at random, anew on every pass: flip and shift pictures, and let half of the texts go on as
            another one of their batch does; such texts have no labels.
        whole_texts: Leave out texts that are parts of other texts; `auto` does so where most of them are, and counts
            them in `Loader.parts`.
        group_by_length: Put texts of about the same length into a batch, so that little of it is padding; the batches
            are in random order. Where the model is called with no texts it does nothing.

    Returns:
        A re-iterable of `(inputs, labels)`, or for transformers of dicts of keyword arguments with `labels`. Without
        labels: `inputs`, or dicts without `labels`.

    Raises:
        DataError: If the source cannot be opened, is empty, or lacks a column that the model needs.
        MissingDependency: If `datasets` is not installed.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    table = open_source(source, split)
    count = len(table)
    if count == 0:
        raise DataError(f"{source} (split {split!r}) has no rows")
    order = torch.arange(count)
    if shuffle:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    values = _first_values(table)
    found = find_columns(
        table.features,
        values,
        loaded.preprocess.needs,
        columns,
        target="decoder_input_ids" in getattr(loaded.preprocess, "names", ()),
        where=source,
    )
    kept = order.tolist()
    if whole_texts and "text" in found and not {"pair", "image", "target"} & set(found):
        kept = _without_parts(table, found["text"], kept, only_phrases=whole_texts == "auto")
    rows = kept[:limit]
    if group_by_length and "text" in found:
        texts = list(table[found["text"]])
        lengths = [len(texts[row] or "") for row in rows]
        rows = [rows[place] for place in in_groups(lengths, batch_size, seed)]
    return Loader(
        table,
        rows,
        found,
        _labels(table, found.get("label"), values, loaded),
        loaded,
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        parts=count - len(kept),
    )


def _without_parts(table: Table, column: str, order: list[int], *, only_phrases: bool) -> list[int]:
    """The rows whose text is no part of another one's."""
    texts = [text or "" for text in table[column]]
    if only_phrases and not is_phrase_set(texts):
        return order
    whole = set(find_whole_texts(texts))
    return [row for row in order if row in whole]


def _finite(sample: Any) -> bool:
    values = sample.values() if isinstance(sample, Mapping) else (sample,)
    return all(bool(torch.isfinite(one).all()) for one in values if isinstance(one, Tensor) and one.is_floating_point())


def _first_values(table: Table) -> dict[str, Any]:
    """Column -> its first value that is there; None for columns without any."""
    row = dict(table[0])
    for name in [name for name, value in row.items() if value is None]:
        row[name] = next((value for value in table[name] if value is not None), None)
    return row


def _labels(table: Table, column: str | None, values: Mapping[str, Any], loaded: Loaded) -> Labels | None:
    if column is None:
        return None
    unique: Sequence[Any] = ()
    if isinstance(values[column], str):
        unique = table.unique(column) if hasattr(table, "unique") else ()
    return read_labels(column, table.features[column], unique, loaded.label_names, loaded.num_classes)


def _kinds(roles: Mapping[str, str], cells: Mapping[str, Any]) -> str:
    """Which columns a row was made of: `column 'review', str`."""
    return "; ".join(f"column {roles[role]!r}, {type(cell).__name__}" for role, cell in cells.items())
