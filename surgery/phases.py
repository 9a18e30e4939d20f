"""What one token costs a causal language model while it reads a prompt (prefill) and while it writes (decode).

Counted, not computed: texts are read and continued one at a time with a key/value cache, as `generate` does, in the dense and
in the gated model, and every FLOP that runs is counted: keys and values of skipped tokens, routers, skip paths.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calling import PROMPT, Batch, batches
from surgery.context import prompt_length
from surgery.costs import place
from surgery.counting import flop_counter
from surgery.prompts import cache_in
from surgery.tracing import CACHE_NAMES, base_class

TEXTS = 8
"""Texts that are counted."""
TOKENS = 8
"""Tokens that each of them is continued by."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of generation.

    Args:
        name: `prefill` or `decode`.
        context: Mean number of tokens that keys and values are there for: the prompt, or the prompt and what was written.
        dense: FLOPs per token of the dense model; one multiply-add = 2.
        flops: FLOPs per token of the gated model.
        tokens: Number of tokens counted.
    """

    name: str
    context: float
    dense: float
    flops: float
    tokens: int

    @property
    def cost(self) -> float:
        """FLOPs as a fraction of the dense model's."""
        return self.flops / self.dense

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {**asdict(self), "cost": self.cost}


def count_phases(gated: nn.Module, dense: nn.Module, data: Iterable[Any]) -> tuple[Phase, ...]:
    """Count both phases on the first texts of the data, the first half of each as its prompt.

    Args:
        gated: A gated causal language model, as it is set now.
        dense: The dense one.
        data: Batches with `input_ids`, with or without padding.

    Returns:
        Prefill and decode; nothing where no text is long enough or the model gives no cache.
    """
    totals = {name: [0.0, 0, 0, 0] for name in ("prefill", "decode")}  # context x tokens, dense, gated, tokens
    with torch.no_grad():
        for text in _texts(gated, data):
            split = max(1, int(len(text) * PROMPT))
            with prompt_length(gated, split):
                reference, ours = (_run(model, text, split) for model in (dense, gated))
            if reference is None or ours is None:
                return ()
            for name, first, second in zip(totals, reference, ours, strict=True):
                one = totals[name]
                one[0] += first[0]
                one[1] += first[1]
                one[2] += second[1]
                one[3] += first[2]
    return tuple(
        Phase(name, context / tokens, whole / tokens, flops / tokens, int(tokens))
        for name, (context, whole, flops, tokens) in totals.items()
        if tokens
    )


def _texts(gated: nn.Module, data: Iterable[Any]) -> Iterator[Tensor]:
    """Real tokens of the first texts with at least two of them, `(T,)`."""
    count = 0
    for batch in batches(data):
        for text in _rows(place(batch, gated)):
            if count == TEXTS:
                return
            if len(text) > 1:
                count += 1
                yield text


def _rows(batch: Batch) -> Iterator[Tensor]:
    ids, mask = batch.kwargs.get("input_ids"), batch.kwargs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    for index, row in enumerate(ids):
        yield row if not isinstance(mask, Tensor) or mask.shape != ids.shape else row[mask[index].bool()]


def _run(model: nn.Module, text: Tensor, split: int) -> Sequence[tuple[float, int, int]] | None:
    """Of prefill and decode: sum of the context over tokens, FLOPs, tokens; None where the model gives no cache."""
    with flop_counter() as counter:
        output: Any = model(input_ids=text[None, :split], use_cache=True)
    cache = cache_in(list(output.values()))
    if cache is None:
        return None
    following = text[split : split + TOKENS]
    prefill = (float(split * split), counter.get_total_flops(), split)
    with flop_counter() as counter:
        for token in following:
            model(input_ids=token.view(1, 1), use_cache=True, **{_cache_name(model): cache})
    context = sum(split + 1 + place for place in range(len(following)))
    return prefill, (float(context), counter.get_total_flops(), len(following))


def _cache_name(model: nn.Module) -> str:
    """What its `forward` calls a cache."""
    names = inspect.signature(base_class(model).forward).parameters
    return next((name for name in names if name in CACHE_NAMES), "past_key_values")
