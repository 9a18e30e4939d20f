"""Narrow skip paths: which hidden channels of a branch to keep.

Channels are left out by the error that leaving one out brings when all others are solved anew, which is that of Optimal Brain
Surgeon (Hassibi & Stork 1993) for a linear map of `k x k` taps per channel, in rounds.

Axis letters: `M` rows, `H` hidden channels, `K` taps of the last map's kernel, `C` channels of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery import least_squares
from surgery.chains import Weights
from surgery.rows import gathered
from surgery.skip_paths import NarrowSkip, first_features

ROUND = 0.1
"""Share of the channels that are left, which one round leaves out."""
_CHUNK = 2**13


def narrowest(features: Tensor, wanted: Tensor, width: int, ridge: float = least_squares.RIDGE) -> Tensor:
    """The channels to keep.

    Args:
        features: What the last map reads, `(M, H, K)`.
        wanted: What it should give, `(M, C)`.
        width: How many channels to keep.
        ridge: Relative to the mean variance of the features.

    Returns:
        Their numbers in ascending order, `(width,)`.
    """
    channels, taps = features.shape[1:]
    gram, cross = _moments(features.flatten(1), wanted)
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-30)
    kept = torch.arange(channels, device=features.device)
    while len(kept) > width:
        flat = (kept[:, None] * taps + torch.arange(taps, device=kept.device)).flatten()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[flat][:, flat]))
        weight = (inverse @ cross[flat]).view(len(kept), taps, -1)
        own = inverse.view(len(kept), taps, len(kept), taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # H K K
        harm = (weight * torch.linalg.solve(own, weight)).sum((1, 2))
        left = max(width, min(len(kept) - 1, int(len(kept) * (1 - ROUND))))
        kept = kept[harm.argsort(descending=True)[:left].sort().values]
    return kept


def adopt(path: NarrowSkip, weights: Weights, kept: Tensor) -> None:
    """Give a path these channels of its branch; its last map is left to the fit, and what stands before a full convolution in the
    middle to `fit_middle`.
    """
    if not path.inner:
        path.first.copy_(weights.first[0][kept])
        path.first_bias.copy_(weights.first[1][kept])
        if weights.middle is not None:
            path.middle.copy_(weights.middle[0][kept])
            path.middle_bias.copy_(weights.middle[1][kept])
    if weights.times is not None:
        path.times.copy_(weights.times[0][kept])
        path.times_bias.copy_(weights.times[1][kept])


def adopt_some(path: NarrowSkip, weights: Weights) -> None:
    """Give a path channels of its branch, spread evenly, where there is nothing to choose them by."""
    kept = _spread(path.chain.width, path.width, path.first.device)
    adopt(path, weights, kept)
    if path.inner and weights.middle is not None:
        inner = _spread(path.chain.inner, path.inner, path.first.device)
        path.first.copy_(weights.first[0][inner])
        path.first_bias.copy_(weights.first[1][inner])
        path.middle.copy_(weights.middle[0][kept][:, inner])
        path.middle_bias.copy_(weights.middle[1][kept])


def fit_middle(
    path: NarrowSkip,
    weights: Weights,
    kept: Tensor,
    streams: Sequence[Tensor],
    index: Tensor,
    ridge: float = least_squares.RIDGE,
) -> None:
    """Choose the channels that a full convolution in the middle reads, and solve it for those behind it that are kept.

    Args:
        path: What is fitted.
        weights: Of its branch.
        kept: Numbers of the hidden channels behind the convolution, in ascending order.
        streams: What the path reads, some samples each.
        index: Numbers of the positions to fit on, `(M,)`.
        ridge: Relative to the mean variance of what it reads.
    """
    assert weights.middle is not None
    make = partial(first_features, weights, layout=path.layout)
    read = gathered(make, path.chain.middle, streams, index, path.layout)  # M I K
    wanted = F.linear(
        read.flatten(1),
        *(value.to(read.dtype) for value in (weights.middle[0][kept].flatten(1), weights.middle[1][kept])),
    )
    inner = narrowest(read, wanted, path.inner, ridge)
    weight, bias = least_squares.linear(read[:, inner].flatten(1), wanted, ridge)
    path.first.copy_(weights.first[0][inner])
    path.first_bias.copy_(weights.first[1][inner])
    path.middle.copy_(weight.view_as(path.middle))
    path.middle_bias.copy_(bias)


def _spread(channels: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * channels // count


def _moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Covariances of `x` with itself and with `y` in float64, in chunks of rows."""
    mean_x, mean_y = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
    gram, cross = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64), 0.0
    for some, targets in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        centred = some.double() - mean_x
        gram.addmm_(centred.T, centred)
        cross = cross + centred.T @ (targets.double() - mean_y)
    return gram / len(x), cross / len(x)  # type: ignore[return-value]
