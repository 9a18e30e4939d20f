"""Streams as rows: one row per position, numbered over all samples, which is what least squares solves for.

Axis letters: `N` samples, `M` rows, `C` channels, `K` taps of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.sites import Layout

_SAMPLES = 16  # whose channels are made at once


def to_rows(value: Tensor, layout: Layout) -> Tensor:
    """Residual stream -> `(M, C)`."""
    if layout == "NCHW":
        return value.movedim(1, -1).flatten(0, -2)
    return value.flatten(0, -2)


def positions_shape(residual: Tensor, layout: Layout) -> torch.Size:
    """Shape of the positions of a residual stream, samples first."""
    if layout == "NCHW":
        return torch.Size([residual.shape[0], *residual.shape[2:]])
    return residual.shape[:-1]


def neighbours(value: Tensor, index: Tensor) -> Tensor:
    """Feature map `(N, C, H, W)` -> `(M, C, 3, 3)` around the positions that `index` numbers; zero outside the map."""
    _, _, height, width = value.shape
    padded = F.pad(value, (1, 1, 1, 1)).movedim(1, -1)  # N H+2 W+2 C
    n, h, w = index // (height * width), index // width % height, index % width
    return torch.stack([padded[n, h + i, w + j] for i in range(3) for j in range(3)], 2).unflatten(2, (3, 3))


def gathered(make: Callable[[Tensor], Tensor], side: int, residual: Tensor, index: Tensor, layout: Layout) -> Tensor:
    """Rows of what is made from a stream, without holding all of it at once.

    Args:
        make: Some samples of the stream -> the same positions with other channels `H`.
        side: Of the kernel that reads them: 3, or 1 or 0 where it sees one position.
        residual: The stream.
        index: Numbers of the positions, `(M,)`.
        layout: Of the stream.

    Returns:
        `(M, H, K)`.
    """
    each = positions_shape(residual, layout)[1:].numel()
    found: Tensor | None = None
    for start in range(0, len(residual), _SAMPLES):
        part = residual[start : start + _SAMPLES]
        made = make(part)
        here = ((index >= start * each) & (index < (start + len(part)) * each)).nonzero().squeeze(1)
        local = index[here] - start * each
        rows = neighbours(made, local).flatten(2) if side > 1 else to_rows(made, layout)[local].unsqueeze(2)
        found = rows.new_empty(len(index), *rows.shape[1:]) if found is None else found
        found[here] = rows
    assert found is not None
    return found
