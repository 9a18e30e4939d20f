"""Auxiliary targets of routers in training, against collapse: gates that come to treat all inputs alike.

Both are gradients of scores alone, and neither says how much a gate should be open, only for which inputs:

- *harm*: scores of one gate should differ between inputs as the logarithms of first-order harm do (`surgery.harm`),
  labelled anew for every batch with the skip paths as they are by then;
- *diversity*: the mutual information of input and decision, which is large where every decision is sure and their mean
  is not (Krause et al. 2010 use it to cluster; Bejnordi et al. 2020 shape the batch's distribution to the same end).

`training` asks for them where `Options.harm_weight` or `Options.diversity_weight` is above 0.

Axis letters: `N` samples, `H` heads, `M` rows: samples, or samples and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from surgery.harm import HarmLabels, floor_of
from surgery.head_gates import HeadGate
from surgery.straight_through import SoftDecision

Total = Callable[[Tensor], Tensor]
"""Sums over all processes."""


def harm_gradients(decided: Sequence[SoftDecision], labels: Mapping[str, HarmLabels], total: Total) -> list[Tensor]:
    """Gradients of half the variance, over inputs, of score minus log harm, averaged over gates.

    Args:
        decided: What the gates decided on the batch.
        labels: Harm by site on the same batch.
        total: Sums over all processes, which have different rows of the batch.

    Returns:
        Per gate, in the shape of its scores.
    """
    weights = [_weights(one) for one in decided]
    harms = [labels[one.gate.site.name].harm.float() for one in decided]
    means = _means(decided, harms, weights, total)
    targets = [torch.log(harm + floor_of(mean)) for harm, mean in zip(harms, means, strict=True)]
    errors = [one.leaf - target for one, target in zip(decided, targets, strict=True)]
    middles = _means(decided, errors, weights, total)
    gradients = [error - middle for error, middle in zip(errors, middles, strict=True)]
    return _shares(decided, gradients, weights, total)


def diversity_gradients(decided: Sequence[SoftDecision], threshold: float, total: Total) -> list[Tensor]:
    """Gradients of minus the mutual information of input and decision, in nats, averaged over gates.

    Args:
        decided: What the gates decided on the batch.
        threshold: The one they were decided at; noise is left out.
        total: As in `harm_gradients`.

    Returns:
        Per gate, in the shape of its scores.
    """
    weights = [_weights(one) for one in decided]
    logits = [(one.leaf.detach() - threshold).clamp(-30.0, 30.0) for one in decided]
    chances = [torch.sigmoid(logit) for logit in logits]
    means = _means(decided, chances, weights, total)
    # d(H(mean p) - mean H(p)) / d logit = p (1 - p) (logit - logit(mean p)), over the number of rows
    gradients = [
        p * (1 - p) * (torch.logit(mean, eps=1e-7) - logit)
        for p, mean, logit in zip(chances, means, logits, strict=True)
    ]
    return _shares(decided, gradients, weights, total)


def _weights(one: SoftDecision) -> Tensor:
    """1 where there was something to decide: not at padding, nor at first tokens that always run."""
    known = one.leaf.detach().isfinite()
    return (known if one.padding is None else known & one.padding).float()


def _means(
    decided: Sequence[SoftDecision], values: Sequence[Tensor], weights: Sequence[Tensor], total: Total
) -> list[Tensor]:
    """Weighted means over all rows of the whole batch, one for every gate, or for every head of it, `(H,)`."""
    sums = [
        torch.stack((_by_column(one.gate, _counted(value, weight)), _by_column(one.gate, weight)))
        for one, value, weight in zip(decided, values, weights, strict=True)
    ]
    joined = total(torch.cat(sums, 1)).to(sums[0])
    parts = joined.split([part.shape[1] for part in sums], 1)
    return [part[0] / part[1].clamp_min(1e-12) for part in parts]


def _shares(
    decided: Sequence[SoftDecision], gradients: Sequence[Tensor], weights: Sequence[Tensor], total: Total
) -> list[Tensor]:
    """Gradients of means over rows and gates, given those of every row."""
    counts = total(torch.stack([weight.sum() for weight in weights]))
    return [
        _counted(gradient, weight) / (count.to(weight).clamp_min(1) * len(decided))
        for gradient, weight, count in zip(gradients, weights, counts, strict=True)
    ]


def _counted(values: Tensor, weights: Tensor) -> Tensor:
    """`values` times `weights`; 0 where these are 0 or the value is no number."""
    return torch.where((weights > 0) & values.isfinite(), values * weights, 0.0)


def _by_column(gate: object, values: Tensor) -> Tensor:
    """Sums over rows: `(H,)` of heads, else `(1,)`."""
    return values.sum(0) if isinstance(gate, HeadGate) else values.sum().reshape(1)
