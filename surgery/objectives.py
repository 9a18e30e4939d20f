"""What counts as being different from the dense model: distances between outputs, and the margin whose gradient labels
harm.

Axis letters: `N` samples, `T` tokens, `K` classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.calling import Batch, as_batch


def divergence(
    output: Tensor,
    dense: Tensor,
    batch: Batch | None = None,
    temperature: float = 1.0,
    *,
    values: bool = False,
) -> Tensor:
    """Distance of each sample's output from the dense model's, `(N,)`.

    Args:
        output: `(N, K)` logits, `(N, T, K)` token logits, or values of any shape.
        dense: Same shape; constant.
        batch: Where to find the attention mask for tokens.
        temperature: Softmax temperature; the result is multiplied by its square.
        values: Whether they are values whatever their shape, as of a regression or an embedding.

    Returns:
        KL(dense || output) for logits, mean squared error over the dense mean square for values; padding does not count.
    """
    output, dense = output.float(), dense.float()
    if _are_logits(output, values):
        log_p = F.log_softmax(output / temperature, -1)
        log_q = F.log_softmax(dense / temperature, -1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2  # N or N T
        if kl.dim() == 1:
            return kl
        weights = token_weights(kl, batch)
        return (kl * weights).sum(1) / weights.sum(1).clamp_min(1)
    error, scale = _by_position(output - dense), _by_position(dense)
    weights = token_weights(error, batch) if dense.dim() == 3 else torch.ones_like(error)
    scale = ((scale * weights).sum() / weights.sum().clamp_min(1)).clamp_min(1e-12)
    return (error * weights).sum(1) / weights.sum(1).clamp_min(1) / scale


def distances(outputs: Sequence[Tensor], dense: Sequence[Tensor], data: Iterable[Any], *, values: bool) -> Tensor:
    """Divergence of each sample, `(N,)`, of outputs that were collected batch by batch, on the CPU.

    Args:
        outputs: One per batch of `data`.
        dense: The dense model's.
        data: The batches that both came from.
        values: As in `divergence`.
    """
    parts = zip(outputs, dense, data, strict=True)
    return torch.cat([divergence(a, b, as_batch(batch).to("cpu"), values=values) for a, b, batch in parts])


def margin(output: Tensor, batch: Batch, generator: torch.Generator, *, values: bool = False) -> Tensor:
    """A scalar whose gradient tells what changes the result: see `surgery.harm`.

    Args:
        output: `(N, K)` logits: sum of the margins between the two largest. `(N, T, K)` token logits: sum of the
            negative log-likelihood of the next token, or of the most likely token where the inputs hold no ids. Else:
            a sum of the values with random signs.
        batch: The inputs.
        generator: For the random signs.
        values: As in `divergence`.
    """
    output = output.float()
    if output.dim() == 2 and _are_logits(output, values):
        top = output.topk(2, dim=1).values  # N 2
        return (top[:, 0] - top[:, 1]).sum()
    if _are_logits(output, values):
        log_p = F.log_softmax(output, -1)
        ids = batch.kwargs.get("input_ids")
        # ids beyond the last axis tell hidden states from logits over the vocabulary
        if isinstance(ids, Tensor) and ids.shape == output.shape[:2] and int(ids.max()) < output.shape[-1]:
            loss = -log_p[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)  # N T-1
            return (loss * token_weights(loss, batch, shift=1)).sum()
        return -(log_p.max(-1).values).sum()
    signs = 2.0 * torch.randint(2, output.shape, generator=generator).to(output) - 1
    if output.dim() == 3:
        signs = signs * token_weights(output[..., 0], batch).unsqueeze(-1)
    return (output * signs).sum()


def _are_logits(output: Tensor, values: bool) -> bool:
    return not values and output.dim() in (2, 3) and output.shape[-1] > 1


def _by_position(value: Tensor) -> Tensor:
    """Mean squares: `(N, T)` of `(N, T, C)`, else `(N, 1)`."""
    mean = value.square().mean(-1) if value.dim() == 3 else value.square().reshape(len(value), -1).mean(1)
    return mean.reshape(len(value), -1)


def token_weights(values: Tensor, batch: Batch | None, shift: int = 0) -> Tensor:
    """1 at real tokens, 0 at padding, in the shape of `values` `(N, T)`; all ones where no mask fits."""
    mask = None if batch is None else batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == values.shape[1] + shift:
        return mask[:, shift:].to(values.dtype)
    return torch.ones_like(values)
