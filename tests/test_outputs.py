"""What a model may return: tensors in any wrapping, classes, and numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Stack, mlp

import surgery
from surgery.calling import read_output, tensors
from surgery.errors import DataError, UnsupportedModel
from surgery.second_look import given_to_others


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor
    count: int = 1


@dataclass
class Scored:
    scores: Tensor
    hidden: list[Tensor]


class Own:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Empty:
    """An output that shows nothing."""


WRAPPINGS: dict[str, Callable[[Tensor], Any]] = {
    "frozen dataclass": Frozen,
    "dataclass": lambda y: Scored(y, [y + 1]),
    "own class": Own,
    "dataclass in a tuple": lambda y: (Scored(y, []), None),
}


class Wrapped(nn.Module):
    """A network that wraps its output."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = Stack(mlp(8), mlp(8), head=nn.Linear(8, 3))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_tensors_are_found_in_every_wrapping(wrap: Callable[[Tensor], Any]) -> None:
    y = torch.randn(2, 3)
    assert tensors(wrap(y))[0] is y and read_output(wrap(y)) is y
    assert tensors(Scored(y, [y + 1]))[1].equal(y + 1)


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_gates_that_change_the_result_are_refused_in_every_wrapping(
    wrap: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial conversions are made wrong; only comparing their outputs can tell."""
    trial = surgery.finding.insert_gates

    def wrong(model: nn.Module, plan: Any) -> nn.Module:
        gated = trial(model, plan)
        gated.net.head.bias.data = gated.net.head.bias.data + 1  # type: ignore[operator, union-attr]
        return gated

    model = Wrapped(wrap).eval()
    assert len(surgery.find_sites(model, torch.randn(2, 8))) == 2
    monkeypatch.setattr(surgery.finding, "insert_gates", wrong)
    found = surgery.find_sites(model, torch.randn(2, 8))
    assert len(found) == 0 and "does not give the same result" in found.rejections[0].reason


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"Wrapped returns a Empty in which no tensor was found.*return a tensor"):
        surgery.find_sites(Wrapped(lambda y: Empty()).eval(), torch.randn(2, 8))


@pytest.mark.parametrize("wrap", [*WRAPPINGS.values()][:3], ids=[*WRAPPINGS][:3])
def test_a_second_look_replaces_rows_in_every_wrapping(wrap: Callable[[Tensor], Any]) -> None:
    first, dense, looked = torch.zeros(6, 3), torch.ones(6, 3), torch.arange(6) < 2
    given = wrap(first)
    result, rows = given_to_others(given, dense, looked, seed=0)
    assert type(result) is type(given) and rows.sum() == 2
    assert torch.equal(read_output(result), rows[:, None].expand(6, 3).float())
    assert not read_output(given).any()  # others may hold it


def test_a_loss_is_no_output() -> None:
    loss, logits = torch.tensor(1.0), torch.randn(2, 3)
    assert read_output((loss, logits)) is logits
    with pytest.raises(DataError, match=r"one number for a whole batch, such as a loss; expected one row for every sample"):
        read_output((loss, torch.zeros(2, dtype=torch.long)))
