"""From a dataset's labels to the classes of a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.errors import DataError, shortened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """How one label column is read.

    Args:
        column: Its name.
        order: Index in the dataset -> index in the model; None where they are the same.
        index: Text in the dataset -> index in the model; None where labels are numbers.
        classes: Number of classes of the model, where known.
    """

    column: str
    order: tuple[int, ...] | None = None
    index: dict[str, int] | None = None
    classes: int | None = None

    def read(self, values: Sequence[Any], rows: Sequence[int]) -> Tensor | None:
        """Labels `(N,)`, whole numbers or, for regression, numbers; None where the data set hides them (-1).

        Args:
            values: Of one batch.
            rows: Their rows in the data, for messages.

        Raises:
            DataError: If a label is missing, not a number, or no class of the model.
        """
        if any(value is None for value in values):
            row = next(row for row, value in zip(rows, values, strict=True) if value is None)
            raise DataError(f"column {self.column!r}: row {row} has no label")
        if self.index is not None:
            unknown = [value for value in values if str(value) not in self.index]
            if unknown:
                known = ", ".join(list(self.index)[:8])
                raise DataError(f"column {self.column!r}: label {unknown[0]!r} is no class; classes: {known}")
            return torch.tensor([self.index[str(value)] for value in values])
        try:
            labels = torch.tensor(list(values))
        except (ValueError, TypeError) as error:
            raise DataError(f"column {self.column!r}: labels must be numbers or text: {error}") from error
        if labels.is_floating_point():
            return labels
        labels = labels.long()
        if labels.dim() != 1 or bool((labels == -1).all()):
            return None
        count = self.classes if self.order is None else len(self.order)
        for row, label in zip(rows, labels.tolist(), strict=True):
            if count is not None and not 0 <= label < count:
                whose = "the model" if self.order is None else "the column"
                raise DataError(
                    f"column {self.column!r}: row {row} has label {label}, {whose} has classes 0 to {count - 1}"
                )
        return labels if self.order is None else torch.tensor(self.order)[labels]


def read_labels(
    column: str,
    feature: Any,
    unique: Sequence[Any],
    model_names: Sequence[str],
    classes: int | None,
) -> Labels:
    """Match a label column with a model's classes, by name where both have names.

    Args:
        column: Its name.
        feature: Its type, as `datasets` writes it.
        unique: Its values, where they are text; else empty.
        model_names: Names of the model's classes.
        classes: Number of the model's classes, where known.

    Raises:
        DataError: If labels are text and neither the model's names nor their number fit.
    """
    names = list(getattr(feature, "names", None) or ())
    place = {_plain(name): index for index, name in enumerate(model_names)}
    if names:
        known = [place.get(_plain(name)) for name in names]
        if all(index is not None for index in known) and len(set(known)) == len(names):
            order = tuple(index for index in known if index is not None)
            return Labels(column, None if order == tuple(range(len(names))) else order, None, classes)
        if classes is not None and len(names) != classes:
            logger.warning(
                "column %r has %d classes (%s, …), the model has %d under other names; labels are taken as they are",
                *(column, len(names), names[0], classes),
            )
        elif _are_names(names) and _are_names(model_names):
            logger.warning(
                "column %r: its classes (%s) are not named like the model's (%s); labels are taken as they are, by number",
                *(column, shortened(names, 5), shortened(model_names, 5)),
            )
        return Labels(column, None, None, classes)
    texts = sorted(str(value) for value in unique if value is not None)
    if not texts:
        return Labels(column, None, None, classes)
    if all(_plain(text) in place for text in texts):
        return Labels(column, None, {text: place[_plain(text)] for text in texts}, classes)
    if classes is not None and len(texts) > classes:
        raise DataError(
            f"column {column!r} has {len(texts)} different labels ({', '.join(texts[:5])}, …), "
            f"the model has {classes} classes" + (f" ({', '.join(list(model_names)[:5])}, …)" if model_names else "")
        )
    why = "match no class names" if model_names else "are no numbers, and the model names no classes"
    logger.warning("column %r: %s %s; numbered in alphabetical order", column, shortened(texts, 5), why)
    return Labels(column, None, {text: index for index, text in enumerate(texts)}, classes)


def _are_names(names: Sequence[str]) -> bool:
    """Whether classes are named, not only numbered: `0`, `LABEL_0`, `class 0`."""
    return any(re.fullmatch(r"(label|class)?\d+", _plain(name)) is None for name in names)


def _plain(name: str) -> str:
    return "".join(letter for letter in str(name).lower() if letter.isalnum())
