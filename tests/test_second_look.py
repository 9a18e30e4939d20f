"""The second look: uncertain inputs are run again in full, within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

import surgery
from surgery import look_calibration
from surgery.context import state_of
from surgery.costs import observe
from surgery.errors import SurgeryError
from surgery.gates import iter_gates
from surgery.healing import install
from surgery.look_calibration import calibrate_second_look
from surgery.peers import one_pass, static_only
from surgery.policies import static_cost
from surgery.scripts import looks_trial
from surgery.second_look import margin_of
from surgery.state import BudgetPoint, CostModel, Healing, LookPoint, SiteCost


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(16) for _ in range(5)))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 16, generator=generator) for _ in range(10)]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def gated(dense: nn.Module, data: list[Tensor]) -> Iterator[nn.Module]:
    yield surgery.convert(dense, 0.7, data=data, tune="oneshot", second_look=False)


@pytest.fixture
def looking(gated: nn.Module, data: list[Tensor]) -> nn.Module:
    """A first pass at 0.5, and a second look at what the rest of the budget pays for."""
    surgery.set_budget(gated, 0.5)
    with torch.no_grad():
        margins = margin_of(torch.cat([gated(x) for x in data])).sort().values
    quantiles = tuple(margins[round(q * (len(margins) - 1) / 100)].item() for q in range(101))
    state_of(gated).looks = [LookPoint(0.65, 0.5, 0.5, quantiles), LookPoint(0.75, 0.5, 0.5, quantiles)]
    surgery.set_budget(gated, 0.7)
    return gated


def test_margin_is_the_gap_between_the_two_largest_probabilities() -> None:
    logits = torch.tensor([[0.7, 0.1, 0.2], [0.4, 0.4, 0.2]]).log()
    assert margin_of(logits).tolist() == pytest.approx([0.5, 0.0])


def test_uncertain_rows_are_dense_and_the_others_are_the_first_pass(
    dense: nn.Module, looking: nn.Module, data: list[Tensor]
) -> None:
    x = data[0]
    with torch.no_grad(), surgery.tape(looking) as events:
        output = looking(x)
    (looked,) = events.looked
    assert 0 < int(looked.sum()) < len(x)
    state = state_of(looking)
    with torch.no_grad():
        torch.testing.assert_close(output[looked], dense(x)[looked])
        margin, state.margin = state.margin, None
        first = looking(x)
        state.margin = margin
    assert torch.equal(output[~looked], first[~looked])
    assert bool((margin_of(first)[looked] < margin).all()) and bool((margin_of(first)[~looked] >= margin).all())


def test_both_passes_count(looking: nn.Module, data: list[Tensor]) -> None:
    with torch.no_grad():
        usage = observe(looking, data)
    cost, looked = usage.decided.costs(state_of(looking).costs), usage.decided.looked
    assert float(cost.mean()) == pytest.approx(0.7, abs=0.03)
    assert bool((cost[looked] > 1).all()) and bool((cost[~looked] < 1.1).all())  # routers run too
    report = surgery.measure(looking, data, speed=())
    assert report.cost == pytest.approx(float(cost.mean()), abs=1e-6)
    assert any("second look" in note for note in report.notes)
    assert report.submodules == pytest.approx(usage.submodules, abs=1e-5)
    assert surgery.status(looking).again == pytest.approx(0.2, abs=0.01)


def test_entropy_is_of_what_gates_decide(looking: nn.Module, data: list[Tensor]) -> None:
    """A second look adds to the active rate, which may then be above 1, but decides nothing."""
    for _, gate in iter_gates(looking):
        gate.router.up.bias.data.fill_(50.0)  # open for everything
    report = surgery.measure(looking, data, peers=False, speed=())
    assert min(report.active_rate.values()) > 1
    assert set(report.entropy.values()) == {0.0}


@pytest.mark.parametrize("healed", [False, True])
def test_replayed_with_its_second_looks(looking: nn.Module, data: list[Tensor], tmp_path: Path, healed: bool) -> None:
    if healed:
        shapes = {f"blocks.{i}.mlp.0.weight": (64, 16) for i in range(5)}
        for name, change in install(looking, Healing("lora", shapes, 2)).items():
            change.data += 0.2 if name.endswith("_up") else 0.1
    path = str(tmp_path / "log")
    with torch.no_grad(), surgery.record(looking, path), surgery.tape(looking) as events:
        outputs = torch.cat([looking(x) for x in data[:3]])
    rows, looked = list(surgery.read_log(path)), torch.cat(events.looked)
    assert [row.looked for row in rows] == looked.tolist() and 0 < int(looked.sum()) < len(rows)
    assert all(set(row.rates().values()) == {1.0} for row in rows if row.looked)
    found = surgery.replay(looking, path, data[:3])
    assert found.faithful and found.exact and found.equal == len(rows)
    assert found.cost == pytest.approx(found.recorded_cost)
    first = state_of(looking).names[0]
    opened = surgery.replay(looking, path, data[:3], opened=[first])
    assert 0 <= opened.changed < len(outputs)


def test_a_row_does_not_depend_on_its_batch(looking: nn.Module, data: list[Tensor]) -> None:
    with torch.no_grad():
        whole = looking(data[0])
        alone = torch.cat([looking(row[None]) for row in data[0]])
        with surgery.execution(looking, "mask"):
            masked = looking(data[0])
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(masked, whole)


def test_what_is_set_by_hand_gets_no_second_look(looking: nn.Module, data: list[Tensor]) -> None:
    with torch.no_grad(), surgery.tape(looking) as events:
        with surgery.force(looking, 0.0):
            looking(data[0])
        with surgery.execution(looking, "dense"):
            looking(data[0])
    assert not events.looked
    surgery.set_budget(looking, 1.0)
    assert state_of(looking).margin is None


@pytest.mark.parametrize(
    "context", [one_pass, partial(static_only, kept=()), partial(static_only, kept=(), margin=0.5)]
)
def test_a_peer_that_runs_changes_nothing_for_other_threads(
    looking: nn.Module, data: list[Tensor], context: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    before = replace(state_of(looking))
    with torch.no_grad():
        expected = looking(data[0])
        with context(looking):
            own = looking(data[0])
            with ThreadPoolExecutor(1) as pool:
                served = pool.submit(looking, data[0]).result()
            assert state_of(looking) == before
    assert torch.equal(served, expected) and not torch.equal(own, expected)


def test_a_pinned_copy_spends_the_whole_budget_on_one_pass(looking: nn.Module, data: list[Tensor]) -> None:
    pinned = surgery.pin(looking, data[0], "mask")
    state = state_of(looking)
    state.looks = []
    surgery.set_budget(looking, 0.7)
    with torch.no_grad(), surgery.execution(looking, "mask"):
        torch.testing.assert_close(pinned(data[0]), looking(data[0]))


def test_calibration_keeps_the_budget_and_brings_outputs_nearer(gated: nn.Module, data: list[Tensor]) -> None:
    data = data[4::5]  # what the budget was calibrated on

    def distance() -> float:
        with torch.no_grad():
            logs = [gated(x).log_softmax(1) for x in data]
            with surgery.execution(gated, "dense"):
                true = [gated(x).log_softmax(1) for x in data]
        return float(torch.cat([(t.exp() * (t - g)).sum(1) for t, g in zip(true, logs, strict=True)]).mean())

    before = distance()
    on = surgery.calibrate_second_look(gated, data, mode=True)
    with torch.no_grad():
        usage = observe(gated, data)
    assert 0.65 <= usage.decided.cost(state_of(gated).costs) <= 0.7
    assert distance() <= before + 1e-6
    assert on == bool(usage.decided.looked.any())


@pytest.mark.parametrize("policy", ["routed", "static"])
def test_a_router_counts_where_it_ran(gated: nn.Module, data: list[Tensor], policy: str) -> None:
    state = state_of(gated)
    state.policy = policy
    found = observe(gated, data).decided
    report = surgery.measure(gated, data, speed=(), peers=False)
    routers = sum(site.router for site in state.costs.sites.values()) / state.costs.dense
    expected = state.costs.cost(found.active_rate) - (policy == "static") * routers
    assert routers > 0.01 and found.cost(state.costs) == pytest.approx(expected)
    assert report.cost == pytest.approx(expected)
    with surgery.execution(gated, "dense"):
        assert observe(gated, data).decided.cost(state.costs) == pytest.approx(1)


def test_a_static_policy_with_a_second_look_spends_its_budget(gated: nn.Module, data: list[Tensor]) -> None:
    state = state_of(gated)
    state.policy = "static"
    assert surgery.calibrate_second_look(gated, data, mode=True)
    for point in state.looks:
        if point.cost < point.budget:
            surgery.set_budget(gated, point.budget)
            kept = [name for name in state.units if state.static[name]]
            assert point.cost == pytest.approx(static_cost(state.costs, kept))
            found = observe(gated, data).decided
            share, inputs = point.budget - point.cost, sum(map(len, data))
            cautious = share - 1.64 * math.sqrt(share * (1 - share) / inputs)
            assert found.again == pytest.approx(max(cautious, 0), abs=0.01)
            assert found.cost(state.costs) == pytest.approx(point.cost + found.again)


class Useless(nn.Module):
    """A branch that adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.map(x) - 1e6)


class Rare(nn.Module):
    """A branch that changes an input only where the first column says so, and then its class."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3, bias=False)
        self.map.weight.data = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.map(x))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Useless(), Rare())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)[:, 1:]


def rare(flagged: int) -> tuple[nn.Module, list[Tensor]]:
    """A model whose static policy is wrong about `flagged` of 100 inputs, which are those it is not sure of: it costs 0.3
    without branches and 0.5 with one that adds nothing.
    """
    model = Scores().eval()
    gated = surgery.insert_gates(model, surgery.find_sites(model, torch.randn(2, 3)).plan(skip="identity"))
    state = state_of(gated)
    first, second = state.names
    state.costs = CostModel("flops", 100.0, {first: SiteCost(20.0, 0.0, 0.0), second: SiteCost(50.0, 0.0, 0.0)})
    rates = {first: 1.0, second: 0.0}
    state.table = [BudgetPoint(0.0, 0.3, dict.fromkeys(rates, 0.0)), BudgetPoint(-1.0, 0.5, rates, (first,))]
    state.table.append(BudgetPoint(-2.0, 0.95, rates, (first,)))
    state.policy = "static"
    x = torch.tensor([[-1.0, 0.0, 5.0]]).repeat(100, 1)
    x[:flagged] = torch.tensor([1.0, 0.0, 0.1])
    surgery.set_budget(gated, 0.95)
    return gated, [x]


@pytest.mark.parametrize(("flagged", "mode", "on"), [(2, "auto", False), (2, True, True), (10, "auto", True)])
def test_what_two_inputs_gain_may_be_chance(flagged: int, mode: Any, on: bool) -> None:
    gated, data = rare(flagged)
    assert surgery.calibrate_second_look(gated, data, mode=mode) == on


@pytest.mark.parametrize(
    ("share", "inputs", "expected"),
    [(0.2, 100, 0.1344), (0.5, 400, 0.459), (0.01, 100, 0.0), (0.0, 100, 0.0), (1.0, 100, 1.0)],
)
def test_few_inputs_leave_a_reserve(share: float, inputs: int, expected: float) -> None:
    weights = torch.full((inputs,), 1 / inputs, dtype=torch.float64)
    found = look_calibration._cautious(torch.tensor(share, dtype=torch.float64), weights)
    assert float(found) == pytest.approx(expected, abs=1e-9)  # 0.2 - 1.64 * 0.04


def test_the_true_share_exceeds_the_budget_once_in_twenty() -> None:
    generator = torch.Generator().manual_seed(0)
    over, draws = 0, 1000
    weights = torch.full((512,), 1 / 512, dtype=torch.float64)
    for _ in range(draws):
        margins = torch.rand(512, generator=generator, dtype=torch.float64)
        over += look_calibration._quantiles(margins, weights)[20] > 0.2  # a margin of m has a true share of m
    assert 0.03 <= over / draws <= 0.07


def test_no_look_is_set_that_the_reserve_leaves_nothing_of() -> None:
    margins = torch.linspace(0, 1, 100, dtype=torch.float64)
    weights, nothing = torch.full_like(margins, 0.01), torch.zeros_like(margins)
    apart = torch.where(margins < 0.1, 1.0, 0.0).double()  # ten inputs that a first pass gets wrong and is not sure of
    first = look_calibration._Pass(0.4, apart, margins, weights)

    def best(share: float, distances: Tensor) -> LookPoint:
        alone = look_calibration._Pass(0.4 + share, distances, margins, weights)
        return look_calibration._best(0.4 + share, {0.4: first, 0.4 + share: alone}, 0.0)

    assert best(0.2, apart / 2).base == 0.4  # 13 of 100 are looked at, and none is left wrong
    assert best(0.02, apart).base == pytest.approx(0.42)  # none would be
    assert best(0.1, apart / 10).base == pytest.approx(0.5)  # five left wrong are worse than ten tenths
    assert best(0.2, nothing).base == pytest.approx(0.6)


def test_no_more_than_six_in_ten_are_looked_at_again() -> None:
    gated, data = rare(100)
    assert surgery.calibrate_second_look(gated, data, mode=True)
    shares = {point.budget: point.budget - point.cost for point in state_of(gated).looks}
    assert shares[0.85] == pytest.approx(0.55), "the cheapest first pass leaves that much"
    assert shares[0.95] == pytest.approx(0.45), "it would leave 0.65, so the next one is taken"


def test_what_a_budget_gets_does_not_depend_on_the_one_that_is_set(gated: nn.Module, data: list[Tensor]) -> None:
    found = []
    for budget in (0.5, 0.8):
        surgery.set_budget(gated, budget)
        assert surgery.calibrate_second_look(gated, data, mode=True)
        assert state_of(gated).budget == budget
        found.append({point.budget: point for point in state_of(gated).looks})
    assert found[0] == found[1]
    on = {budget for budget, point in found[0].items() if point.cost < budget}
    assert on and on != set(found[0])  # not all or none: each is decided for itself


class Texts(Net):
    """Mean over the real tokens of padded texts."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        x, real = self.blocks(inputs_embeds), attention_mask[..., None]
        return self.head((x * real).sum(1) / real.sum(1))


def test_texts_count_by_their_real_tokens() -> None:
    """The share of second looks is one of tokens, as the cost is: two long texts are more than six short ones."""
    lengths = torch.tensor([12, 12, 2, 2, 2, 2, 2, 2] * 4)
    mask = (torch.arange(12) < lengths[:, None]).long()
    texts = [{"inputs_embeds": torch.randn(32, 12, 16), "attention_mask": mask} for _ in range(16)]
    gated = surgery.convert(Texts().eval(), 0.7, data=texts, tune="oneshot", second_look=False)
    assert {gate.planned.granularity for _, gate in iter_gates(gated)} == {"token"}
    assert calibrate_second_look(gated, texts, mode=True)
    state = state_of(gated)
    for point in state.looks:
        surgery.set_budget(gated, point.base)
        state.margin = None
        usage = observe(gated, texts)
        margins, weights = margin_of(torch.cat(usage.outputs)).double(), usage.decided.weights.double()
        half = margins < point.margins[50]
        assert set(weights.tolist()) == {2.0, 12.0}
        cautious = 0.5 - 1.64 * 0.5 * float((weights / weights.sum()).square().sum().sqrt())
        assert cautious < 0.47
        assert float(weights[half].sum() / weights.sum()) == pytest.approx(cautious, abs=0.03)


def test_looks_from_the_middle_cost_what_runs_behind() -> None:
    costs = CostModel("flops", 10.0, {name: SiteCost(2.0, 0.5, 0.1) for name in "abc"})
    assert looks_trial.tail("abc", "b") == ("b", "c")
    assert looks_trial.price_of(costs, "abc") == 1.0
    assert looks_trial.price_of(costs, ("b", "c")) == pytest.approx(0.8)
    with pytest.raises(typer.BadParameter, match="no site named 'd'"):
        looks_trial.tail("abc", "d")


def test_saved_and_loaded(looking: nn.Module, dense: nn.Module, data: list[Tensor], tmp_path) -> None:  # type: ignore[no-untyped-def]
    surgery.save(looking, tmp_path / "out")
    again = surgery.load(tmp_path / "out", model=dense)
    assert state_of(again).margin == state_of(looking).margin
    with torch.no_grad():
        assert torch.equal(again(data[1]), looking(data[1]))


def test_a_model_without_classes_is_refused(data: list[Tensor]) -> None:
    model = nn.Sequential(*(Block(16) for _ in range(4)), nn.Unflatten(1, (4, 4))).eval()
    with pytest.raises(SurgeryError, match="class logits"):
        surgery.convert(model, 0.7, data=data, tune="oneshot", second_look=True)
    gated = surgery.convert(model, 0.7, data=data, tune="oneshot")
    assert state_of(gated).margin is None
