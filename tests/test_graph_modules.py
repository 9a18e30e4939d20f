"""Models that are `fx.GraphModule`s already, traced by the user or extracted by torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import surgery
from surgery.calling import tensors
from surgery.context import state_of
from surgery.copying import share
from surgery.first_calls import _twin


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Conv2d(3, 8, 3), nn.Sequential(Block(8), Block(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def traced() -> nn.Module:
    return fx.symbolic_trace(Net()).eval()


def extracted() -> nn.Module:
    """Two outputs; torchvision's own `__deepcopy__` gives a copy in train mode."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model: nn.Module = extraction.create_feature_extractor(Net(), {"layers.0": "first", "head": "logits"})
    return model.eval()


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return bool(ours) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("make", [traced, extracted])
def test_gates_in_a_graph_module(make: Any) -> None:
    model, x = make(), torch.randn(4, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        dense = tensors(model(x))
    sites = surgery.find_sites(model, x)
    gated = surgery.insert_gates(model, sites.plan(skip="affine"))
    assert len(sites) == 2

    def outputs(decision: float, mode: Any = "skip") -> list[Tensor]:
        with torch.no_grad(), surgery.force(gated, decision), surgery.execution(gated, mode):
            return tensors(gated(x))

    assert same(outputs(1.0), dense)
    closed = outputs(0.0)
    assert not torch.equal(closed[-1], dense[-1])
    for ours, masked in zip(closed, outputs(0.0, "mask"), strict=True):
        torch.testing.assert_close(ours, masked)
    gated.train()
    gated.eval()  # torchvision's class compiles another graph in each mode
    assert same(outputs(0.0), closed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", [traced, extracted])
@pytest.mark.parametrize("train", [False, True])
def test_a_copy_is_in_the_mode_of_its_original(make: Any, train: bool) -> None:
    model = make().train(train)
    model.get_submodule("stem").train(not train)
    twin = share(model)
    modes = {name: module.training for name, module in twin.named_modules()}
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_first_calls_are_compared_in_the_mode_of_the_model() -> None:
    model = extracted()
    gated = surgery.insert_gates(model, surgery.find_sites(model, torch.randn(2, 3, 8, 8)).plan())
    assert not any(module.training for module in _twin(gated, state_of(gated)).modules())


def test_a_module_that_lies_in_two_keeps_its_mode() -> None:
    model = nn.Module()
    features = extracted()
    model.add_module("first", features.get_submodule("layers.1.bn1").train())
    model.add_module("features", features)
    twin = share(model)
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
    assert twin.get_submodule("first").training and not twin.get_submodule("features").training


def test_frozen_programs_know_no_mode() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.jit.freeze(torch.jit.script(nn.Conv2d(3, 8, 3).eval()))
            self.layers = nn.Sequential(Block(8), Block(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(self.stem(x))

    model, x = Frozen().eval(), torch.randn(2, 3, 8, 8)
    assert len(surgery.find_sites(model, x)) == 2
