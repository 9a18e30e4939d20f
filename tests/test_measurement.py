"""`measure` on a network whose best policy is known, and what it refuses or says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from subjects import subject
from torch import Tensor, nn

import surgery
from surgery.calling import Batch
from surgery.context import state_of
from surgery.errors import DataError, NotConverted
from surgery.gates import iter_gates
from surgery.measurement import measure
from surgery.model_timing import groups_of
from surgery.peers import interval
from surgery.reports import Other, Report
from surgery.scoring import Scores, entropy
from surgery.scripts import budgets_trial, seeds
from surgery.state import BudgetPoint, CostModel, SiteCost

NO_TIME: dict[str, Any] = {"speed": ()}


class Correction(nn.Module):
    """Adds a lot to the second column where the first is positive, and nothing elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.zero_()
            self.inner[0].weight[0, 0] = 100.0
            self.inner[2].weight[1, 0] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Nothing(nn.Module):
    """A branch that adds next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.mul_(1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Classifier(nn.Module):
    """Class 0 where the second column is larger than the third."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((Nothing(), Correction()))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class Oracle(nn.Module):
    """A router that knows which inputs need the correction."""

    def forward(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return residual[:, 0]


class Never(nn.Module):
    """A router that opens for nothing."""

    def forward(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.full_like(residual[:, 0], -1.0)


@pytest.fixture
def model() -> nn.Module:
    return Classifier().eval()


@pytest.fixture
def data(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        inputs = [torch.randn(50, 3) for _ in range(8)]
        return [(x, model(x).argmax(1)) for x in inputs]


@pytest.fixture
def gated(model: nn.Module) -> nn.Module:
    made = surgery.insert_gates(model, surgery.find_sites(model, torch.randn(2, 3)).plan(skip="identity"))
    (_, first), (_, second) = iter_gates(made)
    first.router, second.router = Never(), Oracle()  # type: ignore[assignment]
    state = state_of(made)
    # of 100, 20 are outside of branches; a router costs 1
    costs = {name: SiteCost(cost, 0.0, 1.0) for name, cost in zip(state.names, (30.0, 50.0), strict=True)}
    state.costs = CostModel("flops", 100.0, costs)
    state.budget, state.threshold = 0.5, 0.0
    return made


@pytest.fixture
def report(gated: nn.Module, data: Any, model: nn.Module) -> Report:
    return measure(gated, data, dense=model, **NO_TIME)


def test_quality_and_cost(report: Report, data: Any) -> None:
    needed = float((torch.cat([x for x, _ in data])[:, 0] > 0).float().mean())
    assert (report.metric, report.dense_metric) == ({"accuracy": 1.0}, {"accuracy": 1.0})
    assert (report.agreement, report.agreement_of) == (1.0, "argmax")
    assert list(report.active_rate.values()) == pytest.approx([0.0, needed])
    assert report.submodules == pytest.approx(needed / 2)
    assert report.cost == pytest.approx((20 + 2 + 50 * needed) / 100)
    assert list(report.entropy.values()) == pytest.approx([0.0, entropy((needed, 1 - needed))])
    assert (report.policies, report.deciding) == (2, "400 inputs")
    assert (report.data, report.samples) == ("400 labelled inputs", 400)
    assert report.budget == 0.5


def test_peers_pay_the_same_and_know_less(report: Report, data: Any) -> None:
    x, labels = (torch.cat(column) for column in zip(*data, strict=True))
    closed = (x[:, 1:].argmax(1) == labels).double().mean()
    assert [peer.name for peer in report.peers] == ["static", "static+look", "importance", "random", "shuffled"]
    assert set(report.absent) == {"frozen", "one pass"}
    static, shuffled = report.peer("static"), report.peer("shuffled")
    assert static.cost == pytest.approx(report.cost) and shuffled.cost == pytest.approx(report.cost)
    # the static policy can only open the correction for everyone, which costs 70, or for nobody, which costs 20
    share = (100 * report.cost - 20) / 50
    assert static.metric == pytest.approx(float((1 - share) * closed + share))
    for peer in report.peers:
        assert peer.difference == pytest.approx(1 - peer.metric)
        assert 0 < peer.low < peer.difference < peer.high
        assert peer.speed == {}
    random = report.peer("random")
    assert random.cost == pytest.approx(report.cost - 0.02, abs=0.04)  # no routers
    assert not any("does not beat" in note for note in report.notes)


def test_static_cut_with_a_second_look(report: Report, data: Any) -> None:
    x, labels = (torch.cat(column) for column in zip(*data, strict=True))
    # the first pass costs 20 of 100 with both closed; the rest is a share of inputs that are run in full
    logits = x[:, 1:]
    count = round((report.cost - 0.2) * len(x))
    again = torch.zeros(len(x), dtype=torch.bool)
    again[(logits[:, 0] - logits[:, 1]).abs().argsort()[:count]] = True
    peer = report.peer("static+look")
    one = 1.01 / len(x)  # half an input may be rounded up or down
    assert peer.metric == pytest.approx(float((again | (logits.argmax(1) == labels)).double().mean()), abs=one)
    assert peer.cost == pytest.approx(report.cost, abs=one)


def test_no_second_look_without_classes(gated: nn.Module, data: Any) -> None:
    (first, _), *_ = data
    found = measure(gated, [first[:10]], **NO_TIME)
    assert "10 inputs" in found.absent["static+look"]
    assert [peer.name for peer in found.peers] == ["static", "importance", "random", "shuffled"]


def test_the_second_look_of_the_gated_model_is_a_peer_of_itself(gated: nn.Module, data: Any) -> None:
    state = state_of(gated)
    rates = dict.fromkeys(state.names, 0.5)
    state.table = [BudgetPoint(0.0, 0.1, rates), BudgetPoint(-1e9, 0.99, rates)]
    state.order = state.names
    without = measure(gated, data, **NO_TIME)
    assert [peer.name for peer in without.peers][:3] == ["static", "static+look", "frozen"]
    state.margin = 0.2
    found = measure(gated, data, **NO_TIME)
    assert found.cost > without.cost
    alone = found.peer("one pass")
    threshold = -1e9 * (0.5 - 0.1) / (0.99 - 0.1)  # what the table says for 0.5, where no part of it is kept back
    state.margin, state.threshold = None, threshold
    again = measure(gated, data, peers=False, **NO_TIME)
    assert (alone.metric, alone.cost) == (again.metric["accuracy"], pytest.approx(again.cost))


def test_other_networks_are_scored_and_timed_like_peers(gated: nn.Module, data: Any, model: nn.Module) -> None:
    asked: list[float] = []

    def others(cost: float) -> list[Other]:
        asked.append(cost)
        return [Other("the dense model", model, 1.0)]

    found = measure(gated, data, others=others, speed=(4,), repeats=3, time_peers=True)
    other = found.peer("the dense model")
    assert asked == [found.cost] and other.cost == 1.0
    assert (other.metric, other.difference, other.low, other.high) == (1.0, 0.0, 0.0, 0.0)
    assert {peer.name for peer in found.peers if set(peer.speed) == {4}} == {
        "static", "static+look", "importance", "random", "the dense model",
    }  # fmt: skip
    assert all(0 < peer.speed[4].total < 100 for peer in found.peers if peer.speed)
    assert json.loads(json.dumps(found.to_dict()))["peers"][0]["speed"]["4"]["repeats"] == 3
    assert state_of(gated).static == {} and state_of(gated).margin is None


def test_the_reference_can_be_taken_from_the_gated_model(gated: nn.Module, data: Any, report: Report) -> None:
    again = measure(gated, data, **NO_TIME)
    assert again.to_dict() == report.to_dict()


def test_says_so_when_routing_is_worth_nothing(gated: nn.Module, data: Any) -> None:
    (_, first), (_, second) = iter_gates(gated)
    first.router, second.router = Oracle(), Oracle()  # the first branch does nothing, so opening it is a waste
    state_of(gated).budget = None
    found = measure(gated, data, **NO_TIME)
    assert found.cost == 1.0 and found.peers == ()
    assert any("every gate was open" in note for note in found.notes)
    state_of(gated).budget = 0.6
    second.router = Never()  # type: ignore[assignment]
    found = measure(gated, data, **NO_TIME)
    assert any(
        "does not beat the static policy" in note or "static policy at the same cost is better" in note
        for note in found.notes
    )


def test_reports_of_few_inputs_say_so(gated: nn.Module) -> None:
    for count, expected in ((1, "this is of 1 input only"), (29, "this is of 29 inputs only"), (30, "")):
        notes = [note for note in measure(gated, [torch.randn(count, 3)], **NO_TIME).notes if "this is of" in note]
        assert [note.partition(":")[0] for note in notes] == [expected] * bool(expected)


def test_dense_costs_exactly_one(gated: nn.Module, data: Any) -> None:
    state_of(gated).budget = 1.0
    found = measure(gated, data, **NO_TIME)
    assert found.cost == 1.0 and found.policies == 1 and found.submodules == 1.0


def test_static_policy_pays_for_no_router(gated: nn.Module, data: Any) -> None:
    state = state_of(gated)
    state.policy, state.static = "static", {state.names[0]: False, state.names[1]: True}
    found = measure(gated, data, **NO_TIME)
    assert found.cost == pytest.approx(0.70)
    assert found.peer("static").difference == 0
    assert any("runs its static policy" in note for note in found.notes)
    state.budget = 0.75
    assert any("budget is 0.75: no further branch fits in" in note for note in measure(gated, data, **NO_TIME).notes)
    state.budget = 0.65  # set by hand: nothing that was calibrated costs more than it was allowed to
    assert any(
        "budget is 0.65: it was calibrated on other data" in note for note in measure(gated, data, **NO_TIME).notes
    )
    state.budget, state.margin = 0.75, 1e-9
    reserve = "budget is 0.75: second looks leave a reserve for chance, or it was calibrated on other data"
    assert any(reserve in note for note in measure(gated, data, **NO_TIME).notes)


def test_rounding_is_no_difference(gated: nn.Module, data: Any) -> None:
    state = state_of(gated)
    state.policy, state.static, state.outputs = "static", {state.names[0]: False, state.names[1]: True}, "values"
    costs = {name: SiteCost(cost, 2.9, 1.0) for name, cost in zip(state.names, (32.2, 58.3), strict=True)}
    state.costs = CostModel("flops", 103.7, costs)  # the static cut misses 4e-16 of the way to that of this cost
    found = measure(gated, [x + 0.1 for x, _ in data], **NO_TIME)
    static = found.peer("static")
    assert (static.difference, static.low, static.high) == (0, 0, 0)
    assert not any("is better in" in note for note in found.notes)


def test_without_labels_the_agreement_is_compared(gated: nn.Module, data: Any) -> None:
    found = measure(gated, [x for x, _ in data], **NO_TIME)
    assert found.metric == {} and found.dense_metric == {}
    assert found.data == "400 inputs"
    labelled = measure(gated, data, **NO_TIME)
    assert [peer.metric for peer in found.peers] == pytest.approx([peer.metric for peer in labelled.peers])


def test_modes_come_back(gated: nn.Module, data: Any, model: nn.Module) -> None:
    gated.train()
    was = [module.training for module in gated.modules()]
    model.train()
    measure(gated, data, dense=model, **NO_TIME)
    assert [module.training for module in gated.modules()] == was
    assert all(module.training for module in model.modules())


def test_progress_and_time(gated: nn.Module, data: Any) -> None:
    seen: list[tuple[str, int, int | None]] = []
    found = measure(gated, data, speed=(1, 8, 500), repeats=3, progress=lambda *step: seen.append(step))
    assert ("measuring", 8, 8) in seen and ("comparing", 8, 8) in seen and ("timing", 2, 3) in seen
    assert set(found.speed) == {1, 8} and found.speed[8].repeats == 3
    assert found.conditions["threads"] == torch.get_num_threads()
    assert any(note.startswith("batch 500 was not timed") for note in found.notes)


def test_rows_are_taken_across_batches_of_equal_shape() -> None:
    batches = [{"input_ids": torch.full((2, 3), index), "scale": 2.0} for index in range(3)]
    groups = list(groups_of([*batches, {"input_ids": torch.zeros(2, 5), "scale": 2.0}], 4))
    assert len(groups) == 1
    assert groups[0].kwargs["input_ids"].tolist() == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]
    assert groups[0].kwargs["scale"] == 2.0
    alone = list(groups_of([Batch((torch.zeros(2, 5),))], 1))
    assert [group.args[0].shape for group in alone] == [(1, 5), (1, 5)]


def test_prints_and_turns_into_strict_json(gated: nn.Module, data: Any) -> None:
    found = measure(gated, data, speed=(2,), repeats=2)
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back["peers"][0]["name"] == "static" and back["speed"]["2"]["repeats"] == 2
    text = str(found)
    for part in ("400 labelled inputs", "accuracy", "100.00 %", "importance", "blocks.1.inner"):
        assert part in text, part
    with pytest.raises(KeyError, match="measured: static"):
        found.peer("oracle")


@pytest.mark.parametrize("name", ["timm/mixer", "transformers/bert", "transformers/llama"])
def test_networks_of_the_zoo(name: str) -> None:
    one = subject(name)
    made = surgery.insert_gates(one.model, one.sites)
    state = state_of(made)
    state.budget, state.threshold = 0.7, 0.0
    for _, gate in iter_gates(made):
        torch.nn.init.normal_(gate.router.up.weight)
    batches = [one.entry.example(6, seed=seed) for seed in range(3)]
    found = measure(made, batches, dense=one.model, **NO_TIME)
    assert 0 < found.submodules < 1 and found.policies > 1
    assert {peer.name for peer in found.peers} >= {"static", "importance", "random", "shuffled"}
    assert found.peer("shuffled").cost == pytest.approx(found.cost, abs=0.02)
    if name == "transformers/llama":
        assert set(found.metric) == {"nats_per_token"}
        assert found.deciding.endswith("tokens")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refuses_what_can_be_read_once_or_changes(gated: nn.Module, data: Any) -> None:
    with pytest.raises(DataError, match="read once"):
        measure(gated, iter(data))
    with pytest.raises(DataError, match="no batch"):
        measure(gated, [])

    class Shuffled(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            self.reverse()
            return super().__iter__()

    with pytest.raises(DataError, match="switch off shuffling"):
        measure(gated, Shuffled(data), **NO_TIME)
    with pytest.raises(DataError, match="some batches can be scored by accuracy"):
        measure(gated, [*data, data[0][0]], **NO_TIME)


def test_refuses_models_without_gates(model: nn.Module, data: Any) -> None:
    with pytest.raises(NotConverted):
        measure(model, data)


# -- statistics -------------------------------------------------------------------------------------------------------


def test_interval_covers_the_normal_approximation() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = (torch.rand(2000, generator=generator) < 0.8).double()
    theirs = (torch.rand(2000, generator=generator) < 0.7).double()
    ones = torch.ones(2000, dtype=torch.float64)
    low, high = interval(Scores(ours, ones), Scores(theirs, ones), 2000, 0)
    gap = ours - theirs
    error = 1.96 * float(gap.std()) / math.sqrt(2000)
    assert low == pytest.approx(float(gap.mean()) - error, abs=0.003)
    assert high == pytest.approx(float(gap.mean()) + error, abs=0.003)


def test_interval_is_paired() -> None:
    hard = torch.rand(500, dtype=torch.float64)
    weights = torch.full((500,), 2.0, dtype=torch.float64)
    low, high = interval(Scores(hard + 0.1, weights), Scores(hard, weights), 200, 0)
    assert low == pytest.approx(0.05) and high == pytest.approx(0.05)  # however much inputs differ from one another


def test_entropy() -> None:
    assert entropy((0.5, 0.5)) == 1 and entropy((0.0, 1.0)) == 0 and entropy(()) == 0
    assert entropy((0.25, 0.75)) == pytest.approx(0.8113, abs=1e-4)


def test_several_conversions_are_scored_as_each_alone(
    model: nn.Module, gated: nn.Module, data: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.budgets.set_budget", lambda *_: None)  # the budget is set by hand
    alone = measure(gated, data, dense=model, **NO_TIME)
    inputs = [Batch((x,), {}, y) for x, y in data]
    dense, outputs, metric = seeds.dense_score(model, inputs)
    assert metric == "accuracy"
    point = seeds.score_all(0.5, [gated, gated], model, inputs, dense, outputs, peers=True)
    peers = {peer.name: peer for peer in alone.peers}
    assert point.scores == [alone.metric["accuracy"]] * 2
    assert point.costs == [pytest.approx(alone.cost)] * 2
    assert point.submodules == [pytest.approx(alone.submodules)] * 2
    for name in ("static", "shuffled"):
        assert point.peers[name] == [pytest.approx(peers[name].metric)] * 2
        assert point.ahead[name][0] == pytest.approx(peers[name].difference)
    assert point.gap[0] == pytest.approx(point.scores[0] - dense.mean)
    assert "(0." in seeds.markdown([point], dense.mean)


def test_a_conversion_that_runs_dense_has_no_decisions_to_shuffle(
    model: nn.Module, gated: nn.Module, data: list[tuple[Tensor, Tensor]]
) -> None:
    inputs = [Batch((x,), {}, y) for x, y in data]
    dense, outputs, _ = seeds.dense_score(model, inputs)
    found = seeds.score_at(gated, 1.0, model, inputs, outputs, peers=True)
    assert (found.cost, found.scores.mean, set(found.peers)) == (1.0, dense.mean, {"static"})


def test_one_checkpoint_is_compared_with_one_for_each_budget_by_input() -> None:
    def scored(right: list[float], cost: float) -> seeds.Scored:
        return seeds.Scored(
            cost, 0.5, 1.0, Scores(torch.tensor(right, dtype=torch.float64), torch.ones(4, dtype=torch.float64)), {}
        )

    shared, own = scored([1.0, 1.0, 1.0, 0.0], 0.602), scored([1.0, 0.0, 1.0, 0.0], 0.598)
    line = budgets_trial.row(0.6, shared, own)
    assert line.startswith("| 0.60 | 0.602 | 0.7500 | 0.598 | 0.5000 | +25.0 (+0.0 to ")
    assert budgets_trial.row(0.6, own, own).endswith(
        "| +0.0 (+0.0 to +0.0) |"
    )  # paired: equal answers differ by nothing
