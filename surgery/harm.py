"""First-order harm labels: how much the output would change if one branch were skipped for one sample or token.

`|<gradient of the output margin with respect to the branch's output, branch output minus skip path>|`, for all sites
and all samples or tokens from one backward pass (the first-order term of the Taylor expansion that Molchanov et al.
2017 use for pruning whole filters, here per input).

Axis letters: `N` samples, `T` tokens, `C` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.branches import Branch, added, split_outputs
from surgery.calling import Batch, read_output
from surgery.context import handled, state_of
from surgery.costs import run
from surgery.gates import Gate
from surgery.head_gates import HeadGate
from surgery.objectives import margin
from surgery.routers import Router, SampleRouter
from surgery.sites import CHANNELS_FIRST

_TINY = 1e-12


@dataclass(slots=True)
class HarmLabels:
    """Labels of one site on one batch.

    Args:
        features: Router inputs before standardisation: pooled `(N, F)`, or normalised tokens `(N, *positions, C)`; those
            of its leader where a site shares a router.
        harm: `(N,)`, `(N, *positions)`, or `(N, H)` of heads.
        weights: False at padding, like `harm`; None where everything counts.
    """

    features: Tensor
    harm: Tensor
    weights: Tensor | None


def label_harm(gated: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> dict[str, HarmLabels]:
    """Label every site of a gated model on one batch, with all gates open.

    Costs one forward and one backward pass; the backbone's parameters need no gradient. Where no gradient reaches a site its
    harm is 0; see `surgery.labelling`.
    """
    return harm_and_unreached(gated, batch, generator)[0]


def harm_and_unreached(
    gated: nn.Module, batch: Batch, generator: torch.Generator | None = None
) -> tuple[dict[str, HarmLabels], list[str]]:
    """`label_harm`, and the sites that no gradient reaches: nothing there reaches the output, or the model cuts gradients off.

    Raises:
        RuntimeError: Of torch, if something has no derivative.
    """
    collector = Collector()
    with torch.enable_grad(), handled(gated, collector):
        output = read_output(run(gated, batch))
        values = state_of(gated).gives_values
        objective = margin(output, batch, generator or torch.Generator().manual_seed(0), values=values)
    sites = collector.sites
    gradients: Sequence[Tensor | None] = [None] * len(sites)
    if objective.requires_grad:
        gradients = torch.autograd.grad(objective, [s.probe for s in sites], allow_unused=True)
    labels, unreached = {}, []
    for site, gradient in zip(sites, gradients, strict=True):
        labels[site.gate.site.name] = HarmLabels(site.features, _harm(site, gradient), site.weights)
        if gradient is None:
            unreached.append(site.gate.site.name)
    return labels, unreached


def floor_of(mean: Tensor) -> Tensor:
    """A small share of the mean harm, to be added so that exact zeros have a finite logarithm."""
    return 1e-3 * mean + _TINY


@dataclass(slots=True)
class Seen:
    """One site in one call with all gates open."""

    gate: Gate
    probe: Tensor
    difference: Tensor | None
    """What goes where the branch is skipped; None where the probe is a factor per head, `(N, R, H, 1)`."""
    features: Tensor
    weights: Tensor | None


@dataclass(slots=True)
class Collector:
    """Gate handler: open gates, with a zero added to every branch output to take gradients at."""

    sites: list[Seen] = field(default_factory=list)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Execute one gate."""
        stream = residual.detach()
        difference = None
        if isinstance(gate, HeadGate):
            probes: list[Tensor] = []
            value, escaped = gate.weighed(branch, inputs, len(residual), lambda x: _scaled(x, probes))
            probe = probes[0]
        else:
            value, escaped = split_outputs(branch, branch(*inputs))
            probe = torch.zeros_like(value, requires_grad=True)
            with torch.no_grad():
                difference = value.detach() - gate.skip_path(stream)
            value = value + probe
        with torch.no_grad():
            weights = gate.padding(stream) if gate.per_token else None
            features = self._features(gate, stream)
        self.sites.append(Seen(gate, probe, difference, features, weights))
        result = added(branch, left, value)
        return (result, *escaped) if branch.escapes else result

    def _features(self, gate: Gate, stream: Tensor) -> Tensor:
        if gate.leader:
            return next(seen.features for seen in reversed(self.sites) if seen.gate is gate.leader[0])
        if isinstance(gate.router, SampleRouter):
            return gate.router.pool(stream, gate.pooled_tokens(stream))
        assert isinstance(gate.router, Router)
        return gate.router.extract(stream)


def _scaled(x: Tensor, probes: list[Tensor]) -> Tensor:
    """`x` `(N, R, H, D)` times a one per head, at which gradients are taken."""
    probes.append(torch.ones_like(x[..., :1], requires_grad=True))
    return x * probes[-1]


def _harm(site: Seen, gradient: Tensor | None) -> Tensor:
    if site.difference is None:  # the effect of a head, unsigned per position
        return torch.zeros_like(site.probe[:, 0, :, 0]) if gradient is None else gradient.float().abs().sum((1, 3))
    if gradient is None:  # the branch does not reach the output
        shape = site.difference.shape[:-1] if site.gate.per_token else site.difference.shape[:1]
        return torch.zeros(shape, device=site.difference.device)
    product = gradient.float() * site.difference.float()
    channels = 1 if site.gate.site.layout in CHANNELS_FIRST else -1
    harm = product.sum(channels).abs()  # N *positions
    # effects of different positions cancel to first order but not when a whole branch goes, so they are added up
    # unsigned
    return harm if site.gate.per_token or harm.dim() == 1 else harm.flatten(1).sum(1)
