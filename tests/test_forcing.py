"""Forced decisions: a counter-based draw that depends on (seed, site, sample id, position) and on nothing else."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from subjects import assert_equal, differ, outputs, subject

import surgery
from surgery.context import draw, state_of, tape

IDS = torch.arange(4000)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_rate_is_the_share_of_true(rate: float) -> None:
    limit = 4 * math.sqrt(rate * (1 - rate) / len(IDS))  # four standard errors
    for seed in range(3):
        assert abs(float(draw(rate, seed, "blocks.0.mlp", IDS, None).float().mean()) - rate) <= limit


def test_draws_of_sites_seeds_and_positions_are_independent() -> None:
    base = draw(0.5, 0, "blocks.0.mlp", IDS, None)
    limit = 4 * 0.5 / math.sqrt(len(IDS))
    for other in (draw(0.5, 1, "blocks.0.mlp", IDS, None), draw(0.5, 0, "blocks.1.mlp", IDS, None), base.roll(1)):
        assert abs(float((base == other).float().mean()) - 0.5) <= limit
    positions = torch.arange(8).expand(len(IDS), 8)
    tokens = draw(0.5, 0, "blocks.0.mlp", IDS, positions)
    assert tokens.shape == (len(IDS), 8)
    for a in range(8):
        for b in range(a):
            assert abs(float((tokens[:, a] == tokens[:, b]).float().mean()) - 0.5) <= limit


def test_draw_depends_on_ids_only() -> None:
    order = torch.randperm(len(IDS))
    assert torch.equal(draw(0.3, 0, "a", IDS[order], None), draw(0.3, 0, "a", IDS, None)[order])


def test_lower_rate_opens_a_part_of_the_higher() -> None:
    low, high = draw(0.3, 0, "a", IDS, None), draw(0.6, 0, "a", IDS, None)
    assert not (low & ~high).any()


def test_negative_and_large_seeds() -> None:
    for seed in (-1, 2**31, 2**40):
        assert 0.4 < float(draw(0.5, seed, "a", IDS, None).float().mean()) < 0.6


def decisions(name: str, samples: Any = None, calls: int = 1, rate: float = 0.5, size: int = 2) -> list[torch.Tensor]:
    """Decisions of `calls` calls of `size` samples each, all sites side by side."""
    one = subject(name)
    example = one.entry.example(size, seed=1)
    with surgery.force(one.gated, rate, samples=samples), tape(one.gated) as events:
        for _ in range(calls):
            outputs(one.gated, example)
    return [event.decisions for event in events]


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/vit_pico", "transformers/llama"])
def test_ids_run_on_from_call_to_call(name: str) -> None:
    sites = len(subject(name).sites)
    twice = decisions(name, calls=2)
    once = decisions(name, samples=[0, 1]) + decisions(name, samples=[2, 3])
    assert len(twice) == 2 * sites
    assert all(torch.equal(a, b) for a, b in zip(twice, once, strict=True))


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/vit_pico", "transformers/llama"])
def test_gates_are_open_at_the_rate(name: str) -> None:
    found = torch.cat([d.flatten() for d in decisions(name, rate=0.8, size=32)]).float()
    assert abs(float(found.mean()) - 0.8) < 4 * 0.4 / math.sqrt(len(found))


def test_expanded_rows_share_their_sources_id() -> None:
    """As beam search expands them: two rows of each sample, side by side."""
    pair, expanded = (decisions("timm/test_resnet", samples=[5, 9], size=size) for size in (2, 4))
    assert all(torch.equal(d, p.repeat_interleave(2, 0)) for d, p in zip(expanded, pair, strict=True))


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/vit_pico", "transformers/llama"])
def test_branch_runs_where_the_score_is_above_the_threshold(name: str) -> None:
    one = subject(name)
    state = state_of(one.gated)
    before = state.threshold
    open_sites = []
    try:
        for threshold in (float("-inf"), -0.5, 0.0, 0.5, float("inf")):
            state.threshold = threshold
            with surgery.execution(one.gated, "skip"), tape(one.gated) as events:
                outputs(one.gated, one.example)
            for event in events:
                assert event.scores is not None
                assert torch.equal(event.decisions, event.scores > threshold), event.site
            first = events[0].decisions  # upstream of all others, so it is monotone
            open_sites.append(int(first.sum()))
            if math.isinf(threshold):
                assert all(bool(event.decisions.all()) == (threshold < 0) for event in events)
    finally:
        state.threshold = before
    assert open_sites == sorted(open_sites, reverse=True) and open_sites[0] > open_sites[-1] == 0


def test_sites_not_named_are_routed() -> None:
    one = subject("timm/vit_pico")
    named = one.sites.names[1]
    with surgery.execution(one.gated, "skip"), surgery.force(one.gated, {named: False}), tape(one.gated) as events:
        outputs(one.gated, one.example)
    assert [event.scores is None for event in events] == [site == named for site in one.sites.names]


def test_blocks_nest_and_end() -> None:
    one = subject("timm/vit_pico")
    plain = outputs(one.gated, one.example)
    with surgery.force(one.gated, 0.0):
        closed = outputs(one.gated, one.example)
        with surgery.force(one.gated, 1.0):
            assert_equal(outputs(one.gated, one.example), outputs(one.model, one.example))
        assert_equal(outputs(one.gated, one.example), closed)
    with pytest.raises(RuntimeError, match="stop"), surgery.force(one.gated, 0.0):
        raise RuntimeError("stop")
    assert_equal(outputs(one.gated, one.example), plain)
    assert differ(closed, plain)


def test_threads_do_not_see_each_other() -> None:
    one = subject("timm/vit_pico")
    rates, ids = (0.0, 1.0, 0.5), range(len(one.example))
    expected = []
    for rate in rates:
        with surgery.force(one.gated, rate, samples=ids):
            expected.append(outputs(one.gated, one.example))
    plain = outputs(one.gated, one.example)
    inside = threading.Barrier(len(rates))

    def work(rate: float) -> list[Any]:
        with surgery.force(one.gated, rate, samples=ids):
            inside.wait(60)  # all blocks are open at once
            return [outputs(one.gated, one.example) for _ in range(5)]

    with surgery.force(one.gated, 0.25), ThreadPoolExecutor(len(rates)) as pool:
        found = list(pool.map(work, rates))
        assert_equal(pool.submit(outputs, one.gated, one.example).result(), plain)
    for several, one_of in zip(found, expected, strict=True):
        for output in several:
            assert_equal(output, one_of)


def test_draws_of_few_and_of_many_samples_are_the_same() -> None:
    many = torch.arange(-3, 500)
    for seed in (0, 7, 2**31 - 1):
        whole = draw(0.37, seed, "blocks.3.mlp", many, None)
        parts = [draw(0.37, seed, "blocks.3.mlp", part, None) for part in many.split(5)]
        assert torch.equal(torch.cat(parts), whole)
        assert 0.3 < whole.float().mean() < 0.45


def test_draws_of_few_and_of_many_tokens_are_the_same() -> None:
    positions = torch.arange(50).expand(3, 50)
    samples = torch.tensor([4, 0, 2**40])
    many = draw(0.4, -3, "a", samples, positions)
    few = [draw(0.4, -3, "a", samples, positions[:, t : t + 1]) for t in range(50)]
    assert torch.equal(torch.cat(few, 1), many)


def test_draws_of_nothing() -> None:
    none = torch.arange(0)
    assert draw(0.4, 0, "a", none, None).dtype == torch.bool
    assert draw(0.4, 0, "a", torch.arange(3), none.expand(3, 0)).dtype == torch.bool
