"""Times of models on rows of the data, by the dense model's on the same rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calling import Batch, batches, call, device_of
from surgery.costs import place
from surgery.progress import Progress
from surgery.timing import Ratio, Thunk, compare_all

Prepared = Callable[[Batch], Thunk]
"""Takes a batch and returns what runs it; only the latter is timed."""


def times_of(
    runs: Mapping[Any, Prepared],
    dense: nn.Module,
    data: Iterable[Any],
    sizes: Sequence[int],
    repeats: int,
    progress: Progress,
) -> tuple[dict[int, dict[Any, Ratio]], list[str]]:
    """Ratios by batch size and name in `runs`, on as many different rows as there are; and what could not be timed."""
    result, notes = {}, []
    device = device_of(dense)
    for index, size in enumerate(sizes):
        groups = list(itertools.islice(groups_of(data, size), repeats))
        if not groups:
            notes.append(f"batch {size} was not timed: no {size} rows of equal shape follow each other in the data")
            continue
        placed = [place(group, dense) for group in groups]
        thunks = {name: _stepping([run(group) for group in placed]) for name, run in runs.items()}
        base = _stepping([partial(call, dense, group) for group in placed])
        result[size] = compare_all(thunks, base, repeats=repeats, device=device)
        progress("timing", index + 1, len(sizes))
    return result, notes


def groups_of(data: Iterable[Any], size: int) -> Iterator[Batch]:
    """Consecutive rows of the data, `size` at a time, across batches where their shapes are equal."""
    rest: list[Batch] = []
    for batch in batches(data):
        rows = [batch.rows(torch.tensor([index])) for index in range(batch.size)]
        if rest and _shapes(rest[0]) != _shapes(rows[0]):
            rest = []
        rest += rows
        while len(rest) >= size:
            yield _joined(rest[:size])
            rest = rest[size:]


def _stepping(thunks: Sequence[Thunk]) -> Thunk:
    """Every call takes the next one."""
    following = itertools.cycle(thunks)
    return lambda: next(following)()


def _shapes(batch: Batch) -> list[Any]:
    return [value.shape for value in batch.tensors]


def _joined(rows: Sequence[Batch]) -> Batch:
    def join(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values)) if values[0].dim() and len(values[0]) == 1 else values[0]

    return rows[0].filled([join(column) for column in zip(*(row.tensors for row in rows), strict=True)])
