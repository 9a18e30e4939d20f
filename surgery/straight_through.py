"""Gates in training: hard decisions forward, gradients straight through (Bengio et al. 2013, with logistic noise as in
the Gumbel-sigmoid of Jang et al. 2017).

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.branches import Branch, split_outputs
from surgery.gates import Gate
from surgery.head_gates import HeadGate
from surgery.sites import CHANNELS_FIRST, Layout
from surgery.state import CostModel


@dataclass(slots=True)
class SoftDecision:
    """What one gate decided for one batch.

    Args:
        gate: The gate.
        scores: `(N,)` or `(N, *positions)`, differentiable with respect to the router only.
        leaf: The same values, cut off, where the gradient of the loss arrives.
        probability: Of staying open, without gradient.
        active: The decisions.
        padding: False at padding, or None.
    """

    gate: Gate
    scores: Tensor
    leaf: Tensor
    probability: Tensor
    active: Tensor
    padding: Tensor | None


@dataclass(slots=True)
class SoftGates:
    """Gate handler: decisions at one threshold, with noise that is drawn for the whole batch.

    Args:
        size: Samples in the whole batch, of which this process has `rows`.
        rows: Which rows these are.
        threshold: Scores above it keep the branch.
        noise: Scale of the logistic noise.
        seed: Seed of the noise.
        watched: Sites after which the residual stream is kept.
    """

    size: int
    rows: Tensor
    threshold: float
    noise: float
    seed: int
    watched: frozenset[str] = frozenset()
    decided: list[SoftDecision] = field(default_factory=list)
    streams: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Execute one gate."""
        if gate.always_on:
            opened = gate.open(branch, left, inputs)
            self._watch(gate, left, opened[0] if branch.escapes else opened)
            return opened
        scores = gate.scores(residual.detach())
        leaf = scores.detach().requires_grad_()
        logits = leaf - self.threshold + self._noise(leaf)
        probability = torch.sigmoid(logits)
        active = logits > 0
        if isinstance(gate, HeadGate):
            weights = (active + probability - probability.detach())[:, None, :, None]  # N 1 H 1
            term, escaped = gate.weighed(branch, inputs, len(residual), lambda x: x * weights.to(x.dtype))
        else:
            value, escaped = split_outputs(branch, branch(*inputs))
            skipped = gate.skip_path(residual)
            term = torch.where(gate.expand(active, value), value, skipped)
            gradient_only = gate.expand(probability - probability.detach(), value).to(value.dtype)
            term = term + gradient_only * (value - skipped).detach()
        padding = gate.padding(residual) if gate.per_token else None
        self.decided.append(SoftDecision(gate, scores, leaf, probability.detach(), active, padding))
        result = term if left is None else left + term
        self._watch(gate, left, result)
        return (result, *escaped) if branch.escapes else result

    def _watch(self, gate: Gate, left: Tensor | None, stream: Tensor) -> None:
        if gate.site.name in self.watched and left is not None:
            self.streams[gate.site.name] = stream

    def _noise(self, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 997 + len(self.decided)) % (2**63))
        uniform = torch.rand((self.size, *logits.shape[1:]), generator=generator)[self.rows].clamp(1e-4, 1 - 1e-4)
        return self.noise * torch.logit(uniform).to(logits.device)


@dataclass(slots=True)
class OpenGates:
    """Gate handler: the dense model, with the residual stream kept after the watched sites."""

    watched: frozenset[str]
    streams: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor | None] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Execute one gate."""
        result = gate.open(branch, left, inputs)
        if gate.site.name in self.watched and left is not None:
            # a copy, since an activation may go on in place
            self.streams[gate.site.name] = (result[0] if branch.escapes else result).detach().clone()
            self.masks[gate.site.name] = gate.padding(residual)
        return result


def prices(decided: Sequence[SoftDecision], costs: CostModel) -> tuple[list[Tensor], Tensor, Tensor]:
    """What decisions cost.

    Returns:
        Per gate the cost of every decision that stays open, as a fraction of the dense model's cost on these samples
        times their weight, in the shape of its scores; the weighted sum of the samples' costs; the sum of the weights.
        A sample weighs its number of real tokens where gates decide per token on padded input, else 1.
    """
    counts = next((d.padding.float().sum(1) for d in decided if d.padding is not None), None)
    first = decided[0].leaf
    weights = torch.ones(len(first), device=first.device) if counts is None else counts
    asked = {unit for one in decided for unit in one.gate.site.units}  # all others are always on
    each_site = [s.router + (s.skip if name in asked else s.branch) for name, s in costs.sites.items()]
    constant = (costs.fixed + sum(each_site)) / costs.dense
    total = constant * weights.sum()
    each = []
    for one in decided:
        saving = one.gate.saving() / costs.dense
        if one.padding is not None:
            price = saving * one.padding.float()
        else:
            positions = max(one.leaf[0].numel(), 1)
            price = saving / positions * weights.view(-1, *(1,) * (one.leaf.dim() - 1)).expand_as(one.leaf)
        total = total + (price * one.active).sum()
        each.append(price)
    return each, total, weights.sum()


def stream_error(student: dict[str, Tensor], teacher: OpenGates, layouts: dict[str, Layout]) -> Tensor:
    """Relative squared error of the residual streams, `(N,)`, averaged over the watched sites.

    Feature maps: error over energy. Tokens: after LayerNorm, which is how the next layer sees them; padding excluded.
    """
    errors = []
    for name, target in teacher.streams.items():
        stream = student[name].float()
        target = target.float()
        if layouts[name] in CHANNELS_FIRST:
            errors.append(
                (stream - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1).clamp_min(1e-12)
            )
            continue
        shape = target.shape[-1:]
        error = (F.layer_norm(stream, shape) - F.layer_norm(target, shape)).square().mean(-1)  # N *positions
        mask = teacher.masks[name]
        if mask is not None:
            errors.append((error * mask).sum(1) / mask.sum(1).clamp_min(1))
        else:
            errors.append(error.flatten(1).mean(1) if error.dim() > 1 else error)
    if not errors:
        return torch.zeros(())
    return torch.stack(errors).mean(0)


def watched_sites(names: Sequence[str], count: int = 5) -> frozenset[str]:
    """Sites spread over the depth, none in the last part: what happens there is seen in the output."""
    places = (round(len(names) * k / (count + 1)) for k in range(1, count + 1) if len(names) > k)
    return frozenset(names[max(place, 1) - 1] for place in places)


def router_gradients(
    decided: Sequence[SoftDecision], upstream: Sequence[Tensor], routers: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Gradients of the routers' parameters, given those of the scores."""
    found = torch.autograd.grad(
        [d.scores for d in decided], routers, list(upstream), retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(routers, found, strict=True)]
