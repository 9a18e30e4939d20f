"""Other policies: what they decide, and what they cost, by hand."""

from __future__ import annotations

import pytest
import torch
from subjects import assert_equal, outputs, rows, subject
from torch.nn import functional as F

import surgery
from surgery import policies
from surgery.context import handled, tape
from surgery.costs import Decided
from surgery.gates import iter_gates
from surgery.policies import Cut, Importance, decided
from surgery.state import CostModel, SiteCost

# 100 in all, of which 20 are outside of branches
COSTS = CostModel(
    "flops", 100.0, {"a": SiteCost(50.0, 5.0, 1.0), "b": SiteCost(20.0, 0.0, 1.0), "c": SiteCost(10.0, 0.0, 1.0)}
)
RANKS = {"a": 0.2, "b": 0.9, "c": 0.5}


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (0.10, Cut((), (), 0.0)),  # below everything closed: 25
        (0.25, Cut((), (), 0.0)),
        (0.35, Cut((), ("b",), 0.5)),  # 25 .. 45
        (0.45, Cut(("b",), ("b",), 0.0)),
        (0.55, Cut(("b", "c"), ("b", "c"), 0.0)),
        (0.775, Cut(("b", "c"), ("b", "c", "a"), 0.5)),  # 55 .. 100
        (1.02, Cut(("b", "c", "a"), ("b", "c", "a"), 0.0)),
    ],
)
def test_cut_lies_between_two_attainable_costs(cost: float, expected: Cut) -> None:
    found = policies.cut(COSTS, RANKS, cost)
    assert set(found.lower) == set(expected.lower) and set(found.upper) == set(expected.upper)
    # where a cost is met exactly, either neighbour may stand for it
    price = (1 - found.share) * policies.static_cost(COSTS, found.lower) + found.share * policies.static_cost(
        COSTS, found.upper
    )
    assert price == pytest.approx(min(max(cost, 0.25), 1.0))
    if expected.share:
        assert found.share == pytest.approx(expected.share)


def test_cut_keeps_the_highest_ranks() -> None:
    assert policies.cut(COSTS, RANKS, 0.30).upper == ("b",)
    assert policies.cut(COSTS, {"a": 0.2, "b": 0.9, "c": 0.95}, 0.30).upper == ("c",)


def test_decided_counts_routers_only_where_they_ran() -> None:
    rates = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 0.0]])
    weights = torch.tensor([3.0, 1.0])
    routed, looked = torch.tensor([True, False, False]), torch.zeros(len(rates), dtype=torch.bool)
    found = Decided(("a", "b", "c"), rates, weights, routed, looked)
    assert found.active_rate == {"a": 0.75, "b": 0.5, "c": 0.0}
    # 20 outside, a: 0.75*50 + 0.25*5 + 1, b: 0.5*20
    assert found.cost(COSTS) == pytest.approx((20 + 38.75 + 1 + 10) / 100)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/mixer", "transformers/bert"])
def test_constant_policies_are_forced_decisions(name: str) -> None:
    one = subject(name)
    kept = one.sites.names[::2]
    with decided(one.gated, policies.constant(kept)) as events:
        found = outputs(one.gated, one.example)
    with surgery.force(one.gated, {site: site in kept for site in one.sites.names}):
        assert_equal(found, outputs(one.gated, one.example))
    assert [event.site for event in events] == list(one.sites.names)


@pytest.mark.parametrize("name", ["timm/test_resnet", "transformers/bert"])
def test_random_policies_have_the_rates_and_do_not_see_the_batch(name: str) -> None:
    one = subject(name)
    example = one.entry.example(40)
    rates = {site: index % 3 / 2 for index, site in enumerate(one.sites.names)}
    with decided(one.gated, policies.random(rates, 0, 0)) as events:
        outputs(one.gated, example)
    for event in events:
        assert event.rate() == pytest.approx(rates[event.site], abs=0.25)
        assert event.decisions.dim() == (2 if event.gate.per_token else 1)
    with decided(one.gated, policies.random(rates, 0, 30)) as later:
        outputs(one.gated, rows(example, list(range(30, 40))))
    assert_equal([e.decisions for e in later], [e.decisions[30:] for e in events])


@pytest.mark.parametrize("name", ["timm/test_resnet", "transformers/bert"])
def test_shuffling_moves_decisions_between_inputs_and_keeps_their_number(name: str) -> None:
    one = subject(name)
    example = one.entry.example(16)
    with surgery.force(one.gated, 0.5), tape(one.gated) as events:
        outputs(one.gated, example)
    with decided(one.gated, policies.shuffled(events, seed=1)) as others:
        outputs(one.gated, example)
    moved = 0
    for mine, other in zip(events, others, strict=True):
        real = slice(None) if mine.weights is None else mine.weights.bool()
        assert int(mine.decisions[real].sum()) == int(other.decisions[real].sum())
        if mine.weights is not None:
            assert torch.equal(mine.decisions[~mine.weights.bool()], other.decisions[~mine.weights.bool()])
        moved += int((mine.decisions != other.decisions).sum())
    assert moved
    sample_wise = [(m.decisions, o.decisions) for m, o in zip(events, others, strict=True) if m.decisions.dim() == 1]
    if sample_wise:  # one permutation for all sites: whole policies move
        mine, theirs = (sorted(map(tuple, torch.stack(side, 1).tolist())) for side in zip(*sample_wise, strict=True))
        assert mine == theirs


def test_importance_is_one_minus_the_cosine_of_the_stream_before_and_after() -> None:
    one = subject("timm/vit_pico")
    importance = Importance()
    with torch.no_grad(), handled(one.gated, importance):
        one.gated(one.example)
    assert set(importance.scores) == set(one.sites.names)
    # the last MLP's residual stream is the block's input plus its attention
    block = one.model.blocks[-1]  # type: ignore[union-attr,index]
    kept: list[torch.Tensor] = []
    handle = block.norm2.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    after = block.register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        one.model(one.example)
    handle.remove()
    after.remove()
    expected = float((1 - F.cosine_similarity(kept[0], kept[1], dim=-1)).mean())
    name = [gate.site.name for _, gate in iter_gates(one.gated)][-1]
    assert importance.scores[name] == pytest.approx(expected, rel=1e-4)
