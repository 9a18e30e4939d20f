"""Narrow skip paths: the branch itself with fewer hidden channels, fitted, trained and stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from branch_toys import BRANCHES, MAPS, TOKENS, Bottleneck, C, FeedForward, Gated, H, Inverted, Squared
from torch import nn
from toys import Stack, assert_silent_yet_learns, convolution, gate_all, gates, mlp

import surgery
from surgery import narrowing
from surgery.errors import SurgeryError
from surgery.fitting import fit_skip_paths
from surgery.rates import parameter_groups
from surgery.skip_paths import NarrowSkip


@pytest.mark.parametrize("taps", [1, 9])
def test_the_channels_that_matter_are_kept(taps: int) -> None:
    """Channels 1 and 4 make the output; 3 is twice channel 1, so that one of both is enough."""
    x = torch.randn(400, 5, taps)
    x[:, 3] = 2 * x[:, 1] + 1e-3 * torch.randn(400, taps)
    weight = torch.randn(5, taps, 3)
    weight[[0, 2]] = 0
    wanted = torch.einsum("mht,htc->mc", x, weight)
    assert narrowing.narrowest(x, wanted, 2).tolist() in ([1, 4], [3, 4])
    assert narrowing.narrowest(x, wanted, 5).tolist() == [0, 1, 2, 3, 4]


def test_leaving_one_out_costs_what_solving_again_says() -> None:
    """Of 4 channels the one goes without which the error of a new least-squares problem is smallest."""
    x, wanted = torch.randn(200, 4), torch.randn(200, 2)
    wanted = x @ torch.randn(4, 2) * 0.4 + wanted
    errors = []
    for left in range(4):
        some = torch.cat((x[:, [i for i in range(4) if i != left]], torch.ones(200, 1)), 1)
        errors.append(float((some @ torch.linalg.lstsq(some, wanted).solution - wanted).square().sum()))
    expected = [i for i in range(4) if i != min(range(4), key=errors.__getitem__)]
    assert narrowing.narrowest(x[:, :, None], wanted, 3, ridge=1e-9).tolist() == expected


@pytest.mark.parametrize(
    ("branch", "shape"), [(Inverted, MAPS), (FeedForward, TOKENS), (lambda: Gated("gate first", Squared()), TOKENS)]
)
def test_a_branch_with_spare_channels_loses_nothing(branch: Any, shape: tuple[int, ...]) -> None:
    one = branch()
    last = [m for n, m in one.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in ("packed", "one")][
        -1
    ]
    spare = torch.randperm(H)[: H // 2].sort().values
    with torch.no_grad():
        last.weight[:, spare] = 0
    model = Stack(one)
    data = [torch.randn(64, *shape[1:])]
    gated = gate_all(model, data[0][:2], skip="narrow", width=0.5)
    (gate,) = gates(gated)
    assert isinstance(gate.skip_path, NarrowSkip) and gate.skip_path.width == H // 2
    with surgery.force(gated, 0.0), torch.no_grad():
        torch.testing.assert_close(gated(data[0]), data[0])  # it contributes nothing before it is fitted
    left = fit_skip_paths(gated, data)
    assert left[gate.site.name] < 1e-4
    x = torch.randn(4, *shape[1:])
    with surgery.force(gated, 0.0), torch.no_grad():
        torch.testing.assert_close(gated(x), model(x), rtol=1e-2, atol=1e-2)


def test_a_bottleneck_with_spare_channels_on_both_sides_of_its_middle_loses_nothing() -> None:
    one = Bottleneck(inner=8, hidden=H)
    with torch.no_grad():
        one.body[3].weight[:, torch.randperm(8)[:4]] = 0
        one.body[6].weight[:, torch.randperm(H)[: H // 2]] = 0
    model, data = Stack(one), [torch.randn(64, *MAPS[1:])]
    gated = gate_all(model, data[0][:2], skip="narrow", width=0.5)
    (gate,) = gates(gated)
    path = gate.skip_path
    assert isinstance(path, NarrowSkip) and (path.width, path.inner) == (H // 2, 4)
    assert fit_skip_paths(gated, data)[gate.site.name] < 1e-4
    with surgery.force(gated, 0.0), torch.no_grad():
        torch.testing.assert_close(gated(data[0]), model(data[0]), rtol=1e-2, atol=1e-2)
    narrower = gate_all(Stack(one), data[0][:2], skip="narrow", width=0.25)
    assert 0.01 < fit_skip_paths(narrower, data)[gate.site.name] < 1


def test_a_second_fit_keeps_the_channels_and_what_was_trained() -> None:
    model = Stack(Inverted())
    data = [torch.randn(64, *MAPS[1:])]
    gated = gate_all(model, data[0][:2], skip="narrow")
    path = gates(gated)[0].skip_path
    fit_skip_paths(gated, data)
    with torch.no_grad():
        path.first.mul_(1.1)  # type: ignore[operator]
    before = {name: p.clone() for name, p in path.named_parameters()}
    fit_skip_paths(gated, [torch.randn(64, *MAPS[1:])])
    assert {n for n, p in path.named_parameters() if not torch.equal(p, before[n])} == {"last", "bias"}


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With fewer positions than a fit asks for."""
    return (shape[0], 5, 5) if len(shape) == 3 else shape


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_with_too_few_rows_it_holds_channels_that_can_be_trained(branch: Any, shape: tuple[int, ...]) -> None:
    data = [torch.randn(1, *squeezed(shape))]
    gated = gate_all(Stack(branch()), data[0].repeat(2, *(1,) * len(shape)), skip="narrow", width=0.5)
    (gate,) = gates(gated)
    assert fit_skip_paths(gated, data) == {gate.site.name: 1.0}
    assert_silent_yet_learns(gate.skip_path, torch.randn(8, *shape))


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_what_was_reset_can_be_trained_or_fitted_anew(branch: Any, shape: tuple[int, ...]) -> None:
    data = [torch.randn(64, *shape)]
    gated = gate_all(Stack(branch()), data[0][:2], skip="narrow", width=0.5)
    (gate,) = gates(gated)
    path = gate.skip_path
    assert isinstance(path, NarrowSkip)
    expected = fit_skip_paths(gated, data)
    for fitted in (True, False):
        with torch.no_grad():
            path.first.mul_(0.5)
            path.silence(fitted=fitted)
        assert bool(path.first.any()) == fitted
        assert fit_skip_paths(gated, data) == expected  # with the branch's own channels again
    with torch.no_grad():
        path.silence()
    assert_silent_yet_learns(path, data[0])


def test_more_channels_leave_less() -> None:
    model = Stack(convolution(8), convolution(8)).eval()
    data = [torch.randn(32, 8, 6, 6)]
    left = []
    for width in (0.25, 0.5, 0.9):
        gated = gate_all(model, data[0][:2], skip="narrow", width=width)
        left.append(sum(fit_skip_paths(gated, data).values()))
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_no_gradient_is_lost(branch: Any, shape: tuple[int, ...]) -> None:
    (gate,) = gates(gate_all(Stack(branch()), torch.randn(2, *shape), skip="narrow"))
    path = gate.skip_path
    for parameter in path.parameters():
        nn.init.normal_(parameter)
    path(torch.randn(4, *shape)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in path.parameters())


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_round_trip(tmp_path: Path, branch: Any, shape: tuple[int, ...]) -> None:
    model = Stack(branch(), branch())
    data = [torch.randn(64, *shape)]
    gated = gate_all(model, data[0][:2], skip="narrow")
    assert all(left < 1 for left in fit_skip_paths(gated, data).values())
    surgery.save(gated, tmp_path / "made")
    again = surgery.load(tmp_path / "made", model=model)
    x = torch.randn(3, *shape)
    with surgery.force(gated, 0.0), surgery.force(again, 0.0), torch.no_grad():
        assert torch.equal(gated(x), again(x))
        assert not torch.equal(gated(x), x)


def test_narrow_paths_learn_more_slowly() -> None:
    model = Stack(Inverted(), nn.Conv2d(C, C, 3, padding=1)).eval()
    gated = gate_all(model, torch.randn(2, *MAPS[1:]), skip="narrow")
    narrow, other = gates(gated)
    groups = {g["lr"]: g["params"] for g in parameter_groups((narrow, other), "skip_path", 1.0, by_width=False)}
    assert set(groups) == {0.1, 1.0}
    assert list(map(id, groups[0.1])) == list(map(id, narrow.skip_path.parameters()))
    gated = gate_all(Stack(Gated("gate first")).eval(), torch.randn(2, 5, C), skip="narrow")
    assert [g["lr"] for g in parameter_groups(gates(gated), "skip_path", 1.0, by_width=False)] == [0.5]


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_half_precision_is_folded_and_solved_in_more(branch: Any, shape: tuple[int, ...]) -> None:
    model = Stack(branch()).to(torch.bfloat16)
    data = [torch.randn(64, *shape, dtype=torch.bfloat16)]
    gated = gate_all(model, data[0][:2], skip="narrow", width=0.75)
    (gate,) = gates(gated)
    assert fit_skip_paths(gated, data)[gate.site.name] < 0.5
    assert gate.skip_path.first.dtype == torch.float32
    with surgery.force(gated, 0.0), torch.no_grad():
        assert gated(data[0]).dtype == torch.bfloat16


def test_a_branch_that_was_changed_since_is_refused() -> None:
    gated = gate_all(Stack(mlp(8)), torch.randn(2, 5, 8), skip="narrow")
    (holder,) = (m for m in gated.modules() if isinstance(m, nn.Sequential) and isinstance(m[-2], nn.GELU))
    holder[-2] = nn.ReLU()
    with pytest.raises(SurgeryError, match="no longer has the layers"):
        fit_skip_paths(gated, [torch.randn(32, 5, 8)])
