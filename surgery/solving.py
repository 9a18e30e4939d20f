"""One skip path in closed form, from the streams around its site.

Streams come in parts, a few samples each, and only the rows of a problem are put together, so that no stream is held twice.

Axis letters: `N` samples, `M` rows, `C` channels, `H` hidden channels, `K` taps of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery import least_squares, narrowing
from surgery.chains import Weights
from surgery.rows import gathered, neighbours, rows_at
from surgery.sites import CHANNELS_FIRST, Layout
from surgery.skip_paths import AffineSkip, DepthwiseSkip, LinearSkip, LowRankSkip, NarrowSkip, SkipPath, chain_features

_FEWEST = 32  # rows; a map of fewer says nothing about others
_ROWS = 2**16  # per least-squares problem; more change the maps by less than their noise
_NEIGHBOURS = 2**23  # numbers in the rows of a depthwise problem
_HIDDEN = 2**26  # likewise of a narrow one
_EACH, _FEW = 32, 2**14  # its rows per number in a row, and rows that are few enough in any case
_PRODUCTS = 2**36  # multiply-adds of one covariance, as long as there are twice as many rows as numbers in one


class Around(NamedTuple):
    """What is known around a site for some samples; streams `(N, C, H, W)` or `(N, T, C)`."""

    residual: Tensor
    """What the skip path reads."""
    target: Tensor
    """What the stream should be after the add."""
    base: Tensor | None
    """What the skip path is added to; nothing where its site is the whole stream."""
    rows: Tensor
    """Bool, the positions to fit on, `(N, *positions)`."""


def fit_one(path: SkipPath, parts: Sequence[Around], ridge: float, weights: Weights | None = None) -> float:
    """Fit one skip path on all rows but every fifth, and judge it on these.

    The judgement compares streams after LayerNorm where the last axis holds channels, since a next layer reads them so
    (plain squared error in a post-norm network prefers maps that are worse after the norm).

    Args:
        path: Changed in place.
        parts: What is known, in order.
        ridge: Relative to the mean variance of what the map reads.
        weights: The branch's own, for a narrow path that holds no channels of it yet.

    Returns:
        Error left, as a share of the error without a skip path; 1 if the path was reset, or kept for want of rows.
    """
    layout = path.layout
    index = torch.cat([part.rows.flatten() for part in parts]).nonzero().squeeze(1)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[: _most_rows(path, weights)]
    index = index[order.to(index.device)]
    streams = [part.residual for part in parts]
    y = rows_at([part.target for part in parts], index, layout)
    bases = [part.base for part in parts if part.base is not None]
    b = rows_at(bases, index, layout) if bases else torch.zeros_like(y)
    y = y - b
    x = _read(path, streams, index, weights)
    known = _finite(x) & _finite(y) & _finite(b)
    if not known.all():  # the model's own streams are no numbers there, and one such row would spoil the sums of all
        index, x, y, b = index[known], x[known], y[known], b[known]
    if len(index) < _FEWEST:
        if weights is not None and isinstance(path, NarrowSkip):
            narrowing.adopt_some(path, weights)
        return 1.0
    held, used = slice(0, len(index) // 5), slice(len(index) // 5, None)
    if weights is not None and isinstance(path, NarrowSkip):
        kept = narrowing.narrowest(x[used], y[used], path.width, ridge)
        narrowing.adopt(path, weights, kept)
        x = x[:, kept]
        if path.inner:
            numbers = path.chain.inner * path.chain.middle**2
            most = max(_FEW // 4, 2 * numbers, _HIDDEN // numbers)
            narrowing.fit_middle(path, weights, kept, streams, index[used][:most], ridge)
            x = _read(path, streams, index, None)
    _solve(path, x[used], y[used], ridge)
    plain = _Rows(path)
    after = _judge(b[held] + plain(x[held]), b[held] + y[held], layout)
    without = _judge(b[held], b[held] + y[held], layout)
    if not math.isfinite(after) or after >= without:
        path.silence(fitted=math.isfinite(after))
        return 1.0
    return after / max(without, 1e-30)


def _solve(path: SkipPath, x: Tensor, y: Tensor, ridge: float) -> None:
    if isinstance(path, AffineSkip):
        scale, shift = least_squares.affine(x, y, ridge)
        path.scale.copy_(scale)
        path.shift.copy_(shift)
    elif isinstance(path, LinearSkip):
        weight, bias = least_squares.linear(x, y, ridge)
        path.weight.copy_(weight)
        path.bias.copy_(bias)
    elif isinstance(path, DepthwiseSkip):
        kernel, weight, bias = least_squares.depthwise(x.flatten(2), y, ridge=ridge)
        path.kernel.copy_(kernel.view_as(path.kernel))
        path.weight.copy_(weight)
        path.bias.copy_(bias)
    elif isinstance(path, NarrowSkip):
        weight, bias = least_squares.linear(x.flatten(1), y, ridge)
        path.last.copy_(weight.view_as(path.last))
        path.bias.copy_(bias)
    elif isinstance(path, LowRankSkip):
        down, up, bias = least_squares.low_rank(x, y, path.rank, ridge)
        path.down.copy_(down)
        path.up.copy_(up)
        path.bias.copy_(bias)


def _finite(rows: Tensor) -> Tensor:
    """Which rows `(M, …)` hold neither NaN nor infinity, bool `(M,)`."""
    return rows.flatten(1).isfinite().all(1)


class _Rows:
    """A skip path applied to rows `(M, C)`, to neighbourhoods `(M, C, 3, 3)`, or to hidden channels `(M, H, K)`."""

    def __init__(self, path: SkipPath) -> None:
        self.path = path

    def __call__(self, rows: Tensor) -> Tensor:
        if isinstance(self.path, NarrowSkip):
            last, bias = self.path.last.to(rows.dtype), self.path.bias.to(rows.dtype)
            return F.linear(rows.flatten(1), last.flatten(1), bias)
        if rows.dim() == 4:
            return self.path(rows)[:, :, 1, 1]
        if self.path.layout in CHANNELS_FIRST:
            ones = (1,) * (len(self.path.layout) - 2)
            return self.path(rows.view(*rows.shape, *ones)).flatten(1)
        return self.path(rows)


def _judge(stream: Tensor, target: Tensor, layout: Layout) -> float:
    if layout not in CHANNELS_FIRST:
        stream, target = (F.layer_norm(t.float(), t.shape[-1:]) for t in (stream, target))
    return float((stream.double() - target.double()).square().mean())


def _most_rows(path: SkipPath, weights: Weights | None) -> int:
    """Rows of one problem, by the numbers that one row has."""
    if isinstance(path, NarrowSkip):
        numbers = (path.width if weights is None else path.chain.width) * max(1, path.chain.last**2)
        quick = max(2 * numbers, _PRODUCTS // numbers**2)
        return min(_ROWS, _HIDDEN // numbers, max(_FEW, _EACH * numbers), quick)
    return min(_ROWS, _NEIGHBOURS // (9 * path.channels)) if isinstance(path, DepthwiseSkip) else _ROWS


def _read(path: SkipPath, streams: Sequence[Tensor], index: Tensor, weights: Weights | None) -> Tensor:
    """What the map that is solved reads at the positions that `index` numbers, one row each."""
    if isinstance(path, DepthwiseSkip):
        return neighbours(streams, index)
    if not isinstance(path, NarrowSkip):
        return rows_at(streams, index, path.layout)
    make = path.features if weights is None else partial(chain_features, weights, layout=path.layout)
    return gathered(make, path.chain.last, streams, index, path.layout)
