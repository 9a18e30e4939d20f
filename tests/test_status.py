"""`status` says what gates are set to do, with costs worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import surgery
from surgery.context import state_of
from surgery.errors import NotConverted
from surgery.overview import status
from surgery.state import BudgetPoint, CostModel, SiteCost


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


@pytest.fixture
def gated() -> nn.Module:
    model = nn.Sequential(Block(), Block(), nn.Linear(4, 2))
    made = surgery.insert_gates(model, surgery.find_sites(model, torch.randn(2, 4)))
    state = state_of(made)
    first, second = state.names
    # the model costs 100, of which the branches hold 30 and 50
    state.costs = CostModel("flops", 100.0, {first: SiteCost(30.0, 2.0, 1.0), second: SiteCost(50.0, 4.0, 1.0)})
    state.table = [
        BudgetPoint(0.5, 0.4, {first: 0.2, second: 0.2}),
        BudgetPoint(-0.5, 0.8, {first: 0.9, second: 0.5}, (second,)),
    ]
    return made


def test_routed(gated: nn.Module) -> None:
    state = state_of(gated)
    state.budget, state.threshold = 0.8, -0.5
    found = status(gated)
    first, second = found.sites
    assert (found.runs, found.budget, found.attainable) == ("routed", 0.8, (0.4, 0.8))
    assert (first.site, first.threshold) == (state.names[0], -0.5)
    assert first.active_rate == pytest.approx(0.9)
    assert first.cost_share == pytest.approx((0.9 * 30 + 0.1 * 2 + 1) / 100)
    assert second.cost_share == pytest.approx((0.5 * 50 + 0.5 * 4 + 1) / 100)
    assert found.cost == pytest.approx(0.20 + 0.282 + 0.28)  # what is not in branches costs 20


def test_dense_and_uncalibrated(gated: nn.Module) -> None:
    state = state_of(gated)
    state.table = []
    found = status(gated)
    assert found.runs == "dense" and found.cost == pytest.approx(1.0) and found.attainable is None
    assert [row.active_rate for row in found.sites] == [1.0, 1.0]
    assert "not calibrated" in str(found)
    state.budget = 0.5
    assert [row.active_rate for row in status(gated).sites] == [None, None]


def test_static_runs_no_router(gated: nn.Module) -> None:
    state = state_of(gated)
    state.budget, state.policy = 0.8, "static"
    state.static = {state.names[0]: False, state.names[1]: True}
    found = status(gated)
    assert [row.active_rate for row in found.sites] == [0.0, 1.0]
    assert [row.threshold for row in found.sites] == [None, None]
    assert found.cost == pytest.approx((20 + 2 + 50) / 100)


def test_prints_and_turns_into_strict_json(gated: nn.Module) -> None:
    state = state_of(gated)
    state.budget, state.threshold, state.notes = 0.8, -math.inf, ["routers were given little to do"]
    found = status(gated)
    text = str(found)
    for part in ("Gates of Sequential", state.names[0], "90.0 %", "budget 80.0 %", "note: routers were given"):
        assert part in text, part
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back["sites"][0]["site"] == state.names[0]
    assert back["sites"][0]["threshold"] is None
    assert back["attainable"] == [0.4, 0.8]


def test_refuses_models_without_gates() -> None:
    with pytest.raises(NotConverted, match=r"surgery\.convert"):
        status(nn.Linear(2, 2))
