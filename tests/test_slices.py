"""Active samples as slices: the same numbers as gathering, and when it is worth it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import path_of

import surgery
from surgery import executing, slices
from surgery.slices import Slices, cheaper_than_gathering, may_slice, slices_of


def test_runs_of_equal_decisions() -> None:
    assert slices_of(torch.tensor([True, True, False, True])) == Slices((slice(0, 2), slice(3, 4)), (slice(2, 3),))
    assert slices_of(torch.tensor([False, False])) == Slices((), (slice(0, 2),))
    assert slices_of(torch.arange(2 * slices.MOST) % 2 == 0) is None


def test_cost_of_calling_against_cost_of_copying() -> None:
    runs = slices_of(torch.tensor([True, False, True, True]))
    assert runs is not None
    small, large = torch.empty(4, 10), torch.empty(4, slices.CALL)
    assert not cheaper_than_gathering(runs, small, parameters=100)
    assert cheaper_than_gathering(runs, large, parameters=100)
    assert not cheaper_than_gathering(runs, large, parameters=3 * slices.CALL)  # the weights are read once more
    one = slices_of(torch.tensor([False, True, True]))
    assert one is not None and cheaper_than_gathering(one, small, parameters=10**9)  # one slice needs no copy at all


def test_slices_are_for_the_cpu_without_gradients() -> None:
    x = torch.zeros(2, 3)
    assert not may_slice(x, x)
    with torch.no_grad():
        assert may_slice(x, x) and may_slice(x, None)
        assert not may_slice(x, torch.zeros(2, 1))
        assert not may_slice(x.to("meta"), None)


@pytest.mark.parametrize("skip", ["identity", "affine", "linear"])
@pytest.mark.parametrize("alone", [False, True])
def test_merging_is_the_masked_sum(skip: str, alone: bool) -> None:
    decisions = torch.tensor([True, False, False, True, True])
    residual, branch = torch.randn(5, 4, 6, 6), torch.randn(5, 4, 6, 6)
    path = path_of(skip, 4, "NCHW")
    for parameter in path.parameters():
        nn.init.normal_(parameter)
    left = None if alone else torch.randn(5, 4, 6, 6)
    with torch.no_grad():
        runs = slices_of(decisions)
        assert runs is not None
        found = runs.merge(left, residual, [branch[run] for run in runs.active], path)
        expected = torch.where(decisions.view(-1, 1, 1, 1), branch, path(residual))
        expected = expected if left is None else left + expected
    torch.testing.assert_close(found, expected)


class Block(nn.Module):
    """Adds in place, as ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv(x)
        x += shortcut
        return x.relu_()


def calls_of(module: nn.Module, run: Callable[[], object]) -> list[int]:
    """Batch sizes with which a module is called."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("sliced", [False, True])
@torch.no_grad()
def test_slicing_and_gathering_give_what_masking_gives(monkeypatch: pytest.MonkeyPatch, sliced: bool) -> None:
    monkeypatch.setattr(executing, "cheaper_than_gathering", lambda *_: sliced)
    model = nn.Sequential(Block(), Block())
    x = torch.randn(5, 3, 8, 8)
    gated = surgery.insert_gates(model, surgery.find_sites(model, x))
    names = [site.name for site in surgery.find_sites(model, x)]
    decisions = {name: torch.tensor([True, False, True, True, False]) for name in names}
    with surgery.force(gated, decisions):
        found = gated(x)
        sizes = calls_of(gated[0].conv, lambda: gated(x))  # type: ignore[index]
        with surgery.execution(gated, "mask"):
            torch.testing.assert_close(found, gated(x))
    assert sizes == ([1, 2] if sliced else [3])


@torch.no_grad()
def test_a_sum_that_was_written_in_place_still_is() -> None:
    model = nn.Sequential(Block())
    x = torch.randn(2, 3, 8, 8)
    gated = surgery.insert_gates(model, surgery.find_sites(model, x))
    outputs: list[Tensor] = []
    handle = gated[0].conv.register_forward_hook(lambda _, __, output: outputs.append(output))  # type: ignore[index]
    before = x.clone()
    with surgery.force(gated, 1.0):
        result = gated(x)
    handle.remove()
    assert result.data_ptr() == outputs[0].data_ptr()  # no new memory for the sum
    assert torch.equal(x, before) and torch.equal(result, model(x))
