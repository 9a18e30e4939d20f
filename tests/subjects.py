"""The zoo's networks as the tests use them: built and converted once, compared tensor by tensor."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.calling import as_batch
from surgery.calling import tensors as read_tensors
from surgery.context import state_of
from surgery.gates import iter_gates
from surgery.scripts.zoo import Entry, Example, call, find


@dataclass(frozen=True)
class Subject:
    """A network of the zoo, an example, its sites, and a gated copy that tests must leave as it is."""

    entry: Entry
    model: nn.Module
    example: Example
    sites: surgery.Sites
    plan: surgery.Plan
    gated: nn.Module


@functools.cache
def subject(name: str) -> Subject:
    """The converted network of the entry `name`; all tests share it.

    Args:
        name: Name of an entry, or `<name>@sample` for one decision per sample wherever the probes allow it.
    """
    name, _, granularity = name.partition("@")
    entry = find(name)
    model, example = entry.build()
    sites = surgery.find_sites(model, example)
    plan = with_skip_paths(sites.plan(granularity=granularity or "auto"))  # type: ignore[arg-type]
    return Subject(entry, model, example, sites, plan, enliven(surgery.insert_gates(model, plan)))


def with_skip_paths(plan: surgery.Plan) -> surgery.Plan:
    """The plan with a skip path at every site, whatever is chosen by default, so that laws see what it adds; every second branch
    that is a chain gets a narrow one.
    """
    chains = [p.site.name for p in plan.sites if p.site.chain is not None][1::2]

    def chosen(planned: surgery.SitePlan) -> surgery.SitePlan:
        if planned.site.name in chains and planned.site.chain is not None:
            return replace(planned, skip="narrow", rank=max(1, planned.site.chain.width // 2))
        plain = planned.skip != "identity" or planned.site.layout == "other"
        return planned if plain else replace(planned, skip="affine")

    return replace(plan, sites=tuple(map(chosen, plan.sites)))


def enliven(gated: nn.Module, seed: int = 0) -> nn.Module:
    """Give routers and skip paths random parameters, so that decisions vary and skip paths contribute."""
    generator = torch.Generator().manual_seed(seed)

    def randomise(module: nn.Module, spread: float) -> None:
        for parameter in module.parameters():
            parameter.data.copy_(spread * torch.randn(parameter.shape, generator=generator))

    for _, gate in iter_gates(gated):
        randomise(gate.router, 0.5)
        randomise(gate.skip_path, 0.05)
    state_of(gated).threshold = 0.0
    return gated


@torch.no_grad()
def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Every tensor that the model returns, keys and values of a cache included."""
    result = call(model, example)
    found = read_tensors(result)
    cache = getattr(result, "past_key_values", None)
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        for layer in getattr(part, "layers", ()):
            found += [layer.keys, layer.values]
    assert found
    return found


def rows(example: Example, index: list[int]) -> Any:
    """The samples of `example` that `index` names, in that order."""
    batch = as_batch(example).rows(torch.tensor(index))
    if isinstance(example, Tensor):
        return batch.args[0]
    return dict(batch.kwargs) if isinstance(example, dict) else batch.args


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, (index, a.dtype, b.dtype, a.shape, b.shape)
        if not torch.equal(a, b):
            raise AssertionError(
                f"output {index} of {len(actual)}, {tuple(a.shape)}: largest difference {_gap(a, b):.3g}"
            )


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    """Largest difference of each tensor below `tolerance` times its largest value."""
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, (index, a.shape, b.shape)
        gap = _gap(a, b)
        if not gap <= tolerance:
            raise AssertionError(f"output {index} of {len(actual)}, {tuple(a.shape)}: relative difference {gap:.3g}")


def differ(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> bool:
    """Whether the first floating-point tensors are further apart than `tolerance`."""
    pairs = [(a, b) for a, b in zip(actual, expected, strict=True) if a.is_floating_point()]
    return _gap(*pairs[0]) > tolerance


def _gap(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
