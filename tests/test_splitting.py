"""Every fifth batch is held out, whatever the data are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from toys import Once, Unsized

from surgery.calling import Batch, length_of
from surgery.errors import DataError
from surgery.splitting import Head, Part, check_reiterable, split


def numbered(count: int, rows: int = 2) -> list[Tensor]:
    return [torch.full((rows, 3), float(index)) for index in range(count)]


def numbers(data: Any) -> list[int]:
    return [int(value[0, 0]) for value in data]


@pytest.mark.parametrize("wrap", [list, Unsized], ids=["list", "stream"])
def test_every_fifth_batch_is_held_out(wrap: Any) -> None:
    fit, held = split(wrap(numbered(12)), None)
    for _ in range(2):  # re-iterable
        assert numbers(fit) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
        assert numbers(held) == [4, 9]
    fit, held = split(wrap(numbered(5)), None)
    assert numbers(fit) == [0, 1, 2, 3] and numbers(held) == [4]


def test_lengths() -> None:
    fit, held = split(numbered(12), None)
    assert (length_of(fit), length_of(held)) == (10, 2)
    fit, held = split(Unsized(numbered(12)), None)
    assert (length_of(fit), length_of(held)) == (None, None)
    assert [len(Part(numbered(n), n, held=True)) for n in (5, 9, 10, 14, 15)] == [1, 1, 2, 2, 3]


def test_nothing_is_read_ahead() -> None:
    read: list[int] = []

    class Counting:
        def __iter__(self) -> Any:
            for index in range(20):
                read.append(index)
                yield torch.full((2, 3), float(index))

        def __len__(self) -> int:
            return 20

    fit, held = split(Counting(), None)
    assert read == []
    assert numbers([next(iter(held))]) == [4] and read == [0, 1, 2, 3, 4]
    assert numbers([next(iter(fit))]) == [0]


@pytest.mark.parametrize("wrap", [list, Unsized], ids=["list", "stream"])
def test_few_batches_are_split_by_rows(wrap: Any) -> None:
    x = torch.arange(11.0)[:, None]
    labels = torch.arange(11)
    fit, held = split(wrap([(x, labels), (x + 100, labels)]), None)
    assert [batch.args[0].flatten().tolist() for batch in held] == [[4, 9], [104, 109]]
    assert [batch.args[0].flatten().tolist() for batch in fit] == [
        [0, 1, 2, 3, 5, 6, 7, 8, 10],
        [100, 101, 102, 103, 105, 106, 107, 108, 110],
    ]
    assert [batch.labels.tolist() for batch in held] == [[4, 9]] * 2


@pytest.mark.parametrize("wrap", [list, Unsized], ids=["list", "stream"])
def test_what_is_left_over_is_not_all_that_is_held_out(wrap: Any) -> None:
    """Five batches, the last of three rows: of 43 rows, eight are held out and not three."""
    fit, held = split(wrap([*numbered(4, rows=10), *[torch.full((3, 3), 4.0)]]), None)
    assert [batch.size for batch in held] == [2, 2, 2, 2, 1]
    assert [batch.size for batch in fit] == [8, 8, 8, 8, 2]
    fit, held = split(wrap([*numbered(9, rows=10), torch.full((3, 3), 9.0)]), None)  # one whole batch is held out
    assert numbers(held) == [4, 9]


def test_small_batches_keep_their_last_row() -> None:
    fit, held = split([torch.arange(3.0)[:, None]], None)
    assert [b.args[0].flatten().tolist() for b in fit] == [[0, 1]]
    assert [b.args[0].flatten().tolist() for b in held] == [[2]]


def test_no_row_is_both_fitted_on_and_held_out() -> None:
    rows = [torch.full((1, 3), float(index)) for index in range(4)]
    fit, held = split(rows, None)
    assert [numbers([b.args[0] for b in part]) for part in (fit, held)] == [[0, 1, 2], [3]]
    fit, held = split([torch.arange(3.0)[:, None], torch.full((1, 1), 7.0)], None)
    assert [b.args[0].flatten().tolist() for b in fit] == [[0, 1], [7]]
    assert [b.args[0].flatten().tolist() for b in held] == [[2]]
    with pytest.raises(DataError, match="holds one sample, and every fifth is held out.*at least two"):
        split([torch.zeros(1, 3)], None)
    fit, held = split([torch.zeros(1, 3)], [torch.ones(1, 3)])
    assert numbers(fit) == [0] and numbers(held) == [1]


def test_validation_is_taken_as_it_is() -> None:
    data, validation = numbered(3), numbered(2)
    fit, held = split(data, validation)
    assert fit is data and held is validation


def test_head_stops_at_enough_samples() -> None:
    data = numbered(10, rows=4)
    head = Head(data, 10)
    assert [numbers(head) for _ in range(2)] == [[0, 1, 2]] * 2
    assert numbers(Head(data, 8)) == [0, 1] and numbers(Head(data, 1)) == [0] and len(numbers(Head(data, 1000))) == 10


def test_data_loaders() -> None:
    loader = DataLoader(torch.arange(20.0)[:, None], batch_size=2)  # type: ignore[arg-type]
    fit, held = split(loader, None)
    assert numbers(held) == [8, 18] and length_of(fit) == 8


def test_what_is_refused() -> None:
    for value in (iter([1]), (x for x in [1]), zip([1], [2], strict=True)):
        with pytest.raises(DataError, match=f"{type(value).__name__}.*read only once"):
            check_reiterable(value)
    for value in (torch.zeros(2, 3), {"x": 1}, "data", 3, None):
        with pytest.raises(DataError, match=f"got {type(value).__name__}; for one batch pass"):
            check_reiterable(value)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="read only once"):
        split(numbered(5), iter(numbered(2)))
    for nothing in ([], Unsized([]), Once([])):
        with pytest.raises(DataError, match="no batch"):
            split(nothing, None)


def test_batches_are_passed_through_whole() -> None:
    batch = Batch((torch.zeros(2, 3),), {"flag": True})
    fit, _ = split([batch] * 6, None)
    assert next(iter(fit)) is batch
