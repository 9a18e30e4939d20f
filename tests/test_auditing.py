"""The audit: numbers worked out by hand on gates whose decisions are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from subjects import subject
from torch import Tensor, nn
from toys import Residual

import surgery
from surgery.auditing import _grouped, _information
from surgery.audits import Observed
from surgery.context import state_of
from surgery.errors import DataError
from surgery.gates import iter_gates


class Net(nn.Module):
    """Two residual maps of four channels; the class is the sign of the first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Residual(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))) for _ in range(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)[:, :2]


def gated_net() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net().eval()
    plan = surgery.find_sites(model, torch.randn(4, 4)).plan(granularity="sample", skip="identity")
    gated = surgery.insert_gates(model, plan)
    state_of(gated).budget = 0.5
    return model, gated


def test_information_of_a_decision_that_is_the_class() -> None:
    labels = torch.tensor([0, 1] * 500)
    bias = 1 / (2 * 1000 * math.log(2))
    assert _information(labels.float(), torch.ones(1000), labels) == pytest.approx(1 - bias)
    assert _information(torch.tensor([0.0, 0.0, 1.0, 1.0] * 250), torch.ones(1000), labels) == 0
    assert _information(torch.ones(1000), torch.ones(1000), labels) == 0


def test_costs_classes_groups_and_errors() -> None:
    model, gated = gated_net()
    torch.manual_seed(1)
    x = torch.randn(400, 4)
    with torch.no_grad():
        dense = model(x).argmax(1)
    first, second = state_of(gated).names
    some = torch.arange(400) % 4 > 0
    with surgery.force(gated, {first: some, second: False}):
        found = surgery.audit(gated, [(x, dense)], dense=model, groups=["odd" if i % 2 else "even" for i in range(400)])
        with torch.no_grad():
            mine = gated(x).argmax(1)
    assert [site.active_rate for site in found.sites] == pytest.approx([0.75, 0.0])
    assert found.sites[0].entropy == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))
    assert found.sites[1].entropy == 0 and found.policies == 2 and found.decided == "400 inputs"
    assert found.input_information == pytest.approx(found.sites[0].entropy)
    wrong = (mine != dense).nonzero().flatten().tolist()
    assert wrong and [one.index for one in found.errors] == wrong and found.repaired == 0
    even, odd = (
        found.groups
    )  # every even input is a multiple of four, half of which are skipped, or runs the first site
    assert (even.group, odd.group, even.inputs) == ("even", "odd", 200)
    assert even.cost < odd.cost and even.low < even.cost < even.high
    assert odd.accuracy == pytest.approx(float((mine == dense)[1::2].float().mean()))
    assert sum(row.inputs for row in found.classes) == 400 and all(row.dense_accuracy == 1 for row in found.classes)
    assert all(row.agreement == row.accuracy for row in found.classes)
    assert "Errors introduced" in str(found) and found.to_dict()["classes"]


def test_near_decisions_and_noise() -> None:
    model, gated = gated_net()
    x = torch.randn(300, 4)
    for _, gate in iter_gates(gated):
        for parameter in gate.router.parameters():
            nn.init.normal_(parameter, std=0.5)
    with torch.no_grad(), surgery.tape(gated) as events:
        gated(x)
    state_of(gated).threshold = float(events[0].scores.median())
    calm = surgery.audit(gated, [x], dense=model, noise=1e-7)
    rough = surgery.audit(gated, [x], dense=model, noise=0.5)
    assert sum(s.noise_rate for s in calm.sites) < 0.02 < sum(s.noise_rate for s in rough.sites)
    assert rough.flipped > calm.flipped and rough.dense_flipped > calm.dense_flipped
    state_of(gated).threshold = 1e6
    assert "noise of 50 % of the inputs' own spread" in str(rough)
    far = surgery.audit(gated, [x], dense=model, noise=0)
    assert all(site.near_rate == 0 and site.noise_rate is None for site in far.sites) and far.flipped is None


def test_tokens_count_where_gates_decide_per_token() -> None:
    one = subject("transformers/bert")
    with surgery.execution(one.gated, "skip"):
        found = surgery.audit(one.gated, [one.entry.example(3, seed=1)], dense=one.model)
        report = surgery.measure(one.gated, [one.entry.example(3, seed=1)], dense=one.model, speed=(), peers=False)
    assert {s.site: s.active_rate for s in found.sites} == pytest.approx(report.active_rate, abs=1e-5)
    assert found.policies == report.policies


def test_one_group_of_all_costs_what_all_cost() -> None:
    weights, costs = torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    seen = Observed(("a",), torch.zeros(3, 1), costs, weights, ["", "", ""], None, None, None)
    (one,) = _grouped(seen, ["all"] * 3)
    mean = (0.2 + 3 * 0.6 + 4 * 1.0) / 8
    spread = (1 * (0.2 - mean)) ** 2 + (3 * (0.6 - mean)) ** 2 + (4 * (1.0 - mean)) ** 2
    half = 1.96 * math.sqrt(spread / 64 * 3 / 2)
    assert (one.cost, one.low, one.high) == (
        pytest.approx(mean),
        pytest.approx(mean - half),
        pytest.approx(mean + half),
    )
    (same,) = _grouped(replace(seen, weights=torch.full((3,), 7.0)), ["all"] * 3)
    assert same.cost == pytest.approx(0.6) and same.high - 0.6 == pytest.approx(1.96 * 0.4 / math.sqrt(3))


def test_a_text_of_padding_alone_has_a_policy() -> None:
    """A gate per token decided nothing there, one per sample did."""
    token, sample = torch.tensor([True, False]), torch.tensor([True])
    seen = Observed(
        ("token", "sample"), *[torch.zeros(2)] * 3, ["", ""], None, None, None,
        [{"token": token, "sample": sample}, {"token": token[:0], "sample": sample}],
    )  # fmt: skip
    assert sorted(seen.policies.values()) == [
        1,
        2,
    ]  # open and open once; closed and open of a token, and of the padding


def test_a_dense_model_in_training_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), nn.Linear(4, 2)).eval()
    gated = surgery.insert_gates(model, surgery.find_sites(model, torch.randn(4, 4)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    surgery.audit(gated, [torch.randn(8, 4) + 5], dense=model)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Seen(nn.Module):
    """Adds a mask of minus infinity to what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Residual(nn.Linear(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.block(x)) + mask


def test_masks_get_no_noise() -> None:
    torch.manual_seed(0)
    model, x = Seen().eval(), torch.randn(64, 4)
    mask = torch.zeros(64, 4).masked_fill(torch.arange(4) == 3, -torch.inf)
    data = [{"x": x, "mask": mask}]
    gated = surgery.insert_gates(model, surgery.find_sites(model, data[0]))
    state_of(gated).budget = 0.5
    with surgery.force(gated, {state_of(gated).names[0]: True}):
        found = surgery.audit(gated, data, noise=1e-6)
    assert found.flipped == found.dense_flipped == 0  # noise on the mask would make NaN of everything


def test_refusals_and_notes() -> None:
    model, gated = gated_net()
    with pytest.raises(DataError, match="3 groups were given for 5 inputs"):
        surgery.audit(gated, [torch.randn(5, 4)], dense=model, groups=["a", "b", "c"])
    surgery.set_budget(gated, 1.0)
    assert "every call ran dense" in surgery.audit(gated, [torch.randn(5, 4)], dense=model).notes[0]
