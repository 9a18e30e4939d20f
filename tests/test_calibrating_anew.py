"""A budget that holds on other inputs than those that a model was converted with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.context import state_of
from surgery.conversion import calibrate_anew
from surgery.errors import BudgetError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.mlp(x)
        return made


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.blocks(x).mean(1))
        return made


def inputs(shift: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    along = torch.eye(8)[0]
    return [torch.randn(32, 12, 8, generator=generator) + shift * along for _ in range(8)]


def cost_on(gated: nn.Module, data: list[Tensor]) -> float:
    return surgery.measure(gated, data, speed=(), peers=False).cost


def test_the_budget_holds_on_other_inputs() -> None:
    torch.manual_seed(0)
    gated = surgery.convert(Tokens().eval(), 0.6, data=inputs(0, 0), tune="oneshot", second_look=False)
    other = inputs(4, 1)
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    assert abs(cost_on(gated, other) - 0.6) > 0.05
    calibrate_anew(gated, other, second_look=False)
    assert abs(cost_on(gated, inputs(4, 2)) - 0.6) < 0.02
    surgery.set_budget(gated, 0.8)
    assert abs(cost_on(gated, inputs(4, 2)) - 0.8) < 0.03
    assert all(torch.equal(value, before[name]) for name, value in gated.state_dict().items())


def test_second_looks_go_or_are_decided_anew() -> None:
    torch.manual_seed(0)
    gated = surgery.convert(Tokens().eval(), 0.6, data=inputs(0, 0), tune="oneshot", second_look=True)
    before = state_of(gated).looks
    assert before
    calibrate_anew(gated, inputs(4, 1))
    anew = state_of(gated).looks
    assert {look.budget for look in anew} >= {0.6} and anew != before
    calibrate_anew(gated, inputs(4, 1), second_look=False)
    assert not state_of(gated).looks


def test_without_a_budget_there_is_nothing_to_hold() -> None:
    model = Tokens().eval()
    gated = surgery.insert_gates(model, surgery.find_sites(model, inputs(0, 0)[0]).plan())
    with pytest.raises(BudgetError, match="no budget is set"):
        calibrate_anew(gated, inputs(0, 0))
