"""Static policies: their order against one found by hand, and skip paths trained for all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import (
    Residual,
    Sometimes,
    Stack,
    assert_same,
    convolution,
    frozen,
    gate_all,
    gates,
    interrupt_after_update,
    mlp,
)

import surgery
from surgery import cutting, nesting, orders
from surgery.budgets import static_policy
from surgery.calling import Batch
from surgery.context import handled, state_of
from surgery.cutting import cut_order
from surgery.errors import CheckpointError, SurgeryError
from surgery.fitting import fit_skip_paths
from surgery.nesting import NestedGates, train_skip_paths, trained_levels
from surgery.options import Options
from surgery.policies import static_cost


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.randn(32, 4, 6, 6) for _ in range(4)]


@pytest.fixture
def network() -> nn.Module:
    return Stack(*(convolution(4) for _ in range(4)), head=nn.Linear(4, 3), pool=True).eval()


def scaled(size: float, hidden: int = 16) -> nn.Module:
    branch = mlp(4, hidden)
    with torch.no_grad():
        branch[3].weight.mul_(size)
        branch[3].bias.mul_(size)
    return branch


def test_what_matters_least_is_cut_first() -> None:
    model = Stack(scaled(1.0), scaled(0.01), scaled(10.0), scaled(0.1), head=nn.Linear(4, 3))
    gated = gate_all(model, torch.randn(2, 4), skip="identity")
    names = state_of(gated).names
    assert cut_order(gated, [torch.randn(64, 4)]) == tuple(names[i] for i in (1, 3, 0, 2)) == state_of(gated).order


class Constant(nn.Module):
    """A branch that adds the same to every row."""

    def __init__(self, *value: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_rises_count_from_what_is_cut_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "_TRIES", 1)  # so that a site is cut by an old value, without being run again
    branches = ((1.0, 0, 0, 0), (1.1, 0, 0, 0), (0, 2**0.5, 0, 0), (0, 0, 3**0.5, 0))
    gated = gate_all(Stack(*(Constant(*one) for one in branches)), torch.randn(2, 4), skip="identity")
    state_of(gated).outputs = "values"
    names = state_of(gated).names
    # squared errors alone 1, 1.21, 2, 3; after the first cut the second brings 2.1^2 - 1 = 3.41, which is more than 3
    assert cut_order(gated, [torch.randn(64, 4)]) == tuple(names[i] for i in (0, 2, 3, 1))


def test_orders_are_compared_at_costs_between_two_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "COSTS", (0.6,))
    branches = (Constant(1, 0, 0, 0), Constant(0, 2, 0, 0), Constant(0, 0, 3, 0), Constant(0, 0, 0, 4))
    gated = gate_all(Stack(*branches), torch.randn(2, 4), skip="identity")
    state, x = state_of(gated), torch.randn(64, 4)
    state.outputs, state.order = "values", state.names
    scale = float((x + torch.tensor([1.0, 2.0, 3.0, 4.0])).square().mean())
    two, three = (1 + 4) / 4 / scale, 1 / 4 / scale  # with two sites kept, at the cost 0.5, and with three, at 0.75
    assert orders._distance(gated, [x]) == pytest.approx(math.log(0.6 * two + 0.4 * three), rel=1e-4)


@pytest.mark.parametrize("large_first", [False, True])
def test_equal_harm_is_cut_where_it_saves_more(large_first: bool) -> None:
    small, large = scaled(0.1, 16), mlp(4, 64)
    with torch.no_grad():  # the same function, with 48 units that do nothing
        for index in (1, 3):
            large[index].weight.zero_()
        large[1].weight[:16], large[1].bias[:16] = small[1].weight, small[1].bias
        large[3].weight[:, :16], large[3].bias[:] = small[3].weight, small[3].bias
    branches = (large, small) if large_first else (small, large)
    gated = gate_all(Stack(*branches, head=nn.Linear(4, 3)), torch.randn(2, 4), skip="identity")
    names = state_of(gated).names
    assert cut_order(gated, [torch.randn(64, 4)]) == (names if large_first else names[::-1])


def test_of_several_orders_the_best_is_kept_with_its_skip_paths(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    images = [size * torch.randn(32, 4, 6, 6) for size in (0.2, 1.0, 5.0, 1.0)]
    gated = gate_all(network, images[0][:2], skip="linear")
    fit_skip_paths(gated, images)
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    rounds: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    judged = orders._distance

    def judge(gated: nn.Module, held: list[Tensor]) -> float:
        rounds.append((state_of(gated).order, {name: value.clone() for name, value in gated.state_dict().items()}))
        return (2.0, 1.0, 3.0)[len(rounds) - 1]

    monkeypatch.setattr(orders, "_distance", judge)
    assert orders.settle_order(gated, images, images[:1], rounds=3, samples=32) == [2.0, 1.0, 3.0]
    assert state_of(gated).order == rounds[1][0]
    assert_same(gated.state_dict(), rounds[1][1])
    assert rounds[0][0] != rounds[1][0]

    gated.load_state_dict(before)  # the second round alone: its samples come first, and it starts from the same paths
    cut_order(gated, [*images[1:], images[0]], samples=32)
    fit_skip_paths(gated, images, decisions="nested")
    assert state_of(gated).order == rounds[1][0]
    assert_same(gated.state_dict(), rounds[1][1])
    assert judged(gated, images) < 0  # a log of a small divergence
    with torch.no_grad():
        for _, gate in surgery.gates.iter_gates(gated):
            gate.skip_path.weight.fill_(3.0)
    assert judged(gated, images) > 0


@pytest.mark.parametrize("tune, rounds", [("oneshot", 1), ("train", 3)])
def test_convert_compares_orders_where_it_trains(
    network: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch, tune: Any, rounds: int
) -> None:
    measured: list[tuple[str, ...]] = []

    def watched(*args: Any, **kwargs: Any) -> tuple[str, ...]:
        measured.append(cut_order(*args, **kwargs))
        return measured[-1]

    monkeypatch.setattr(orders, "cut_order", watched)
    gated = surgery.convert(network, 0.8, data=images, tune=tune, options=Options(steps=2), samples=64)
    assert len(measured) == rounds and state_of(gated).order in measured


def test_static_policies_are_nested_in_the_order(network: nn.Module, images: list[Tensor]) -> None:
    gated = surgery.convert(network, 0.8, data=images, options=Options(steps=2), samples=64)
    state = state_of(gated)
    assert sorted(state.order) == sorted(state.names)
    sizes = set()
    for budget in (0.7, 0.8, 0.9):
        surgery.set_budget(gated, budget)
        kept = {name for name, is_open in state.static.items() if is_open}
        assert kept == set(state.order[len(state.order) - len(kept) :])
        assert static_cost(state.costs, tuple(kept)) <= budget
        assert kept == set(static_policy(state.costs, state.ranks({}), budget))
        sizes.add(len(kept))
    assert len(sizes) > 1


def test_rows_of_one_batch_run_as_they_would_alone(network: nn.Module) -> None:
    x = torch.randn(6, 4, 6, 6)
    gated = gate_all(network, x[:2], skip="depthwise")
    for gate in gates(gated):
        for parameter in gate.skip_path.parameters():
            nn.init.normal_(parameter, std=0.3)
    names = state_of(gated).names
    skipped = dict(zip(names, (6, 0, 2, 5), strict=True))
    with torch.no_grad():
        with handled(gated, NestedGates(skipped)):
            together = gated(x)
        with surgery.force(gated, {name: torch.arange(6) >= count for name, count in skipped.items()}):
            expected = gated(x)
    torch.testing.assert_close(together, expected)


def test_training_brings_static_policies_nearer(network: nn.Module, images: list[Tensor]) -> None:
    gated = gate_all(network, images[0][:2], skip="depthwise")
    cut_order(gated, images)
    backbone = {n: v for n, v in frozen(gated).items() if "surgery_gates" not in n}
    routers = {n: v for n, v in frozen(gated).items() if "router" in n}
    losses = train_skip_paths(gated, images, options=Options(steps=60), validation=images)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert_same(frozen(gated), {**backbone, **routers})


def test_nested_cuts_go_by_the_seed(network: nn.Module, images: list[Tensor]) -> None:
    gated, found = gate_all(network, images[0][:2], skip="linear"), []
    cut_order(gated, images)
    for seed in (0, 0, 1):
        fit_skip_paths(gated, images, decisions="nested", seed=seed)
        found.append(torch.cat([value.flatten() for value in skip_paths(gated).values()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_every_sample_gets_every_depth(
    network: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rows of a batch get the deepest cuts, so which ones these are changes from step to step."""
    gated, first = gate_all(network, images[0][:2], skip="depthwise"), []
    cut_order(gated, images)
    whole = nesting._loss

    def noted(gated: nn.Module, batch: Batch, *more: Any) -> Tensor:
        rows = batch.tensors[0]
        assert torch.equal(rows.flatten(1).sort(0).values, images[0].flatten(1).sort(0).values)
        first.append(next(i for i, image in enumerate(images[0]) if torch.equal(image, rows[0])))
        return whole(gated, batch, *more)

    monkeypatch.setattr(nesting, "_loss", noted)
    train_skip_paths(gated, images[:1], options=Options(steps=12))
    assert len(first) == 12 and len(set(first)) > 6


def test_training_that_makes_static_policies_worse_is_undone(network: nn.Module, images: list[Tensor]) -> None:
    gated = gate_all(network, images[0][:2], skip="depthwise")
    fit_skip_paths(gated, images)
    cut_order(gated, images)
    before = frozen(gated)
    train_skip_paths(gated, images, options=Options(steps=2, nested_rate=100.0), validation=images)
    assert_same(frozen(gated), before)


def test_levels_cover_the_trained_range(network: nn.Module, images: list[Tensor]) -> None:
    gated = gate_all(network, images[0][:2], skip="identity")
    state = state_of(gated)
    state.order = state.names
    costs = [static_cost(state.costs, state.order[count:]) for count in range(5)]
    assert trained_levels(gated) == [count for count in range(1, 5) if costs[count] >= 0.42]
    assert trained_levels(gated, 0.1) == [count for count in range(1, 5) if costs[count] >= 0.07]


@pytest.mark.parametrize(
    ("more", "lowest"),
    [
        ({}, 0.45),
        ({"budget": 0.6}, 0.45),
        ({"budget": 0.3}, 0.3),
        ({"options": Options(steps=1, budgets=(0.2, 0.9))}, 0.2),
    ],
)
def test_cuts_go_down_to_the_smallest_budget(
    more: dict[str, Any], lowest: float, network: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, asked = gate_all(network, images[0][:2], skip="depthwise"), []
    cut_order(gated, images)
    monkeypatch.setattr(nesting, "trained_levels", lambda gated, lowest: asked.append(lowest) or [1])
    train_skip_paths(gated, images, **{"options": Options(steps=1), **more})
    assert asked == [lowest]


def test_batches_in_which_nothing_that_is_cut_runs() -> None:
    data: list[dict[str, Tensor]] = [{"x": torch.randn(4, 8)} for _ in range(8)]
    data += [{"x": torch.randn(4, 8), "more": torch.randn(4, 8)} for _ in range(8)]
    gated = gate_all(Sometimes(8).eval(), data[-1], granularity="sample", skip="affine")
    state_of(gated).order = ["sometimes", "always"]
    losses = train_skip_paths(gated, data, options=Options(epochs=1))
    assert len(losses) == 16 and all(map(math.isfinite, losses))


def test_an_order_comes_first() -> None:
    gated = gate_all(nn.Sequential(Residual(nn.Linear(4, 4))), torch.randn(2, 4), skip="linear")
    with pytest.raises(SurgeryError, match="cut_order"):
        train_skip_paths(gated, [torch.randn(8, 4)])


def skip_paths(gated: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in frozen(gated).items() if "skip_path" in name}


def test_interrupted_training_goes_on_as_if_it_had_not_been(
    network: nn.Module, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> nn.Module:
        gated = gate_all(network, images[0], skip="affine")
        fit_skip_paths(gated, images)
        cut_order(gated, images)
        return gated

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    options, whole, parts = Options(steps=6), fresh(), fresh()
    losses = train_skip_paths(whole, images, options=options, validation=images)
    with pytest.raises(KeyboardInterrupt):
        train_skip_paths(parts, images, options=options, validation=images, output_dir=tmp_path, progress=interrupt)
    interrupt_after_update(monkeypatch, step=2)  # the fifth: its parameters are new, the rest of its state is not
    with pytest.raises(KeyboardInterrupt):
        train_skip_paths(fresh(), images, options=options, validation=images, output_dir=tmp_path, resume=True)
    monkeypatch.undo()
    again = fresh()
    assert losses == train_skip_paths(
        again, images, options=options, validation=images, output_dir=tmp_path, resume=True
    )
    assert_same(skip_paths(again), skip_paths(whole))
    with pytest.raises(CheckpointError, match="over 6 steps"):
        train_skip_paths(fresh(), images, options=Options(steps=7), output_dir=tmp_path, resume=True)
    for change, seed, message in (
        ({"nested_rate": 1e-3}, 0, "nested_rate=0.003, this one has 0.001"),
        ({}, 1, "seed=0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train_skip_paths(
                fresh(), images, options=Options(steps=6, **change), seed=seed, output_dir=tmp_path, resume=True
            )


def test_an_order_is_measured_on_the_first_samples_in_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = gate_all(Stack(mlp(4), mlp(4), head=nn.Linear(4, 3)), torch.randn(2, 5, 4), granularity="sample")
    rows = torch.randn(20, 5, 4)
    sizes: list[tuple[int, ...]] = []
    watched = cutting.run
    monkeypatch.setattr(
        cutting, "run", lambda gated, batch: (sizes.append(batch.args[0].shape), watched(gated, batch))[1]
    )
    together = cut_order(gated, [rows], samples=12)
    assert set(sizes) == {(12, 5, 4)}
    sizes.clear()
    assert cut_order(gated, [rows[:8, :], rows[8:, :]], samples=12) == together
    assert set(sizes) == {(8, 5, 4), (4, 5, 4)}
