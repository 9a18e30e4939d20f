"""Inputs for a conversion without data: like an example, or what the ecosystem's adapter makes for its models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calling import Batch, as_batch

_INPUTS = 256
_BATCH = 16


def made_inputs(model: nn.Module, example: Any, seed: int) -> Iterable[Batch]:
    """Inputs for a conversion without data.

    Raises:
        DataError: If the model is neither timm's nor transformers' (a network of the user's own).
    """
    from surgery.adapters import adapter_for

    if example is not None:
        return vary(as_batch(example), seed)
    return adapter_for(model).inputs(model, _INPUTS, _BATCH, seed)


def vary(batch: Batch, seed: int) -> list[Batch]:
    """Batches like an example: its rows mixed and perturbed (floating-point inputs) or drawn again (token ids)."""
    generator = torch.Generator().manual_seed(seed)

    def one(value: Tensor, index: Tensor) -> Tensor:
        if value.dim() == 0 or len(value) != batch.size:
            return value
        rows = value[index]
        if rows.is_floating_point() and torch.isfinite(rows).all():  # minus infinity: a mask
            other = value[index.flip(0)]
            weight = torch.rand(len(index), generator=generator).view(-1, *(1,) * (rows.dim() - 1)).to(rows)
            mixed = weight * rows + (1 - weight) * other
            return mixed + 0.3 * rows.std() * torch.randn(rows.shape, generator=generator).to(rows)
        return rows

    made = []
    for _ in range(max(5, _INPUTS // _BATCH)):
        index = torch.randint(batch.size, (_BATCH,), generator=generator)
        made.append(replace(batch.mapped(partial(one, index=index)), labels=None, number=None))
    return made
