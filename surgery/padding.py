"""Whether anything reads what becomes of padding, so that gates may close there.

Attention masks padding as keys, and what most heads make of a sequence leaves it out. But some read it all the same: a mean
over all tokens, or the last token whatever it is (SigLIP's text tower). So it is tried on a batch: all gates open, and all
open but at padding, must give the same at everything that is real.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calling import Batch, batches, call, tensors
from surgery.costs import place
from surgery.gates import Gate, iter_gates
from surgery.policies import constant, decided

BATCHES, ROWS = 32, 8
"""How many batches are searched for padding, and how many of one batch's rows, those with most of it, are tried."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the largest value; 0.05 in other dtypes."""

Masks = Mapping[tuple[int, ...], Tensor]


def is_unread(gated: nn.Module, data: Iterable[Any]) -> bool:
    """Whether gates per token may be closed for padding.

    Args:
        gated: A gated model.
        data: Batches, of which the first with padding is tried.

    Returns:
        True where it was tried and nothing changed; False also where there was nothing to try.
    """
    if not any(gate.per_token for _, gate in iter_gates(gated)):
        return False
    for batch in islice(batches(data), BATCHES):
        mask = batch.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return False
        if not bool(mask.all()):
            most = (mask == 0).sum(1).argsort(descending=True)[:ROWS]
            return _changes_nothing(gated, place(batch.rows(most), gated))
    return False


def _changes_nothing(gated: nn.Module, batch: Batch) -> bool:
    opened = constant([unit for _, gate in iter_gates(gated) for unit in gate.site.units])
    masks: dict[tuple[int, ...], Tensor] = {}

    def closed_at_padding(gate: Gate, residual: Tensor) -> Tensor:
        decisions = opened(gate, residual)
        real = gate.padding(residual) if gate.per_token else None
        if real is None:
            return decisions
        masks[tuple(real.shape)] = masks.get(tuple(real.shape), real) & real
        return decisions & real

    with torch.no_grad():
        with decided(gated, opened):
            whole = tensors(call(gated, batch))
        with decided(gated, closed_at_padding):
            part = tensors(call(gated, batch))
    return bool(masks) and all(_same(_real(a, masks), _real(b, masks)) for a, b in zip(whole, part, strict=True))


def _real(value: Tensor, masks: Masks) -> Tensor:
    """What an output holds for real tokens, where it has a token axis: `(N, T, …)`, or a cache `(N, H, T, D)`."""
    if value.dim() == 4 and tuple(value.shape[::2]) in masks:
        value = value.transpose(1, 2)
    mask = masks.get(tuple(value.shape[:2]))
    return value if mask is None else value[mask]


def _same(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    largest = float(a.nan_to_num().abs().max())
    return float((a - b).nan_to_num().abs().max()) <= TOLERANCE.get(a.dtype, 0.05) * largest
