"""Held-out data: every fifth batch, without copying or reading ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from surgery.calling import as_batch, batches, check_batches, length_of, numbered
from surgery.errors import DataError

EVERY = 5


class Part:
    """Every fifth batch of `data` (`held`), or the others; re-iterable."""

    def __init__(self, data: Iterable[Any], count: int | None, *, held: bool) -> None:
        self.data, self.held = data, held
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Any]]:
        """Every batch with its number in `data`."""
        for index, value in enumerate(self.data):
            if (index % EVERY == EVERY - 1) == self.held:
                yield index, value

    def __len__(self) -> int:
        if self._count is None:
            raise TypeError("the length of streaming data is unknown")
        kept = self._count // EVERY
        return kept if self.held else self._count - kept


class Head:
    """The first batches of `data` that hold `samples` samples; re-iterable."""

    def __init__(self, data: Iterable[Any], samples: int) -> None:
        self.data, self.samples = data, samples

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Any]]:
        """Every batch with its number in `data`."""
        count = 0
        for number, value in numbered(self.data):
            yield number, value
            count += as_batch(value).size
            if count >= self.samples:
                return


def split(data: Iterable[Any], validation: Iterable[Any] | None) -> tuple[Iterable[Any], Iterable[Any]]:
    """Data to fit on, and data to calibrate on.

    Fewer than five batches are split by rows: every fifth row is held out, and the last one of fewer. Batches of one row are
    fitted on, but for the last one where nothing else is held out. So are five of which the last holds what was left over, less
    than half of another one, and would be all that is held out.

    Raises:
        DataError: If `data` can be read only once, yields nothing, or holds one sample only.
    """
    check_reiterable(data)
    if validation is not None:
        check_reiterable(validation)
        return data, validation
    count = length_of(data)
    if count is None:
        for seen, _ in enumerate(data, start=1):
            if seen > EVERY:
                break
        else:
            count = sum(1 for _ in data)
    if count is not None and (count < EVERY or (count == EVERY and _ends_short(data))):
        return _by_rows(data)
    return Part(data, count, held=False), Part(data, count, held=True)


def check_reiterable(data: Iterable[Any]) -> None:
    """Raise `DataError` for an iterator, which is empty when it is read again, and for what is no batches."""
    if isinstance(data, Iterator):
        raise DataError(
            f"the data is a {type(data).__name__}, which can be read only once; it is read several times: "
            "pass a list, a DataLoader, or a dataset"
        )
    check_batches(data)


def _ends_short(data: Iterable[Any]) -> bool:
    """Whether the last batch is less than half as large as the largest one."""
    sizes = [batch.size for batch in batches(data)]
    return 2 * sizes[-1] < max(sizes)


def _by_rows(data: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    fit, held = [], []
    for batch in batches(data):
        if batch.size < 2:
            fit.append(batch)
            continue
        index = torch.arange(batch.size)
        last = index % EVERY == EVERY - 1
        if not last.any():
            last[-1] = True
        fit.append(batch.rows(index[~last]))
        held.append(batch.rows(index[last]))
    if not held and len(fit) < 2:
        raise DataError(
            "the data holds one sample, and every fifth is held out to calibrate on: give at least two (some hundreds for "
            "thresholds that hold), or validation=… as well"
        )
    return fit, held or [fit.pop()]
