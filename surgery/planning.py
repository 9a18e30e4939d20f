"""Choosing granularity, skip path and router size for every site."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from surgery.errors import PlanMismatch, SurgeryError, check_budget, check_choice, check_count
from surgery.routers import router_features
from surgery.sites import Cost, Granularity, Plan, Routers, Site, SitePlan, Sites, SkipKind, is_in_first

LINEAR_LIMIT = 0.15
"""A full linear or depthwise skip path is chosen where it costs at most this share of its branch."""
LOW_RANK_LIMIT = 0.1
"""A trained low-rank skip path is chosen per token where it costs at most this share of its branch."""
ROUTER_LIMIT = {"sample": 0.005, "token": 0.01}
"""All routers together cost at most this share of the model (reported where even the narrowest ones exceed it)."""
MEMORY_LIMIT = 0.025
"""All routers together hold at most this share of the model's parameters (likewise)."""
LINEAR_MEMORY_LIMIT = 0.1
"""A full linear or depthwise skip path holds at most this share of its branch's parameters."""
WIDTH = 0.5
"""Share of a branch's hidden channels that narrow skip paths keep where no budget is known."""
TOKEN_WIDTH, TOKEN_CHANNELS = 0.125, 0.25
"""The same for decisions per token, and as many of them at most for each channel of the stream (gated MLPs aside)."""
LEAST_PER_TOKEN = 0.4
"""Below this budget what narrow skip paths per token cost is worth more than what they keep."""
WIDEST_FITTED = 4096
"""Hidden channels up to which narrow skip paths per token are fitted by default, since the time for it grows with their cube."""
NARROWEST, WIDEST = 0.2, 0.75
"""Smallest and largest share that a budget asks for; below, other kinds of skip path are better (docs/skip_paths.md)."""
LOWEST = 0.45
"""Budgets from here up are reached with narrow skip paths, where that leaves them wide enough."""
CLOSED_AT_LOWEST, CLOSED = 0.9, 0.7
"""Share of the narrow sites that are closed at the smallest budget; and at the budget itself, where widths go by that (there too
as many as at the smallest, where most sites would else have affine paths, as bottlenecks, for which linear ones cost much)."""
_WIDTHS = (64, 32, 16, 8)


def choose(
    sites: Sites,
    *,
    granularity: Granularity | Literal["auto"],
    skip: SkipKind | Literal["auto"],
    rank: int,
    width: float | Literal["auto"],
    hidden: int | Literal["auto"],
    first_tokens: int | Literal["auto"] = "auto",
    first_layers: int | Literal["auto"] = "auto",
    trained: bool = False,
    routers: Routers = "own",
    cost: Cost = "flops",
    budget: float | None = None,
) -> Plan:
    """See `Sites.plan`."""
    check_choice("cost", cost, get_args(Cost))
    check_choice("granularity", granularity, ("auto", *get_args(Granularity)))
    check_choice("skip", skip, ("auto", *get_args(SkipKind)))
    check_choice("routers", routers, get_args(Routers))
    check_count("rank", rank, 1)
    if hidden != "auto":
        check_count("hidden", hidden, 1)
    if budget is not None:
        budget = check_budget(budget)
    if width != "auto" and (isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < 1):
        raise SurgeryError(f"width must be a number between 0 and 1, or 'auto', got {width!r}")
    layers = _number("first_layers", first_layers, 0)
    grains = {site.name: _granularity(sites, site, granularity) for site in sites}
    kinds = {site.name: _skip(site, skip, grains[site.name], rank if trained else 0, cost, budget) for site in sites}
    shares = {site.name: _token_width(site) if grains[site.name] == "token" else WIDTH for site in sites}
    chains = [site for site in sites if site.chain is not None and grains[site.name] != "token" and _is_map(site)]
    affine = [site for site in chains if _skip(site, "auto", grains[site.name], 0, cost, budget) == "affine"]
    wanted = _narrow_width(sites, chains, budget, CLOSED_AT_LOWEST if _flops(affine) > _flops(chains) / 2 else CLOSED)
    if skip == "auto" and cost == "flops" and wanted >= NARROWEST:
        kinds |= {site.name: "narrow" for site in chains if _hidden(site, wanted)}
    if budget is not None:
        shares |= {site.name: min(max(wanted, NARROWEST), WIDEST) for site in chains}
    if width != "auto":
        shares = dict.fromkeys(shares, width)
    planned = [
        SitePlan(
            site,
            grains[site.name],
            kinds[site.name],
            _rank(site, kinds[site.name], rank, shares[site.name], exact=width != "auto"),
            always_on=is_in_first(layers, site),
        )
        for site in sites
    ]
    if routers == "shared":
        planned = _following(planned)
    widths = {grain: _width(sites, planned, grain) if hidden == "auto" else hidden for grain in set(grains.values())}
    return Plan(
        sites=tuple(replace(one, hidden=widths[one.granularity]) for one in planned),
        model_name=sites.model_name,
        model_flops=sites.model_flops,
        signature=sites.signature,
        patterns=sites.patterns,
        inlined=sites.inlined,
        first_tokens=_number("first_tokens", first_tokens, 0),
    )


def _following(planned: Sequence[SitePlan]) -> list[SitePlan]:
    """Every site follows the one right before it, where that may lead."""
    pairs = itertools.pairwise(planned)
    return [*planned[:1], *(replace(one, leader=last.site.name) if last.may_lead(one) else one for last, one in pairs)]


def _number(name: str, value: int | Literal["auto"], by_default: int) -> int:
    if value == "auto":
        return by_default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SurgeryError(f"{name} must be a whole number of at least 0, or 'auto', got {value!r}")
    return value


def _granularity(sites: Sites, site: Site, wanted: Granularity | Literal["auto"]) -> Granularity:
    if wanted == "auto":
        return "token" if "token" in site.granularities else site.granularities[0]
    if wanted in site.granularities:
        return wanted
    if wanted == "prefill" and "token" in site.granularities and any("prefill" in one.granularities for one in sites):
        return "token"
    if wanted == "prefill":
        raise PlanMismatch(
            f"{site.name}: granularity 'prefill' is for causal language models, found with an example that makes a key/value "
            f"cache (without use_cache=False); this site allows: {', '.join(site.granularities)}"
        )
    return site.granularities[0]


def _skip(
    site: Site, wanted: SkipKind | Literal["auto"], grain: Granularity, rank: int, cost: Cost, budget: float | None
) -> SkipKind:
    """The kind of skip path; `rank` is that of low-rank ones where they will be trained, else 0."""
    if site.layout == "other" or site.kind == "heads":
        return "identity"
    if wanted == "depthwise" and not _is_map(site):
        return "linear"
    if wanted == "narrow" and site.chain is None:
        wanted = "auto"
    if wanted != "auto":
        return wanted
    if grain == "token":  # fitted paths alone did not pay per token, trained ones do (docs/lab/skip_paths.md)
        asked = budget is not None and budget >= LEAST_PER_TOKEN and cost == "flops"
        if rank and asked and site.chain is not None and site.chain.width <= WIDEST_FITTED:
            return "narrow"
        cheap = 4 * site.positions * site.channels * rank <= LOW_RANK_LIMIT * site.flops
        return "low-rank" if rank and cheap else "identity"
    # a depthwise path keeps more for its FLOPs and less for its time (docs/decisions.md)
    kinds: tuple[SkipKind, ...] = ("depthwise", "linear") if _is_map(site) and cost == "flops" else ("linear",)
    return next((kind for kind in kinds if _is_cheap(site, kind)), "affine")


def _narrow_width(sites: Sites, chains: Sequence[Site], budget: float | None, closed: float) -> float:
    """Share of their branches that narrow skip paths of these sites cost; below `NARROWEST` where they would not reach the budget
    with so large a share of them closed, or there is none.
    """
    flops = _flops(chains)
    if budget is None or budget >= 1 or not flops:
        return 0.0
    lowest = 1 - (1 - min(budget, LOWEST)) * sites.model_flops / (CLOSED_AT_LOWEST * flops)
    return lowest if lowest >= NARROWEST else 1 - (1 - budget) * sites.model_flops / (closed * flops)


def _token_width(site: Site) -> float:
    """Share of the hidden channels that a narrow path keeps where tokens are decided."""
    if site.chain is None or site.chain.gated:
        return TOKEN_WIDTH
    return min(TOKEN_WIDTH, TOKEN_CHANNELS * site.channels / site.chain.width)


def _flops(sites: Iterable[Site]) -> float:
    return sum(site.flops for site in sites)


def _hidden(site: Site, share: float) -> int:
    """Hidden channels of a narrow path that costs at most this share of its branch, rounded down; 0 where none does."""
    if site.chain is None:
        return 0
    if not site.chain.inner:
        return int(share * site.chain.width + 1e-6)
    limit = share * site.chain.flops(site.channels, site.chain.width)
    return next((n for n in range(site.chain.width, 0, -1) if site.chain.flops(site.channels, n) <= limit), 0)


def _rank(site: Site, kind: SkipKind, rank: int, width: float, *, exact: bool) -> int:
    """Rank of a low-rank path; hidden channels of a narrow one, as large a share of all (`exact`) or of the branch's FLOPs."""
    if kind != "narrow" or site.chain is None:
        return rank if kind == "low-rank" else 0
    return max(1, int(width * site.chain.width) if exact else _hidden(site, width))


def _is_map(site: Site) -> bool:
    """Whether the stream is a feature map, whose positions have neighbours."""
    return site.layout == "NCHW" and site.positions > 1


def _is_cheap(site: Site, kind: SkipKind) -> bool:
    weights = site.channels * (site.channels + (9 if kind == "depthwise" else 0))
    cheap = 2 * site.positions * weights <= LINEAR_LIMIT * site.flops
    return cheap and weights <= LINEAR_MEMORY_LIMIT * site.parameters


def _width(sites: Sites, planned: Iterable[SitePlan], grain: Granularity) -> int:
    limit = ROUTER_LIMIT["token" if grain == "token" else "sample"] * sites.model_flops
    memory = MEMORY_LIMIT * sites.model_parameters
    ours = [one for one in planned if one.granularity == grain]

    def fits(width: int) -> bool:
        flops = sum(2 * (one.site.positions if grain == "token" else 1) * _weights(one, width) for one in ours)
        return flops <= limit and sum(_weights(one, width) for one in ours) <= memory

    return next((width for width in _WIDTHS if fits(width)), _WIDTHS[-1])


def _weights(planned: SitePlan, width: int) -> int:
    """Weights of one site's router."""
    site = planned.site
    features = 0 if planned.leader else router_features(site.layout, site.channels, planned.granularity)
    return width * (features + 1)
