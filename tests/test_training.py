"""Training of routers and skip paths: what it changes, what it holds, and how it goes on."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from subjects import subject
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from toys import (
    Divided,
    Masked,
    Stack,
    Unsized,
    assert_same,
    frozen,
    gate_all,
    gates,
    interrupt_after_update,
    launched,
    mlp,
)

import surgery
from surgery.calibration import calibrate
from surgery.choosing import Snapshot, keep_the_better
from surgery.context import state_of
from surgery.errors import BudgetError, CheckpointError, DataError, SurgeryError
from surgery.fitting import fit_skip_paths
from surgery.held_out import HeldOut
from surgery.options import Options
from surgery.pacing import Pace
from surgery.regression import regress_routers
from surgery.resuming import CHECKPOINT
from surgery.straight_through import watched_sites
from surgery.training import History, train_routers, trainable

C = 8
Trained = tuple[dict[str, Tensor], History]


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [(torch.randn(32, C), torch.randint(4, (32,))) for _ in range(10)]


@pytest.fixture(scope="module")
def fitted(data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Three blocks, fitted and calibrated at 0.8; tests train copies."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stack(mlp(C), mlp(C), mlp(C), head=nn.Linear(C, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    gated = gate_all(model, data[0][0][:2])
    fit_skip_paths(gated, data)
    regress_routers(gated, data, samples=64)
    calibrate(gated, data, 0.8, grid=())
    return gated


@pytest.fixture
def train(fitted: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Callable[..., Trained]:
    """Trains a copy; gives its trainable parameters and the history."""

    def run(batches: Any = data, *, budget: float = 0.6, seed: int = 0, **options: Any) -> Trained:
        gated = copy.deepcopy(fitted)
        names = ("output_dir", "resume", "progress", "validation")
        extra = {name: options.pop(name) for name in names if name in options}
        history = train_routers(gated, batches, budget=budget, seed=seed, options=Options(**options), **extra)
        return {name: p.detach().clone() for name, p in trainable(gated).items()}, history

    return run


@pytest.mark.parametrize("name", ["timm/test_resnet", "transformers/bert"])
def test_no_backbone_tensor_changes(name: str) -> None:
    one = subject(name)
    gated = copy.deepcopy(one.gated)
    before, original = frozen(gated), frozen(one.model)
    train_routers(gated, [one.example] * 3, budget=0.5, options=Options(steps=3, router_rate=0.1, skip_rate=0.1))
    ours = trainable(gated)
    assert_same(frozen(gated), {n: v for n, v in before.items() if n not in ours})
    assert_same(frozen(one.model), original)
    kinds = {n.rpartition(".")[0].rpartition(".")[2] for n, p in ours.items() if not torch.equal(p, before[n])}
    assert {"down", "up", "skip_path"} <= kinds
    assert all(p.grad is None for n, p in gated.named_parameters() if n not in ours)
    assert not gated.training and not any(module.training for module in gated.modules())


def test_skip_rate_zero_freezes_skip_paths(train: Callable[..., Trained], fitted: nn.Module) -> None:
    after, _ = train(steps=3, skip_rate=0.0)
    before = trainable(fitted)
    assert all(torch.equal(after[n], p) for n, p in before.items() if "skip_path" in n)
    assert any(not torch.equal(after[n], p) for n, p in before.items() if "router" in n)


def test_rates_fall_with_the_width(
    train: Callable[..., Trained], fitted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trainable(fitted)

    def moved() -> dict[str, float]:
        after, _ = train(steps=1)  # Adam's first step moves every weight with a gradient by its rate
        return {name: float((after[name] - p.detach()).abs().max()) for name, p in before.items()}

    narrow = moved()
    monkeypatch.setattr("surgery.rates.WIDTH", C / 4)
    wide = moved()
    assert sum(value > 0 for value in narrow.values()) > len(narrow) / 2
    for name, value in narrow.items():
        assert wide[name] == pytest.approx(value / 4, rel=0.05)


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_mean_cost_approaches_the_budget(train: Callable[..., Trained], budget: float) -> None:
    _, history = train(budget=budget, steps=120, router_rate=1e-2, budgets=(budget, budget))
    columns = history.columns()
    assert set(columns["target"]) == {budget}
    assert sum(columns["cost"][-30:]) / 30 == pytest.approx(budget, abs=0.05)
    expected = columns["threshold"][0]
    for threshold, cost in zip(columns["threshold"], columns["cost"], strict=True):
        assert threshold == pytest.approx(expected)
        expected += cost - budget


def test_every_step_draws_a_budget_and_meets_it(train: Callable[..., Trained]) -> None:
    _, history = train(steps=200, router_rate=1e-3, budgets=(0.5, 0.9), anneal=0.5)
    columns = history.columns()
    early, late = columns["target"][:20], columns["target"][100:]
    assert min(early) > 0.8 and 0.5 <= min(late) < 0.55 and 0.85 < max(late) <= 0.9
    errors = [cost - target for cost, target in zip(columns["cost"], columns["target"], strict=True)]
    assert abs(sum(errors[100:])) / 100 < 0.02
    assert sum(map(abs, errors[100:])) / 100 < 0.08


def test_thresholds_fall_with_the_budget_whatever_a_step_cost() -> None:
    pace = Pace(0.5, 0.9, 0.0, 0)
    pace.start([(0.4, 1.0), (1.0, -1.0)])
    for target, cost in ((0.52, 0.1), (0.7, 1.0), (0.88, 0.9), (0.61, 0.2), (0.79, 1.0)):
        before = pace.threshold(target)
        pace.correct(target, cost)
        assert cost > target or pace.threshold(target) < before
        assert all(low >= high for low, high in itertools.pairwise(pace.thresholds)), (target, cost)


def test_streams_are_not_compared_at_padding() -> None:
    mask = torch.arange(6) < torch.tensor([[6], [4], [2], [5]])
    x = torch.randn(4, 6, C)
    batches = [
        {"inputs_embeds": torch.where(mask[..., None], x, padding), "attention_mask": mask.long()}
        for padding in (x, 10 * torch.randn(4, 6, C))
    ]
    gated = gate_all(Masked(mlp(C), mlp(C), mlp(C)), batches[0])
    options = Options(steps=1, stream_weight=1.0)
    one, other = (
        train_routers(copy.deepcopy(gated), [batch], budget=0.7, options=options).rows[0]["stream"] for batch in batches
    )
    assert one > 0 and one == pytest.approx(other, rel=1e-5)


def test_opening_everywhere_neither_helps_nor_harms(fitted: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """The gradients of the loss and of the cost, at the price of the step, cancel over all scores."""
    gated = copy.deepcopy(fitted)
    biases = [gate.router.up.bias for gate in gates(gated)]
    before = [float(bias.detach()) for bias in biases]
    history = train_routers(gated, data, budget=0.6, options=Options(steps=1, noise=0.0, budgets=(0.6, 0.6)))
    moved = [float(bias.detach()) - old for bias, old in zip(biases, before, strict=True)]
    assert history.rows[0]["price"] > 0
    assert min(moved) < 0 < max(moved)  # one site is opened at the cost of another


def test_best_weights_on_held_out_data_are_kept(
    train: Callable[..., Trained], fitted: nn.Module, data: list[tuple[Tensor, Tensor]]
) -> None:
    """A ruinous learning rate leaves the model as it was."""
    after, history = train(steps=10, skip_rate=10.0, validation=data[:3])
    assert_same(after, {name: p.detach() for name, p in trainable(fitted).items()})
    held = history.columns()["held_divergence"]
    assert [i for i, value in enumerate(held) if value == value] == [1, 3, 5, 7, 9]
    better, history = train(steps=200, skip_rate=1e-2, validation=data[:3])
    assert any(not torch.equal(better[name], p) for name, p in trainable(fitted).items())
    last, _ = train(steps=200, skip_rate=1e-2)
    looks = [value for value in history.columns()["held_score"] if value == value]
    assert (looks[-1] == min(looks)) == all(torch.equal(better[name], p) for name, p in last.items())


def test_weights_are_compared_at_the_cost_of_the_budget(
    train: Callable[..., Trained], data: list[tuple[Tensor, Tensor]]
) -> None:
    """Decisions with noise cost more than those without, so that the training's thresholds are not used to compare."""
    _, history = train(steps=40, budget=0.7, noise=2.0, validation=data)
    costs = [cost for cost in history.columns()["held_cost"] if cost == cost]
    assert costs == [pytest.approx(0.7, abs=0.02)] * 5


def test_weights_are_compared_at_all_budgets_alike(fitted: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    gated = copy.deepcopy(fitted)
    both, high, low = (HeldOut(gated, data[:3], budgets) for budgets in ([0.8, 0.6], [0.8], [0.6]))
    parameters = trainable(gated)
    assert [held.look(parameters)["held_score"] for held in (both, high, low)] == [1.0] * 3
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "skip_path" in name:
                parameter.mul_(0.5)
    scores = [held.look(parameters)["held_score"] for held in (both, high, low)]
    assert scores[1] != pytest.approx(scores[2])
    assert scores[0] == pytest.approx((scores[1] + scores[2]) / 2)


def test_the_threshold_of_the_best_look_is_kept(fitted: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    held, found = HeldOut(fitted, [torch.zeros(1)], [0.6]), iter([(-1.0, 1.0), (-2.0, 0.5), (-3.0, 0.8)])
    held.dense = []

    def at(self: HeldOut, index: int) -> tuple[float, float]:
        self.last[index], distance = next(found)
        return distance, 0.6

    monkeypatch.setattr(HeldOut, "_at", at)
    assert [held.look({})["held_score"] for _ in range(3)] == [1.0, 0.5, 0.8]
    assert (held.threshold, held.score) == (-2.0, 0.5)


def test_training_looks_at_its_smallest_budget_too(
    train: Callable[..., Trained], data: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    look = HeldOut.look

    def noted(self: HeldOut, parameters: Any) -> dict[str, float]:
        seen.append(list(self.budgets))
        return look(self, parameters)

    monkeypatch.setattr(HeldOut, "look", noted)
    train(steps=5, budget=0.8, budgets=(0.6, 0.9), validation=data[:3])
    train(steps=5, budget=0.8, budgets=(0.8, 0.8), validation=data[:3])
    assert seen == [[0.8, 0.6]] * 6 + [[0.8]] * 6


def test_realised_cost_is_what_training_saw(fitted: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """Without noise the cost of the first step is the cost of the first batch as it would run."""
    gated = copy.deepcopy(fitted)
    with torch.no_grad(), surgery.execution(gated, "skip"), surgery.tape(gated) as events:
        gated(data[0][0])
    expected = state_of(gated).costs.cost({event.site: event.rate() for event in events})
    options = Options(steps=1, noise=0.0, budgets=(0.8, 0.8))
    history = train_routers(gated, data, budget=0.8, options=options)
    assert history.columns()["threshold"] == [pytest.approx(state_of(fitted).threshold)]
    assert history.columns()["cost"] == [pytest.approx(expected)]


def test_training_reduces_divergence(train: Callable[..., Trained]) -> None:
    _, history = train(budget=0.8, steps=200, noise=0.0, skip_rate=1e-2, budgets=(0.8, 0.8))
    distance = history.columns()["divergence"]
    assert sum(distance[-20:]) < 0.9 * sum(distance[:20])


def test_labels_are_used_only_where_asked_for(train: Callable[..., Trained], data: list[tuple[Tensor, Tensor]]) -> None:
    free, history = train(steps=4)
    unlabelled, _ = train([x for x, _ in data], steps=4)
    assert_same(free, unlabelled)
    columns = history.columns()
    for loss, distance, stream in zip(columns["loss"], columns["divergence"], columns["stream"], strict=True):
        assert loss == pytest.approx(distance + 1.0 * stream) and stream > 0
    weighted, labelled = train(steps=4, label_weight=0.5)
    assert any(not torch.equal(weighted[n], free[n]) for n in free)
    entropy = (labelled.rows[0]["loss"] - labelled.rows[0]["divergence"]) / 0.5
    assert 1.0 < entropy < 5.0  # of random labels over four classes: at least log 4 on average
    same, _ = train([x for x, _ in data], steps=4, label_weight=0.5)
    assert_same(same, free)
    small, _ = train([(x, y.to(torch.int32)) for x, y in data], steps=4, label_weight=0.5)
    assert_same(small, weighted)


def test_accumulation_is_a_larger_batch(train: Callable[..., Trained], data: list[tuple[Tensor, Tensor]]) -> None:
    halves = [half for x, _ in data for half in x.split(16)]
    whole, one = train(steps=12, noise=0.0)
    parts, two = train(halves, steps=12, noise=0.0, accumulate=2)
    assert one.columns()["cost"] == pytest.approx(two.columns()["cost"])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4)
    single, _ = train(halves, steps=12, noise=0.0)
    assert any(not torch.allclose(single[n], v, atol=1e-4) for n, v in whole.items())


def test_epochs_and_accumulation_count_steps(train: Callable[..., Trained]) -> None:
    assert len(train(epochs=2)[1].rows) == 20
    assert len(train(epochs=1, accumulate=4)[1].rows) == 2
    assert len(train(epochs=1, steps=3)[1].rows) == 3


def test_it_goes_on_with_the_same_options_only(train: Callable[..., Trained], tmp_path: Path) -> None:
    first, _ = train(steps=2, output_dir=tmp_path)
    again, _ = train(steps=2, output_dir=tmp_path, resume=True, save_every=7)  # which changes no weight
    assert_same(again, first)
    for change, message in (
        ({"noise": 0.1}, r"noise=0\.3, this one has 0\.1"),
        ({"budgets": [0.5, 0.9]}, r"budgets=None, this one has \(0\.5, 0\.9\)"),
        ({"accumulate": 2}, "accumulate=1"),
        ({"budget": 0.7}, r"budget=0\.6"),
        ({"seed": 1}, "seed=0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(**{"steps": 2, **change}, output_dir=tmp_path, resume=True)


def test_interrupted_and_resumed_is_uninterrupted(train: Callable[..., Trained], tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 14, "router_rate": 1e-2, "save_every": 4}
    expected, history = train(**options)

    def interrupt(_: str, done: int, total: int | None) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(**options, output_dir=tmp_path, progress=interrupt)
    seen: list[int] = []
    resumed, again = train(
        **options, output_dir=tmp_path, resume=True, progress=lambda _, done, total: seen.append(done)
    )
    assert seen == [11, 12, 13, 14]
    assert again.rows == history.rows
    assert_same(resumed, expected)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]  # no half-written files


def test_a_checkpoint_with_other_rates_by_width_is_refused(train: Callable[..., Trained], tmp_path: Path) -> None:
    train(steps=2, output_dir=tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    saved["optimiser"]["param_groups"].pop()
    torch.save(saved, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="of another version"):
        train(steps=2, output_dir=tmp_path, resume=True)


def test_interrupted_in_the_middle_of_a_step(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 6, "router_rate": 1e-2}
    expected, history = train(**options)
    interrupt_after_update(monkeypatch, step=4)
    with pytest.raises(KeyboardInterrupt):
        train(**options, output_dir=tmp_path)
    monkeypatch.undo()
    resumed, again = train(**options, output_dir=tmp_path, resume=True)
    assert again.rows == history.rows
    assert_same(resumed, expected)


def test_killed_and_resumed_goes_on_from_the_last_save(train: Callable[..., Trained], tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 10, "save_every": 4}
    expected, _ = train(**options)

    def crash(_: str, done: int, total: int | None) -> None:
        if done == 7:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(**options, output_dir=tmp_path, progress=crash)
    seen: list[int] = []
    resumed, _ = train(**options, output_dir=tmp_path, resume=True, progress=lambda _, done, total: seen.append(done))
    assert seen == [5, 6, 7, 8, 9, 10]
    assert_same(resumed, expected)


def test_nothing_to_resume(train: Callable[..., Trained], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(steps=2, resume=True, output_dir=tmp_path)
    with pytest.raises(CheckpointError, match="no output directory"):
        train(steps=2, resume=True)


def test_resume_of_something_else(train: Callable[..., Trained], tmp_path: Path, data: Any) -> None:
    train(steps=2, output_dir=tmp_path)
    fewer = gate_all(Stack(mlp(C), head=nn.Linear(C, 4)), torch.randn(2, C))
    with pytest.raises(CheckpointError, match="another model.*blocks"):
        train_routers(fewer, data, budget=0.5, options=Options(steps=2), output_dir=tmp_path, resume=True)
    wider = gate_all(Stack(mlp(2 * C), mlp(2 * C), mlp(2 * C), head=nn.Linear(2 * C, 4)), torch.randn(2, 2 * C))
    wide = [torch.randn(4, 2 * C)]
    with pytest.raises(CheckpointError, match="another model.*blocks"):
        train_routers(wider, wide, budget=0.5, options=Options(steps=2), output_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="over 2 steps, this one has 5"):
        train(steps=5, output_dir=tmp_path, resume=True)


def test_resume_of_an_older_version(train: Callable[..., Trained], tmp_path: Path) -> None:
    train(steps=2, output_dir=tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    torch.save({**saved, "best": {"distance": 1.0, "threshold": 0.0, "best": None}}, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="delete it to train from the start"):
        train(steps=2, output_dir=tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "garbage", "cut"])
def test_resume_of_a_damaged_file(train: Callable[..., Trained], tmp_path: Path, content: bytes | None) -> None:
    train(steps=2, output_dir=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(CheckpointError, match="damaged"):
        train(steps=2, output_dir=tmp_path, resume=True)


class Stream(IterableDataset):
    """A dataset without a length."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return iter([torch.randn(C, generator=generator) for _ in range(64)])


@pytest.mark.parametrize("kind", ["loader", "object", "part"])
def test_streams_need_steps(train: Callable[..., Trained], data: Any, kind: str) -> None:
    streams = {
        "loader": DataLoader(Stream(), batch_size=16),
        "object": Unsized(data),
        "part": surgery.splitting.split(Unsized(data), None)[0],  # type: ignore[attr-defined]
    }
    with pytest.raises(DataError, match=r"Options\(steps=1000\)"):
        train(streams[kind])
    assert len(train(streams[kind], steps=9)[1].rows) == 9  # over the end and on from the beginning


def test_bad_arguments(train: Callable[..., Trained]) -> None:
    with pytest.raises(DataError, match="no batch"):
        train([])
    with pytest.raises(DataError, match="no batch"):
        train([], steps=2)
    for budget in (0.0, 1.1, float("nan")):
        with pytest.raises(BudgetError, match=r"\(0, 1\]"):
            train(budget=budget)


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 0},
        {"accumulate": 0},
        {"epochs": 1.5},
        {"noise": -1.0},
        {"temperature": 0.0},
        {"mixed_precision": "fp8"},
        {"budgets": (0.8, 0.2)},
        {"stream_weight": -1.0},
        {"harm_weight": -0.1},
        {"diversity_weight": float("nan")},
    ],
    ids=lambda option: next(iter(option)),
)
def test_bad_options(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(SurgeryError, match=f"Options.{name} must be"):
        Options(**option)


def test_nothing_to_train() -> None:
    gated = gate_all(Stack(mlp(C)), torch.randn(2, C), skip="identity")
    with pytest.raises(SurgeryError, match="nothing to train"):
        train_routers(gated, [torch.randn(8, C)], budget=0.5, options=Options(router_rate=0.0))


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 10])
def test_few_steps(train: Callable[..., Trained], steps: int) -> None:
    after, history = train(steps=steps)
    assert len(history.rows) == steps and all(torch.isfinite(value).all() for value in after.values())


def test_frozen_skip_paths_do_not_weigh_on_routers(fitted: nn.Module, data: Any) -> None:
    gated = copy.deepcopy(fitted)
    options = Options(steps=3, skip_rate=0.0, noise=0.0)
    train_routers(gated, data, budget=0.6, options=options)
    assert all(p.grad is None for p in gated.parameters())
    again = copy.deepcopy(fitted)
    for gate in gates(again):
        for parameter in gate.skip_path.parameters():
            parameter.grad = torch.full_like(parameter, 1e6)  # of an earlier training, say
    train_routers(again, data, budget=0.6, options=options)
    assert_same(frozen(again), frozen(gated))


@pytest.mark.parametrize("training", ["routers", "skip paths", "norms"])
def test_outputs_that_are_no_numbers_spoil_no_weights(data: list[tuple[Tensor, Tensor]], training: str) -> None:
    """The step that they are in changes nothing; the others do."""
    gated = gate_all(Divided(mlp(C), mlp(C), mlp(C), head=nn.Linear(C, 4)), data[0][0][:2])
    fit_skip_paths(gated, data)
    surgery.cut_order(gated, data)
    regress_routers(gated, data, samples=64)
    calibrate(gated, data, 0.8)
    bad = [(data[0][0].clone(), data[0][1]), *data[1:]]
    bad[0][0][0, 0] = 0
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    if training == "routers":
        columns = train_routers(gated, bad, budget=0.6, options=Options(epochs=1)).columns()
        losses = columns["loss"]
        assert all(map(math.isfinite, columns["threshold"]))
    elif training == "skip paths":
        losses = surgery.train_skip_paths(gated, bad, options=Options(epochs=1))
    else:
        losses = surgery.heal(gated, bad, "norms", options=Options(epochs=1))
    assert [math.isfinite(loss) for loss in losses] == [False] + [True] * (len(data) - 1)
    after = gated.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert set(after) != set(before) or any(not torch.equal(after[name], before[name]) for name in before)


def test_weights_that_are_no_numbers_are_not_kept(fitted: nn.Module, data: Any) -> None:
    gated = copy.deepcopy(fitted)
    calibrate(gated, data, 0.6)
    before = Snapshot.of(gated, data)
    for parameter in trainable(gated).values():
        parameter.data.fill_(torch.nan)
    keep_the_better(gated, data, before, 0.6)
    assert all(parameter.isfinite().all() for parameter in trainable(gated).values())


def test_from_a_dense_start() -> None:
    """A model that was never calibrated starts from a threshold of its own."""
    gated = gate_all(Stack(mlp(C), head=nn.Linear(C, 3)), torch.randn(2, C))
    history = train_routers(gated, [torch.randn(8, C)] * 4, budget=1.0, options=Options(epochs=1))
    assert len(history.rows) == 4 and all(torch.isfinite(p).all() for p in trainable(gated).values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(train: Callable[..., Trained], precision: str) -> None:
    """After another precision in the same process, which accelerate refuses."""
    exact, expected = train(steps=5, noise=0.0)
    mixed, history = train(steps=5, noise=0.0, mixed_precision=precision)
    assert all(p.dtype is torch.float32 and torch.isfinite(p).all() for p in mixed.values())
    assert any(not torch.equal(mixed[n], exact[n]) for n in exact)
    assert history.columns()["loss"] == pytest.approx(expected.columns()["loss"], abs=0.05)
    if precision == "fp16":  # gradients are scaled up, and down again before they are clipped
        for name, value in exact.items():
            torch.testing.assert_close(mixed[name], value, atol=2e-4, rtol=1e-3)


def test_gradients_reach_routers_through_the_loss(fitted: nn.Module, data: Any) -> None:
    """With the budget no constraint, routers still learn from distillation alone."""
    gated = copy.deepcopy(fitted)
    before = gates(gated)[0].router.down.weight.clone()
    train_routers(gated, data, budget=1.0, options=Options(steps=2, noise=0.0))
    assert not torch.equal(gates(gated)[0].router.down.weight, before)


def test_tracker_gets_every_row(fitted: nn.Module, data: Any) -> None:
    from accelerate import Accelerator

    rows: list[tuple[dict[str, float], int]] = []
    accelerator = Accelerator(cpu=True)
    accelerator.log = lambda row, step, **_: rows.append((row, step))  # type: ignore[method-assign]
    history = train_routers(copy.deepcopy(fitted), data, budget=0.6, options=Options(steps=3), tracker=accelerator)
    assert rows == list(zip(history.rows, range(3), strict=True))


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    result = launched(two_processes.__file__, str(tmp_path / "trained"))
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"trained.{index}", weights_only=True) for index in range(2))
    assert first.pop("processes") == second.pop("processes") == 2
    assert_same(first, second)
    alone = two_processes.train()
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 12, 27])
def test_sites_whose_streams_are_compared_lie_before_the_last(count: int) -> None:
    names = [str(index) for index in range(count)]
    watched = sorted(map(int, watched_sites(names)))
    assert 1 <= len(watched) <= 5 and watched[-1] < count - 1
