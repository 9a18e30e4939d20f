"""Budgets: what was asked for is what is spent, on the data that it was calibrated on."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from subjects import assert_equal, enliven
from torch import Tensor, nn
from toys import Once, Set, Stack, convolution, gate_all, gates, mlp

import surgery
from surgery.budgets import budget_range, current_point, set_budget, static_policy
from surgery.calibration import _monotone, calibrate
from surgery.context import Event, override, state_of
from surgery.cost_curves import CostCurve
from surgery.costs import observe
from surgery.errors import BudgetError, DataError, NotConverted, SurgeryError
from surgery.gates import iter_gates
from surgery.state import BudgetPoint, CostModel, LookPoint, SiteCost

Calibrated = tuple[nn.Module, nn.Module, list[Tensor]]


def spent(gated: nn.Module, data: Any) -> float:
    """Mean realised cost as the model is set."""
    state = state_of(gated)
    with surgery.execution(gated, "skip"):
        usage = observe(gated, data, outputs=False)
    return usage.decided.cost(state.costs)


def make_vit() -> tuple[nn.Module, list[Tensor]]:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3
    )
    return model.eval(), [torch.randn(16, 3, 32, 32) for _ in range(4)]


def make_cnn() -> tuple[nn.Module, list[Tensor]]:
    model = Stack(*(convolution(8) for _ in range(4)), head=nn.Linear(8, 5), pool=True)
    return model.eval(), [torch.randn(32, 8, 6, 6) for _ in range(6)]


@pytest.fixture(scope="module", params=[make_vit, make_cnn], ids=["vit", "cnn"])
def calibrated(request: pytest.FixtureRequest) -> Calibrated:
    """Random routers whose scores are spread, calibrated at 0.6; tests change copies."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = request.param()
    gated = enliven(gate_all(model, data[0][:2]))
    point = calibrate(gated, data, 0.6)
    assert point == current_point(state_of(gated)) and point.cost == pytest.approx(0.6)
    return model, gated, data


@pytest.mark.parametrize(("count", "reason"), [(1, "it holds 1 sample only: more data"), (16, "many inputs: use more")])
def test_too_little_data_is_said_with_its_number(count: int, reason: str) -> None:
    model, (first, *_) = make_cnn()
    gated = enliven(gate_all(model, first[:2]))
    with pytest.raises(BudgetError, match=rf"within 0.01 of 0.61 .*{reason}"):
        calibrate(gated, [first[:1].repeat(count, 1, 1, 1)], 0.61, grid=())


def test_a_token_counts_as_much_in_a_short_text_as_in_a_long_one() -> None:
    """Batches of one length each need no mask; thresholds go by tokens, and so do costs."""
    gated = enliven(gate_all(Stack(mlp(8), mlp(8), head=nn.Linear(8, 3), pool=True), torch.randn(2, 5, 8)))
    data = [torch.randn(4, 3, 8), torch.randn(4, 30, 8) + 1]
    state = state_of(gated)
    curve, opened = CostCurve(state.costs), [0, 0]
    with override(state, thresholds=0.0), surgery.execution(gated, "skip"):
        for batch in data:
            with torch.no_grad(), surgery.tape(gated) as events:
                gated(batch)
            curve.collect(events)
            opened = [count + int(event.decisions.sum()) for count, event in zip(opened, events, strict=True)]
        decided = observe(gated, data, outputs=False).decided
    assert list(decided.active_rate.values()) == pytest.approx([count / (4 * 33) for count in opened])
    assert decided.cost(state.costs) == pytest.approx(curve.finish().cost(0.0), abs=1e-7)  # exact at its own threshold


def test_scores_that_are_no_numbers_open_nothing() -> None:
    """Of four samples two are NaN, and closed at every threshold: at -5 half of the one site runs."""
    gated = gate_all(Stack(mlp(8)), torch.randn(2, 8), skip="identity")
    (gate,) = gates(gated)
    scores = torch.tensor([torch.nan, 1.0, torch.nan, 2.0])
    curve = CostCurve(state_of(gated).costs)
    curve.collect([Event(gate.site.name, gate, scores > -5, scores, None)])
    assert curve.finish().cost(-5.0) == pytest.approx(state_of(gated).costs.cost({gate.site.name: 0.5}))


def test_gates_know_their_active_rate_at_every_budget(calibrated: Calibrated) -> None:
    model, gated, data = calibrated
    gated = copy.deepcopy(gated)
    for budget in (0.6, 0.633, 1.0):  # of the table, between its points, dense
        set_budget(gated, budget)
        rates = current_point(state_of(gated)).active_rate
        assert {name: gate.active_rate for name, gate in iter_gates(gated)} == rates
        assert 0 < sum(rates.values()) < len(rates) or budget == 1
    assert {gate.active_rate for gate in gates(gate_all(model, data[0][:2]))} == {None}


@pytest.mark.parametrize("budget", [0.9, 0.37])
def test_realised_cost_is_the_budget(calibrated: Calibrated, budget: float) -> None:
    _, gated, data = calibrated
    gated = copy.deepcopy(gated)
    point = calibrate(gated, data, budget, grid=())
    assert spent(gated, data) == pytest.approx(budget, abs=0.01)
    assert state_of(gated).budget == budget and state_of(gated).threshold == point.threshold
    with surgery.execution(gated, "skip"):
        rates = observe(gated, data).decided.active_rate
    assert rates == pytest.approx(point.active_rate, abs=0.05)


def test_every_budget_in_range_is_met(calibrated: Calibrated) -> None:
    _, gated, data = calibrated
    gated = copy.deepcopy(gated)
    low, high = budget_range(gated)
    closed = state_of(gated).costs.cost(dict.fromkeys(state_of(gated).names, 0.0))
    assert low == pytest.approx(closed) and high == pytest.approx(0.9, abs=0.025)
    budgets = [low + (high - low) * step / 12 for step in range(13)]
    costs = []
    for budget in budgets:
        set_budget(gated, budget)
        costs.append(spent(gated, data))
    assert costs == sorted(costs)
    assert costs == pytest.approx(budgets, abs=0.01)


def test_table_is_monotone(calibrated: Calibrated) -> None:
    _, gated, _ = calibrated
    state = state_of(gated)
    costs, thresholds = [p.cost for p in state.table], [p.threshold for p in state.table]
    assert costs == sorted(costs) and thresholds == sorted(thresholds, reverse=True)
    assert max(b - a for a, b in itertools.pairwise(costs)) < 0.025
    for point in state.table:
        kept = state.costs.cost({name: float(name in point.static) for name in state.names})
        routers = sum(site.router for site in state.costs.sites.values()) / state.costs.dense
        assert kept - routers <= point.cost + 1e-6  # the static policy has no routers and costs no more


def test_full_budget_is_the_dense_model(calibrated: Calibrated) -> None:
    model, gated, data = calibrated
    gated = copy.deepcopy(gated)
    for gate in gates(gated):
        gate.router.register_forward_pre_hook(_refuse)
    with pytest.raises(AssertionError, match="a router ran"):
        gated(data[0])
    set_budget(gated, 1.0)
    with torch.no_grad():
        assert_equal([gated(data[0])], [model(data[0])])
    set_budget(gated, 0.6)
    with pytest.raises(AssertionError, match="a router ran"):
        gated(data[0])


def _refuse(*_: Any) -> None:
    raise AssertionError("a router ran")


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, math.nan, math.inf, True, "0.5", None])
def test_what_is_no_budget(calibrated: Calibrated, budget: Any) -> None:
    _, gated, data = calibrated
    before = copy.deepcopy(state_of(gated).table)
    with pytest.raises(BudgetError, match=r"\(0, 1\]; got"):
        set_budget(gated, budget)
    with pytest.raises(BudgetError, match=r"\(0, 1\]; got"):
        calibrate(gated, data, budget)
    assert state_of(gated).table == before and state_of(gated).budget == 0.6


def test_out_of_range_names_the_range(calibrated: Calibrated) -> None:
    _, gated, data = calibrated
    low, high = budget_range(gated)
    with pytest.raises(BudgetError, match=f"{low:.3f}, {high:.3f}"):
        set_budget(gated, low - 0.05)
    with pytest.raises(BudgetError, match=f"{low:.3f}, {high:.3f}"):
        set_budget(gated, 0.97)
    with pytest.raises(BudgetError, match=rf"cannot be reached.*attainable: {low:.3f} to 1"):
        calibrate(gated, data, low - 0.005)
    assert state_of(gated).budget == 0.6


def test_never_calibrated() -> None:
    gated = gate_all(Stack(mlp(4)), torch.randn(2, 4))
    with pytest.raises(BudgetError, match="never calibrated"):
        set_budget(gated, 0.5)
    set_budget(gated, 1.0)
    assert budget_range(gated) == (1.0, 1.0)
    with pytest.raises(NotConverted):
        set_budget(nn.Linear(2, 2), 0.5)


def test_data_that_can_be_read_once(calibrated: Calibrated) -> None:
    _, gated, data = calibrated
    gated = copy.deepcopy(gated)
    for once in (iter(data), (x for x in data), Once(data)):
        with pytest.raises(DataError, match="read"):
            calibrate(gated, once, 0.6)
    with pytest.raises(DataError, match="no batch"):
        calibrate(gated, [], 0.6)


def test_batches_that_change_in_number(calibrated: Calibrated) -> None:
    _, gated, data = calibrated

    class Shrinking:
        left = 4

        def __iter__(self) -> Any:
            self.left -= 1
            return iter(data[: self.left])

    with pytest.raises(DataError, match=r"\d batches first and \d the next time"):
        calibrate(copy.deepcopy(gated), Shrinking(), 0.6)


def test_forced_decisions_do_not_count(calibrated: Calibrated) -> None:
    _, gated, data = calibrated
    one, other = copy.deepcopy(gated), copy.deepcopy(gated)
    with surgery.force(one, 0.5):
        point = calibrate(one, data, 0.7, grid=())
    assert point == calibrate(other, data, 0.7, grid=())


def test_scores_that_are_all_alike_are_refused() -> None:
    """No threshold can separate equal inputs."""
    gated = gate_all(Stack(mlp(4)), torch.randn(2, 4), skip="identity")
    with pytest.raises(BudgetError, match="same score to many inputs"):
        calibrate(gated, [torch.ones(16, 4)] * 2, 0.5)


def test_threshold_of_a_known_router() -> None:
    """One site whose score is the first channel: at half the branch's cost the threshold is the median."""
    model = Stack(mlp(4))
    gated = gate_all(model, torch.randn(2, 4), skip="identity")
    (gate,) = gates(gated)
    gate.router = Set()  # type: ignore[assignment]
    state = state_of(gated)
    state.costs = CostModel("flops", 100.0, {gate.site.name: SiteCost(80.0, 10.0, 2.0)})
    x = torch.randn(1001, 4)
    cost_of_half = (20 + 2 + 40 + 5) / 100

    def keep_costs(*_: Any) -> CostModel:
        return state.costs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.rewriting.flop_costs", keep_costs)
        point = calibrate(gated, [x], cost_of_half)
    assert point.threshold == pytest.approx(float(x[:, 0].median()), abs=0.02)
    assert point.active_rate[gate.site.name] == pytest.approx(0.5, abs=0.01)


def test_static_policy_by_hand() -> None:
    costs = CostModel(
        "flops",
        100.0,
        {"a": SiteCost(30.0, 2.0, 1.0), "b": SiteCost(20.0, 0.0, 1.0), "c": SiteCost(10.0, 0.0, 1.0)},
    )
    rates = {"a": 0.9, "b": 0.5, "c": 0.7}
    # 40 fixed + 2 for the skip path of a; then a adds 28, c 10, b 20; routers do not count
    assert static_policy(costs, rates, 1.0) == ("a", "b", "c")
    assert static_policy(costs, rates, 0.80) == ("a", "c")
    assert static_policy(costs, rates, 0.79) == ("a",)
    assert static_policy(costs, rates, 0.69) == ("c",)  # b no longer fits
    assert static_policy(costs, rates, 0.42) == ()


@pytest.mark.parametrize(("budget", "kept"), [(0.45, 1), (0.55, 2), (0.85, 3)])
def test_a_static_policy_between_two_points_is_cut_for_its_budget(budget: float, kept: int) -> None:
    model, data = make_cnn()  # four sites of a quarter each
    gated = gate_all(model, data[0][:2])
    state = state_of(gated)
    names = state.order = tuple(reversed(state.names))
    state.table = [
        BudgetPoint(9.0 - cost, cost, dict.fromkeys(names, cost), names[: round(4 * cost)]) for cost in (0.3, 0.9)
    ]
    state.policy = "static"
    set_budget(gated, budget)
    assert tuple(name for name, is_open in state.static.items() if is_open) == state.names[:kept]


def test_monotone_by_hand() -> None:
    def point(threshold: float, cost: float) -> BudgetPoint:
        return BudgetPoint(threshold, cost, {"a": cost})

    good = [point(3, 0.2), point(1, 0.5), point(0, 0.9)]
    assert _monotone(list(reversed(good))) == good
    # at 0.4 and 0.5 the thresholds rise: both become their mean, under the cost of the later one
    pooled = _monotone([point(3, 0.2), point(1, 0.4), point(2, 0.5), point(0, 0.9)])
    assert [(p.threshold, p.cost) for p in pooled] == [(3, 0.2), (1.5, 0.5), (0, 0.9)]
    # pooling may reach back: 1, 2, 6 -> 3
    pooled = _monotone([point(4, 0.1), point(1, 0.4), point(2, 0.5), point(6, 0.6), point(0, 0.9)])
    assert [p.threshold for p in pooled] == [4, 3, 0]
    assert _monotone([point(math.inf, 0.1), point(2, 0.5)])[0].threshold == math.inf


def test_static_execution_runs_the_tables_policy(calibrated: Calibrated) -> None:
    _, gated, data = calibrated
    gated = copy.deepcopy(gated)
    set_budget(gated, 0.6)
    with torch.no_grad(), surgery.execution(gated, "static"), surgery.tape(gated) as events:
        gated(data[0])
    state = state_of(gated)
    opened = {event.site for event in events if event.rate() == 1}
    assert opened == {name for name, keep in state.static.items() if keep} == set(current_point(state).static)
    assert {event.rate() for event in events} <= {0.0, 1.0}
    assert 0 < len(opened) < len(list(iter_gates(gated)))


def test_progress_is_reported(calibrated: Calibrated) -> None:
    _, gated, data = calibrated
    seen: list[tuple[str, int, int | None]] = []
    calibrate(copy.deepcopy(gated), data, 0.6, grid=(), progress=lambda *row: seen.append(row))
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1)) and {s for s, _, _ in seen} == {"calibrating"}


@pytest.mark.parametrize("case", ["out of reach", "no data"])
def test_a_refused_calibration_changes_nothing(calibrated: Calibrated, case: str) -> None:
    _, gated, data = calibrated
    gated = copy.deepcopy(gated)
    state = state_of(gated)
    state.looks, state.margin, state.report = [LookPoint(0.6, 0.5, 0.5, (0.0,))], 0.1, {"0.6": {}}
    state.costs = replace(state.costs, unit="seconds")
    before = copy.deepcopy([getattr(state, one.name) for one in fields(state)])
    with pytest.raises((BudgetError, DataError)):
        calibrate(gated, *((data, 0.01) if case == "out of reach" else ([], 0.6)))
    assert [getattr(state, one.name) for one in fields(state)] == before


def test_a_refused_second_look_changes_nothing() -> None:
    model = Stack(mlp(8), mlp(8)).eval()
    data = [torch.randn(16, 5, 8) for _ in range(6)]
    gated = enliven(gate_all(model, data[0]))
    calibrate(gated, data, 0.6)
    state = state_of(gated)
    state.looks, state.margin = [LookPoint(0.6, 0.5, 0.5, (0.0,))], 0.1
    with pytest.raises(SurgeryError, match="a second look needs class logits"):
        surgery.calibrate_second_look(gated, data, mode=True)
    assert state.looks and state.margin == 0.1 and state.budget == 0.6


@pytest.mark.parametrize("below", [0.0, 5e-10])
def test_the_floor_itself_can_be_calibrated_for(calibrated: Calibrated, below: float) -> None:
    _, gated, data = calibrated
    gated = copy.deepcopy(gated)
    state = state_of(gated)
    floor = state.costs.cost(state.constant_rates(0.0))
    assert calibrate(gated, data, floor - below, grid=()).cost == pytest.approx(floor)


@pytest.mark.parametrize(
    "budget", [np.float32(0.75), np.float64(0.75), torch.tensor(0.75), torch.tensor([0.75]), Fraction(3, 4)]
)
def test_budgets_are_any_real_number(calibrated: Calibrated, budget: Any) -> None:
    _, gated, data = calibrated
    gated = copy.deepcopy(gated)
    set_budget(gated, budget)
    assert type(state_of(gated).budget) is float and state_of(gated).budget == 0.75
    assert type(calibrate(gated, data, budget, grid=()).cost) is float
    assert type(state_of(gated).budget) is float


@pytest.mark.parametrize(
    "budget", [torch.tensor(True), torch.tensor([0.5, 0.6]), 1j, np.float32("nan"), np.bool_(True)]
)
def test_what_is_no_real_number(calibrated: Calibrated, budget: Any) -> None:
    with pytest.raises(BudgetError, match="fraction of the dense model's"):
        set_budget(copy.deepcopy(calibrated[1]), budget)


@pytest.mark.parametrize(
    "use",
    [
        lambda gated, data: calibrate(gated, data, 0.6),
        surgery.measure,
        surgery.audit,
        surgery.fit_skip_paths,
        surgery.regress_routers,
        lambda gated, data: surgery.train_routers(gated, data, budget=0.6),
    ],
    ids=["calibrate", "measure", "audit", "fit_skip_paths", "regress_routers", "train_routers"],
)
def test_one_tensor_is_no_data(use: Any) -> None:
    gated = gate_all(make_cnn()[0], torch.randn(2, 8, 6, 6), skip="affine")
    for data in (torch.randn(4, 2, 8, 6, 6), {"x": torch.randn(2, 8, 6, 6)}, 3):
        with pytest.raises(DataError, match=rf"got {type(data).__name__}; for one batch pass \[batch\]"):
            use(gated, data)
