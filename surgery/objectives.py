"""What counts as being different from the dense model: distances between outputs, and the margin whose gradient labels
harm.

Axis letters: `N` samples, `T` tokens, `K` classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    scale: float | None = None,
) -> Tensor:
    """Distance of each sample's output from the dense model's, `(N,)`.

    Args:
        output: `(N, K)` logits, `(N, T, K)` token logits, or values of any shape.
        dense: Same shape; constant.
        batch: Where to find the attention mask for tokens.
        temperature: Softmax temperature; the result is multiplied by its square.
        values: Whether they are values whatever their shape, as of a regression or an embedding.
        scale: The mean square that errors of values are divided by, `Scale.value` of all batches that are compared; by default
            that of this batch, which another one does not share.

    Returns:
        KL(dense || output) for logits, mean squared error over the dense mean square for values; padding does not count.
    """
    output, dense = output.float(), dense.float()
    if _are_logits(output, values):
        log_p = F.log_softmax(output / temperature, -1)
        log_q = F.log_softmax(dense / temperature, -1)
        ruled_out = log_q == -torch.inf  # by the dense model: nothing to be added
        kl = torch.where(ruled_out, 0.0, log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2  # N or N T
        return kl if kl.dim() == 1 else _mean(kl, token_weights(kl, batch))
    error = _by_position(output - dense)
    weights = token_weights(error, batch) if dense.dim() == 3 else torch.ones_like(error)
    return _mean(error, weights) / (scale_of([dense], [batch], values=values) if scale is None else scale)


@dataclass(slots=True)
class Scale:
    """Mean square of the dense model's values over batches, where they are real and numbers: what errors are divided by."""

    total: float = 0.0
    count: float = 0.0

    def add(self, dense: Tensor, batch: Batch | None, *, values: bool) -> None:
        """Take the outputs of one batch; logits need no scale."""
        if _are_logits(dense, values):
            return
        squares = _by_position(dense.float())
        weights = token_weights(squares, batch) if dense.dim() == 3 else torch.ones_like(squares)
        weights = weights * squares.isfinite()
        self.total += float(_counted(squares, weights).double().sum())
        self.count += float(weights.double().sum())

    @property
    def value(self) -> float:
        """The mean; 1 where nothing was counted, as of logits."""
        return max(self.total / self.count, 1e-12) if self.count else 1.0


def distances(outputs: Sequence[Tensor], dense: Sequence[Tensor], data: Iterable[Any], *, values: bool) -> Tensor:
    """Divergence of each sample, `(N,)`, of outputs that were collected batch by batch, on the CPU; it does not depend on how
    samples were put into batches.

    Args:
        outputs: One per batch of `data`.
        dense: The dense model's.
        data: The batches that both came from.
        values: As in `divergence`.
    """
    own = () if _are_logits(dense[0], values) else zip(dense, data, strict=True)
    scale = Scale()
    for output, batch in own:
        scale.add(output, as_batch(batch).to("cpu"), values=values)
    parts = zip(outputs, dense, data, strict=True)
    return torch.cat(
        [apart(a, b, as_batch(batch).to("cpu"), values=values, scale=scale.value) for a, b, batch in parts]
    )


def apart(output: Tensor, dense: Tensor, batch: Batch, *, values: bool, scale: float) -> Tensor:
    """`divergence` to compare results by: 0 where the dense model's own output is no number, to which nothing can be near.

    One such input would else make every mean NaN, and of two of these neither is the better one.
    """
    found = divergence(output, dense, batch, values=values, scale=scale)
    bad = ~dense.isfinite() if values else dense.isnan() | (dense == torch.inf)
    if dense.dim() == 3:
        bad = bad.any(2)
        bad &= token_weights(bad.float(), batch) > 0
    return found.masked_fill(bad.reshape(len(bad), -1).any(1), 0.0)


def scale_of(dense: Iterable[Tensor], data: Iterable[Batch | None], *, values: bool) -> float:
    """`Scale.value` of outputs that were collected batch by batch."""
    scale = Scale()
    for output, batch in zip(dense, data, strict=True):
        scale.add(output, batch, values=values)
    return scale.value


def margin(output: Tensor, batch: Batch, generator: torch.Generator, *, values: bool = False) -> Tensor:
    """A scalar whose gradient tells what changes the result: see `surgery.harm`.

    Args:
        output: `(N, K)` logits: sum of the margins between the two largest. `(N, T, K)` token logits: sum of the
            negative log-likelihood of the next token, or of the most likely token where the inputs hold no ids. Else:
            a sum of the values with random signs. Padding does not count, nor what is predicted from it.
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
        ids = batch.kwargs.get(f"{_side(batch)}input_ids")
        # ids beyond the last axis tell hidden states from logits over the vocabulary
        if isinstance(ids, Tensor) and ids.shape == output.shape[:2] and int(ids.max()) < output.shape[-1]:
            loss = -log_p[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)  # N T-1
            return _counted(loss, token_weights(loss, batch, shift=1)).sum()
        likeliest = log_p.max(-1).values  # N T
        return -_counted(likeliest, token_weights(likeliest, batch)).sum()
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


def _counted(values: Tensor, weights: Tensor) -> Tensor:
    """`values` times `weights`, 0 where these are 0, whatever padding holds."""
    return values.masked_fill(weights == 0, 0.0) * weights


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of every row, `(N, T)` -> `(N,)`."""
    return _counted(values, weights).sum(1) / weights.sum(1).clamp_min(1)


def _side(batch: Batch) -> str:
    """How the names of what an output's tokens belong to begin: those of an encoder-decoder are the decoder's."""
    return "decoder_" if "decoder_input_ids" in batch.kwargs else ""


def token_weights(values: Tensor, batch: Batch | None, shift: int = 0) -> Tensor:
    """1 at real tokens, 0 at padding, in the shape of `values` `(N, T)`; all ones where no mask fits.

    Args:
        values: What is weighted.
        batch: Where to find the mask.
        shift: 1 where `values` are of the next tokens: both must then be real, that which is predicted and that before it.
    """
    mask = None if batch is None else batch.kwargs.get(f"{_side(batch)}attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == values.shape[1] + shift:
        weights = mask[:, shift:].to(values.dtype)
        return weights * (mask[:, :-shift] != 0) if shift else weights
    return torch.ones_like(values)
