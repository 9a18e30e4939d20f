"""What an output is worth: accuracy, nats per token, agreement with the dense model, kept apart by input.

Axis letters: `N` samples, `T` tokens, `K` classes, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.calling import Batch, Outputs, is_logits, kind_of, read_output
from surgery.errors import DataError

IGNORED = -100  # label of positions that do not count, as in torch's cross entropy
LOWER_IS_BETTER = frozenset({"nats_per_token"})


def entropy(shares: Iterable[float]) -> float:
    """Of shares that sum to 1, in bits."""
    return -sum(share * math.log2(share) for share in shares if share > 0) + 0.0


@dataclass(frozen=True, slots=True)
class Scores:
    """A mean over inputs, kept apart by input.

    Args:
        values: Sum over what counts in each input (its correct answers, the nats of its tokens), float64 `(N,)`.
        weights: How much counts in each input (1, or its tokens), float64 `(N,)`.
    """

    values: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """The mean over everything that counts."""
        return float(self.values.sum() / self.weights.sum().clamp_min(1e-12))

    @property
    def count(self) -> int:
        """How much counts in all."""
        return int(self.weights.sum())

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Those of several batches, one after the other."""
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.weights for part in parts]))

    def mixed(self, other: Scores, share: float) -> Scores:
        """`1 - share` of these and `share` of `other`, on the same inputs."""
        return Scores(torch.lerp(self.values, other.values, share), self.weights)


def metric_of(model: nn.Module, batch: Batch, output: Any, outputs: Outputs = "auto") -> tuple[str, Scores] | None:
    """The metric that fits model and labels, by name, or None where nothing tells right from wrong, as of values.

    Integer labels `(N,)` give `accuracy`, integer labels per token `token_accuracy`; language models that predict the
    next token give `nats_per_token` from the tokens that they are called with.

    Raises:
        DataError: If labels do not fit the logits.
    """
    if kind_of(model, batch, output, outputs) == "values":
        return None
    logits, labels = read_output(output), batch.labels
    tokens = next_tokens(model, batch, logits)
    if tokens is not None:
        return "nats_per_token", _nats(logits, tokens)
    if labels is None or labels.is_floating_point() or logits.dim() != labels.dim() + 1 or logits.shape[-1] < 2:
        return None
    if logits.shape[:-1] != labels.shape:
        raise DataError(
            f"{batch.where}labels have shape {tuple(labels.shape)}, the logits {tuple(logits.shape)} expect "
            f"{tuple(logits.shape[:-1])}; give one label for each"
        )
    counted = labels.long() != IGNORED
    known = labels[counted]
    if known.numel() and int(known.max()) >= logits.shape[-1]:
        raise DataError(
            f"{batch.where}a label is {int(known.max())}, but the model tells {logits.shape[-1]} classes apart; "
            "is this data for another model, or does it count classes in another order?"
        )
    if known.numel() and int(known.min()) < 0:
        raise DataError(
            f"{batch.where}a label is {int(known.min())}, as where labels are withheld; leave the labels out to compare with the "
            f"dense model only, or give {IGNORED} for what is not to count"
        )
    right = (predicted(logits) == labels.to(logits.device)) & counted.to(logits.device)
    return "accuracy" if labels.dim() == 1 else "token_accuracy", _per_input(right, counted.to(logits.device))


def agreement_of(
    model: nn.Module, batch: Batch, output: Any, dense: Any, outputs: Outputs = "auto"
) -> tuple[str, Scores]:
    """How far an output agrees with the dense model's: `argmax` (share of equal ones) or `cosine` (of values)."""
    mine, reference = read_output(output), read_output(dense)
    if is_logits(model, batch, dense, outputs):
        same = predicted(mine) == predicted(reference)  # N or N T
        return "argmax", _per_input(same, _real(batch, same))
    mask = _real(batch, mine[..., 0]) if mine.dim() == 3 else None
    if mask is not None:
        mine, reference = mine * mask.unsqueeze(-1), reference * mask.unsqueeze(-1)
    rows, others = (value.double().reshape(len(value), -1) for value in (mine, reference))
    cosine = F.cosine_similarity(rows, others, dim=1)
    return "cosine", Scores(cosine.cpu(), torch.ones(len(cosine), dtype=torch.float64))


def predicted(logits: Tensor) -> Tensor:
    """The class or token of the largest logit, `(..., K)` -> `(...)`; -1, which is no class, where a logit is NaN."""
    largest = logits.argmax(-1)
    return largest.masked_fill(logits.gather(-1, largest.unsqueeze(-1)).squeeze(-1).isnan(), -1)


def next_tokens(model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
    """What each position should predict, `(N, T - 1)`, `IGNORED` at padding; None unless the model predicts next
    tokens.
    """
    ids = batch.kwargs.get("decoder_input_ids", batch.kwargs.get("input_ids"))
    can_generate = getattr(model, "can_generate", None)
    if not isinstance(ids, Tensor) or logits.dim() != 3 or ids.shape != logits.shape[:2]:
        return None
    if can_generate is not None and not can_generate():
        return None
    if can_generate is None and (batch.labels is not None or int(ids.max()) >= logits.shape[-1]):
        return None  # a tagger or an encoder of the user's own
    name = "decoder_attention_mask" if "decoder_input_ids" in batch.kwargs else "attention_mask"
    mask = batch.kwargs.get(name)
    following = ids[:, 1:]
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return following
    counted = mask[:, 1:].bool() & mask[:, :-1].bool()  # nothing is predicted from padding on the left
    return following.masked_fill(~counted, IGNORED)


def _nats(logits: Tensor, tokens: Tensor) -> Scores:
    counted = tokens != IGNORED
    loss = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, (one, target) in enumerate(zip(logits, tokens, strict=True)):  # one input at a time: V can be large
        loss[row] = F.cross_entropy(one[:-1].float(), target, ignore_index=IGNORED, reduction="none").double().cpu()
    return Scores(loss.sum(1), counted.double().sum(1).cpu())


def _per_input(hits: Tensor, counted: Tensor | None) -> Scores:
    """Of bool hits `(N,)` or `(N, T)`."""
    counted = torch.ones_like(hits) if counted is None else counted
    hits, counted = (hits & counted).cpu().reshape(len(hits), -1), counted.cpu().reshape(len(counted), -1)
    return Scores(hits.double().sum(1), counted.double().sum(1))


def _real(batch: Batch, like: Tensor) -> Tensor | None:
    """The attention mask in the shape of `like` `(N, T)`, bool, or None."""
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = batch.kwargs.get(name)
        if isinstance(mask, Tensor) and mask.shape == like.shape:
            return mask.bool().to(like.device)
    return None
