"""Streams as rows: one row per position, numbered over all samples, which is what least squares solves for.

Axis letters: `N` samples, `M` rows, `C` channels, `K` taps of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.sites import CHANNELS_FIRST, Layout

_SAMPLES = 16  # whose channels are made at once


def positions_shape(residual: Tensor, layout: Layout) -> torch.Size:
    """Shape of the positions of a residual stream, samples first."""
    if layout in CHANNELS_FIRST:
        return torch.Size([residual.shape[0], *residual.shape[2:]])
    return residual.shape[:-1]


def rows_at(streams: Sequence[Tensor], index: Tensor, layout: Layout) -> Tensor:
    """Streams of some samples each -> `(M, C)` at the positions that `index` numbers over all of them."""
    return gathered(lambda stream: stream, 1, streams, index, layout).squeeze(2)


def neighbours(streams: Sequence[Tensor], index: Tensor) -> Tensor:
    """Feature maps `(N, C, H, W)` -> `(M, C, 3, 3)` around the positions that `index` numbers; zero outside the map."""
    return gathered(lambda stream: stream, 3, streams, index, "NCHW").unflatten(2, (3, 3))


def gathered(
    make: Callable[[Tensor], Tensor], side: int, streams: Sequence[Tensor], index: Tensor, layout: Layout
) -> Tensor:
    """Rows of what is made from a stream, without holding all of it at once.

    Args:
        make: Some samples of the stream -> the same positions with other channels `H`.
        side: Of the kernel that reads them: 3, or 1 or 0 where it sees one position.
        streams: The stream, some samples each.
        index: Numbers of the positions over all samples, `(M,)`.
        layout: Of the stream.

    Returns:
        `(M, H, K)`.
    """
    found: Tensor | None = None
    start = 0
    for part in (some for stream in streams for some in stream.split(_SAMPLES)):
        end = start + positions_shape(part, layout).numel()
        here = ((index >= start) & (index < end)).nonzero().squeeze(1)
        made, local = make(part), index[here] - start
        rows = _around(made, local) if side > 1 else _to_rows(made, layout)[local].unsqueeze(2)
        found = rows.new_empty(len(index), *rows.shape[1:]) if found is None else found
        found[here] = rows
        start = end
    assert found is not None
    return found


def _to_rows(value: Tensor, layout: Layout) -> Tensor:
    """Residual stream -> `(M, C)`."""
    if layout in CHANNELS_FIRST:
        return value.movedim(1, -1).flatten(0, -2)
    return value.flatten(0, -2)


def _around(value: Tensor, index: Tensor) -> Tensor:
    """Feature map `(N, C, H, W)` -> `(M, C, 9)` around the positions that `index` numbers; zero outside the map."""
    _, _, height, width = value.shape
    padded = F.pad(value, (1, 1, 1, 1)).movedim(1, -1)  # N H+2 W+2 C
    n, h, w = index // (height * width), index // width % height, index % width
    return torch.stack([padded[n, h + i, w + j] for i in range(3) for j in range(3)], 2)
