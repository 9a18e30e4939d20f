"""The guard: intervals by hand, steps up to dense with a reason, four threads, metrics."""

from __future__ import annotations

import copy
import logging
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subjects import enliven
from torch import Tensor, nn
from toys import Masked, Residual, gate_all, mlp

import surgery
from surgery.budgets import point_at
from surgery.calling import Batch
from surgery.context import state_of
from surgery.costs import costs_of, observe
from surgery.errors import BudgetError, SurgeryError
from surgery.guarding import _Means, disagreements, stability, wilson
from surgery.second_look import margin_of
from surgery.state import LookPoint


class Net(nn.Module):
    """Three residual maps and a head of five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Residual(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))) for _ in range(3))
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    data = [torch.randn(64, 8) for _ in range(20)]
    return surgery.convert(Net().eval(), 0.6, data=data, tune="oneshot")


def test_wilson_interval() -> None:
    low, high = wilson(5, 100)  # Newcombe 1998 gives 0.0215 to 0.1118
    assert (low, high) == (pytest.approx(0.0215, abs=1e-4), pytest.approx(0.1118, abs=1e-4))
    assert wilson(0, 0) == (0, 1) and wilson(0, 50)[0] == 0 and wilson(50, 50)[1] == 1


def test_stability_index() -> None:
    assert stability(0.5, 0.5, 100) == 0
    assert stability(0.8, 0.5, 100) == pytest.approx(0.3 * 0.470004 + 0.3 * 0.916291, abs=1e-5)
    # held half an input away from 0 and 1: 0.495 log 1.99 - 0.495 log 0.01
    assert stability(1.0, 0.5, 100) == pytest.approx(0.340627 + 2.279559, abs=1e-5)


def test_the_window_weighs_inputs_and_forgets_the_oldest() -> None:
    rates = _Means(2, 1)
    rates.extend(torch.tensor([[1.0], [0.0]]), torch.tensor([3.0, 1.0]))
    assert rates.means().tolist() == [0.75]
    rates.extend(torch.tensor([[0.0]]), torch.tensor([0.0]))  # padding alone
    assert rates.means().tolist() == [0.75] and len(rates) == 2
    rates.extend(torch.tensor([[1.0]]), torch.tensor([4.0]))
    assert rates.means().tolist() == [pytest.approx(4 / 5)] and len(rates) == 2
    alone = _Means(2, 1)
    alone.extend(torch.zeros(2, 1), torch.zeros(2))
    assert len(alone) == 0


def test_disagreement_within_chance_moves_nothing(converted: nn.Module) -> None:
    guard = surgery.Guard(converted, max_disagreement=0.02, max_drift=1e9)
    guard.note(40, guard.budget, [], [True] * 2 + [False] * 38)  # 5 %, of which 1.4 % are beyond chance
    assert guard.health().disagreement == 0.05 and guard.health().low < 0.02 and guard.steps == ()
    guard.note(40, guard.budget, [], [True] * 4 + [False] * 36)  # 7.5 %, of which 3.5 % are
    assert len(guard.steps) == 1


def test_nothing_is_compared_while_all_runs_dense(converted: nn.Module) -> None:
    guard = surgery.Guard(converted, dense_fraction=1.0)
    guard.reset(1.0)
    with torch.no_grad():
        guard(torch.randn(4, 8))
    assert (guard.health().compared, guard.health().inputs) == (0, 4)


def test_embeddings_differ_at_real_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch((torch.zeros(3, 2, 2),), {"attention_mask": torch.tensor([[1, 0], [1, 0], [1, 1]])})
    monkeypatch.setattr("surgery.guarding.state_of", lambda gated: SimpleNamespace(outputs="values"))
    dense = torch.tensor([[[1.0, 0.0], [9.0, 0.0]], [[1.0, 0.0], [9.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    ours = torch.tensor([[[1.0, 0.0], [0.0, 9.0]], [[0.0, 1.0], [9.0, 0.0]], [[1.0, 0.0], [float("nan"), 0.0]]])
    assert disagreements(nn.Identity(), batch, dense, dense) == [False, False, False]
    # what becomes of padding is nobody's business, and what is no number is not the same
    assert disagreements(nn.Identity(), batch, ours, dense) == [False, True, True]


def test_outputs_that_are_no_numbers_disagree(converted: nn.Module) -> None:
    dense = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    ours = torch.tensor([[float("nan"), float("nan")], [3.0, 1.0], [2.0, 1.0]])
    assert disagreements(converted, Batch((dense,)), ours, dense) == [True, False, True]


def test_nothing_moves_while_all_is_well(converted: nn.Module) -> None:
    guard = surgery.Guard(converted, dense_fraction=1.0, max_disagreement=1.0, max_drift=100)
    x = torch.randn(40, 8)
    with torch.no_grad():
        assert torch.equal(guard(x), converted(x))
    health = guard.health()
    assert (health.calls, health.inputs, health.compared, health.steps) == (1, 40, 40, ())
    assert health.low <= health.disagreement <= health.high and set(health.drift) == set(state_of(converted).names)
    with torch.no_grad(), surgery.execution(converted, "dense"):
        dense = converted(x).argmax(1)
    with torch.no_grad():
        assert health.disagreement == pytest.approx(float((converted(x).argmax(1) != dense).float().mean()))


def test_disagreement_raises_the_budget_step_by_step_to_dense(
    converted: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    gated = copy.deepcopy(converted)
    for module in gated.modules():  # skip paths that ruin everything that is skipped
        if type(module).__name__ == "Gate":
            for parameter in module.skip_path.parameters():
                parameter.data += 3.0
    before = state_of(gated).budget, state_of(gated).threshold
    guard = surgery.Guard(gated, dense_fraction=1.0, max_disagreement=0.05, max_drift=1e9, least=30)
    budgets = [guard.budget]
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(30):
            output = guard(x := torch.randn(50, 8))
            budgets.append(guard.budget)
    steps = guard.health().steps
    assert budgets == sorted(budgets) and budgets[-1] == 1.0 and len(steps) >= 2
    assert [step.new for step in steps][:1] == [pytest.approx(0.7)]
    assert "disagreement" in steps[0].reason and "above 5 %" in caplog.text
    with torch.no_grad(), surgery.execution(gated, "dense"):
        assert torch.equal(output, gated(x))
    assert (state_of(gated).budget, state_of(gated).threshold) == before, "the model itself is left as it is"
    guard.reset(0.6)
    assert guard.budget == 0.6 and guard.health().steps[-1].reason == "set by hand"


def test_a_call_that_began_before_a_change_of_the_budget_is_not_counted_towards_the_new_one(
    converted: nn.Module,
) -> None:
    gated = copy.deepcopy(converted)
    guard = surgery.Guard(gated, dense_fraction=1.0, max_disagreement=1.0, max_drift=1e9)
    x = torch.randn(40, 8)
    handle = gated.head.register_forward_pre_hook(lambda *_: guard.reset(0.7) if guard.budget != 0.7 else None)
    with torch.no_grad():
        guard(x)
        handle.remove()
        health = guard.health()
        assert (health.calls, health.inputs, health.budget, len(health.steps)) == (1, 40, 0.7, 1)
        assert (health.compared, health.active_rate, health.cost) == (0, {}, None)
        guard(x)
    assert guard.health().compared == 40


def test_drift_raises_the_budget_and_names_the_site(converted: nn.Module) -> None:
    guard = surgery.Guard(converted, dense_fraction=0.0, max_drift=0.25)
    with torch.no_grad():
        for _ in range(10):
            guard(torch.randn(50, 8))
        calm = guard.health()
        for _ in range(60):
            guard(torch.zeros(50, 8) + torch.tensor([9.0, -9, 9, -9, 9, -9, 9, -9]))
    assert calm.steps == () and max(calm.drift.values()) < 0.25
    reasons = [step.reason for step in guard.health().steps]
    assert reasons and any(name in reasons[0] for name in state_of(converted).names) and "drift at" in reasons[0]


def test_four_threads_lose_nothing_and_agree(converted: nn.Module) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    guard = surgery.Guard(
        converted, dense_fraction=0.25, max_disagreement=1.0, max_drift=1e9, window=10_000, metrics=registry
    )
    inputs = [torch.randn(3, 8) for _ in range(4)]
    with torch.no_grad():
        expected = [converted(x) for x in inputs]
        dense = []
        for x in inputs:
            with surgery.execution(converted, "dense"):
                dense.append(converted(x))
    failures: list[Any] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for index in range(100):
                if number == 0 and index % 25 == 24:
                    guard.reset(1.0 if guard.budget < 1 else 0.6)
                found = guard(inputs[number])
                if not (torch.equal(found, expected[number]) or torch.equal(found, dense[number])):
                    failures.append((number, index))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    health = guard.health()
    assert not failures and (health.calls, health.inputs) == (400, 1200) and len(health.steps) == 4
    assert registry.get_sample_value("surgery_calls_total") == 400
    assert registry.get_sample_value("surgery_inputs_total") == 1200
    compared = registry.get_sample_value("surgery_compared_inputs_total")
    assert compared and 0 < compared < 1200
    assert registry.get_sample_value("surgery_latency_seconds_count") == 400
    assert registry.get_sample_value("surgery_cost_fraction_count") == 1200
    assert registry.get_sample_value("surgery_budget") == health.budget
    site = state_of(converted).names[0]
    assert registry.get_sample_value("surgery_active_rate", {"site": site}) == pytest.approx(health.active_rate[site])


def spent(gated: nn.Module, x: Tensor) -> float:
    """Mean cost of a call, both passes counted."""
    with torch.no_grad(), surgery.tape(gated) as events:
        gated(x)
    assert events.looked[0].any()
    return float(costs_of(events, state_of(gated).costs, len(x)).mean())


@pytest.mark.parametrize("policy", ["routed", "static"])
def test_a_model_with_a_second_look_is_guarded_with_it(converted: nn.Module, policy: str) -> None:
    gated = copy.deepcopy(converted)
    state, x = state_of(gated), torch.randn(400, 8)
    state.policy = policy
    state.looks = []
    surgery.set_budget(gated, 0.6)
    with torch.no_grad():
        margins = margin_of(gated(x)).sort().values
    quantiles = tuple(margins[round(q * (len(margins) - 1) / 100)].item() for q in range(101))
    state.looks = [LookPoint(0.65, 0.6, 0.6, quantiles), LookPoint(0.9, 0.6, 0.6, quantiles)]
    surgery.set_budget(gated, 0.8)
    guard = surgery.Guard(gated, dense_fraction=1.0, max_disagreement=1.0, max_drift=1e9)
    with torch.no_grad():
        assert torch.equal(guard(x), gated(x))
        first = converted(x) if policy == "routed" else None
    assert first is None or not torch.equal(first, gated(x)), "some inputs are looked at again"
    health = guard.health()
    assert health.cost == pytest.approx(expected := spent(gated, x), abs=1e-5)
    assert policy == "static" or expected == pytest.approx(0.8, abs=0.05)
    drift = {
        name: stability(health.active_rate[name], rate, 400) for name, rate in point_at(state, 0.6).active_rate.items()
    }
    assert health.drift == ({} if policy == "static" else drift)
    surgery.set_budget(gated, 0.7)
    expected = spent(gated, x)
    surgery.set_budget(gated, 1.0)  # the model's own setting counts for nothing here
    guard.reset(0.7)
    with torch.no_grad():
        guard(x)
    assert guard.health().cost == pytest.approx(expected, abs=1e-5)


def test_cost_goes_by_tokens() -> None:
    """As the budget does: of a text of two tokens and one of twenty, the longer one weighs more."""
    mask = torch.arange(20) < torch.tensor([[2], [20]])
    text = {"inputs_embeds": torch.randn(2, 20, 8), "attention_mask": mask.long()}
    gated = enliven(gate_all(Masked(mlp(8), mlp(8)), text))
    surgery.calibrate(gated, [text], 0.7)
    guard = surgery.Guard(gated, dense_fraction=0.0)
    with torch.no_grad():
        guard(**text)
    decided = observe(gated, [text]).decided
    short, long = decided.costs(state_of(gated).costs).tolist()
    assert short != pytest.approx(long, abs=0.01)
    assert guard.health().cost == pytest.approx((2 * short + 20 * long) / 22)
    assert guard.health().cost == pytest.approx(decided.cost(state_of(gated).costs))


def test_sampled_share(converted: nn.Module) -> None:
    guard = surgery.Guard(converted, dense_fraction=0.3, max_disagreement=1.0, max_drift=1e9)
    with torch.no_grad():
        for _ in range(400):
            guard(torch.randn(1, 8))
    assert abs(guard.health().compared / 400 - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def test_refusals(converted: nn.Module) -> None:
    with pytest.raises(SurgeryError, match="dense_fraction is a share"):
        surgery.Guard(converted, dense_fraction=2)
    with pytest.raises(SurgeryError, match="window >= least"):
        surgery.Guard(converted, window=5)
    model = Net().eval()
    with pytest.raises(BudgetError, match="never calibrated"):
        surgery.Guard(surgery.insert_gates(model, surgery.find_sites(model, torch.randn(2, 8))))
    guard = surgery.Guard(converted)
    with pytest.raises(BudgetError, match="outside the calibrated range"):
        guard.reset(0.001)
    for budget in (2.0, 1.5, math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(BudgetError, match=r"in \(0, 1\]; got"):
            guard.reset(budget)
    assert guard.budget == 0.6 and guard.steps == ()
