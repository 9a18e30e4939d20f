"""Widths of narrow skip paths: what plans and budgets ask for, and what that costs."""

from __future__ import annotations

import pytest
import torch
from branch_toys import MAPS, Bottleneck, C, Inverted
from subjects import subject
from torch import nn
from toys import Stack, convolution, mlp, path_of

import surgery
from surgery.errors import SurgeryError


def test_a_bottleneck_is_as_wide_as_a_share_of_its_compute_allows() -> None:
    model = Stack(*(Bottleneck(32, 8, 8) for _ in range(4))).eval()
    sites = surgery.find_sites(model, torch.randn(2, 32, 8, 8))
    chain = sites[0].chain
    assert chain is not None and chain.flops(32, 8) == pytest.approx(sites[0].flops / 64)
    share = 1 - 0.55 / 0.9  # with nine of ten closed 0.45 is reached
    for planned in sites.plan(budget=0.6).sites:
        assert planned.skip == "narrow"
        assert planned.rank > int(share * 8)  # the convolution in the middle costs the square of its width
        assert path_of("narrow", 32, "NCHW", planned.rank, chain).flops(64) <= share * planned.site.flops
        assert path_of("narrow", 32, "NCHW", planned.rank + 1, chain).flops(64) > share * planned.site.flops


def test_where_only_affine_paths_are_left_narrow_ones_may_be_as_narrow_as_the_budget_asks() -> None:
    model = Stack(*(Bottleneck(32, 8, 8) for _ in range(12)), head=nn.Conv2d(32, 32, 3, padding=1)).eval()
    sites = surgery.find_sites(model, torch.randn(2, 32, 8, 8))
    share = sum(site.share for site in sites)
    assert 0.5 < share < 0.7
    for budget, skip in ((0.9, "narrow"), (0.6, "narrow"), (0.5, "affine")):
        planned = sites.plan(budget=budget).sites
        assert {p.skip for p in planned} == {skip}, budget
    assert 1 - 0.4 / (0.7 * share) < 0.2 < 1 - 0.4 / (0.9 * share)  # else 0.6 would tell nothing


def test_plans_take_them_where_a_branch_is_a_chain() -> None:
    model = Stack(Inverted(), Inverted(), nn.Conv2d(C, C, 3, padding=1))
    sites = surgery.find_sites(model.eval(), torch.randn(2, *MAPS[1:]))
    planned = sites.plan(skip="narrow", width=0.3).sites
    assert [(p.skip, p.rank) for p in planned] == [("narrow", 4), ("narrow", 4), (sites.plan().sites[2].skip, 0)]
    for width in (0, 1, 1.5, True, "half"):
        with pytest.raises(SurgeryError, match="width must be"):
            sites.plan(skip="narrow", width=width)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["timm/test_resnet", "timm/vit_pico", "plain/encoder", "transformers/bert", "transformers/llama", "timm/resnet50"],
)
def test_costs_are_what_runs(name: str) -> None:
    one = subject(name)
    chains = [p for p in one.sites.plan().sites if p.site.chain is not None]
    assert chains, name
    for planned in chains[:1]:
        chain = planned.site.chain
        assert chain is not None
        path = path_of("narrow", planned.site.channels, planned.site.layout, chain.width, chain)
        # with all of its channels it costs what the branch costs
        assert path.flops(planned.site.positions) == pytest.approx(planned.site.flops, rel=0.02)


def test_a_budget_asks_for_narrow_paths_of_the_width_that_reaches_it() -> None:
    model = Stack(*(convolution(16) for _ in range(4))).eval()
    sites = surgery.find_sites(model, torch.randn(2, 16, 8, 8))
    assert sum(site.share for site in sites) == pytest.approx(1)
    for budget, width in ((0.9, 1 - 0.55 / 0.9), (0.6, 1 - 0.55 / 0.9), (0.35, 1 - 0.65 / 0.9)):
        planned = sites.plan(budget=budget).sites
        assert {(p.skip, p.rank) for p in planned} == {("narrow", int(16 * width))}, budget
    for plan in (sites.plan(), sites.plan(budget=0.2), sites.plan(budget=1.0)):
        assert {p.skip for p in plan.sites} == {
            "depthwise"
        }  # nobody asked, or they would be too narrow, or for nothing
    assert {p.skip for p in sites.plan(budget=0.6, cost="latency").sites} == {"linear"}
    assert {p.skip for p in sites.plan(budget=0.6, skip="depthwise").sites} == {"depthwise"}
    assert {p.rank for p in sites.plan(budget=0.6, skip="narrow", width=0.25).sites} == {4}
    assert {p.rank for p in sites.plan(skip="narrow").sites} == {8}
    head = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)))
    half = Stack(convolution(16), head=head).eval()  # 0.45 would take too narrow paths here
    sites = surgery.find_sites(half, torch.randn(2, 16, 8, 8))
    for budget, skip, width in ((0.8, "narrow", 1 - 0.2 / (0.7 * sites[0].share)), (0.6, "depthwise", 0)):
        assert [(p.skip, p.rank) for p in sites.plan(budget=budget).sites] == [(skip, int(16 * width))]
    tokens = surgery.find_sites(Stack(mlp(8)).eval(), torch.randn(2, 5, 8))
    assert {p.skip for p in tokens.plan(budget=0.6).sites} == {"identity"}
    assert {(p.skip, p.rank) for p in tokens.plan(trained=True, budget=0.4).sites} == {("narrow", 8 // 4)}
    slim = surgery.find_sites(
        Stack(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))).eval(), torch.randn(2, 5, 8)
    )
    assert {(p.skip, p.rank) for p in slim.plan(trained=True, budget=0.4).sites} == {("narrow", 8 // 8)}
    for plan in (tokens.plan(trained=True), tokens.plan(trained=True, budget=0.39)):
        assert "narrow" not in {p.skip for p in plan.sites}
    assert "narrow" not in {p.skip for p in tokens.plan(trained=True, budget=0.6, cost="latency").sites}


def test_a_conversion_looks_at_the_smallest_budget_it_trains_for() -> None:
    model = Stack(*(convolution(16) for _ in range(8)), head=nn.Linear(16, 3), pool=True).eval()
    data = [torch.randn(16, 16, 6, 6) for _ in range(5)]
    for budgets, kind in ((None, "narrow"), ((0.2, 0.9), "depthwise")):
        options = surgery.Options(steps=1, budgets=budgets)
        gated = surgery.convert(model, 0.7, data=data, options=options, samples=64)
        assert {p.skip for p in surgery.context.state_of(gated).plan.sites} == {kind}
