"""The tokens of a transformers model: which are words, which start and end a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapters.huggingface_files import local_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Tokens to make texts of.

    Args:
        words: Tokens that are part of ordinary text.
        weights: How often each is drawn.
        first: Tokens before every text.
        last: Tokens after every text.
        ends: Tokens that end a text that is being written.
        pad: Token of padding.
        decoder_start: First token of a decoder.
    """

    words: Tensor
    weights: Tensor
    first: tuple[int, ...]
    last: tuple[int, ...]
    ends: tuple[int, ...]
    pad: int
    decoder_start: int

    @classmethod
    def of(cls, model: nn.Module) -> Vocabulary:
        """From the tokenizer beside the model's weights where there is one, else from the config."""
        config: Any = model.config
        text = getattr(config, "text_config", None) or config.get_text_config()
        size = int(text.vocab_size)
        source = getattr(config, "_name_or_path", "") or ""
        tokenizer = local_tokenizer(source)
        special = _special_tokens(config, text)

        def known(*names: str) -> int | None:
            values = (one for name in names for one in (getattr(text, name, None), getattr(config, name, None)))
            value = next((v[0] if isinstance(v, (list, tuple)) else v for v in values if v not in (None, [])), None)
            return value if value is not None and 0 <= value < size else None

        pad = known("pad_token_id")
        if pad is None:
            pad = _or(getattr(tokenizer, "pad_token_id", None), _or(known("eos_token_id"), 0))
        eos = getattr(text, "eos_token_id", None)
        ends = tuple(t for t in (eos if isinstance(eos, (list, tuple)) else (eos,)) if t is not None and t < size)
        start = known("decoder_start_token_id")
        decoder_start = start if start is not None else _or(known("bos_token_id"), pad)
        decodes = writes(model)
        if tokenizer is None:
            first = known("bos_token_id") if decodes else known("cls_token_id", "bos_token_id")
            last = None if decodes else known("sep_token_id", "eos_token_id")
            words = [token for token in range(size) if token not in special] or list(range(size))
            weights = torch.ones(len(words))
            before, after = _tuple(first), _tuple(last)
        else:
            words = list(_ordinary(source, size, frozenset(special))) or list(range(size))
            # tokenizers number their tokens roughly from common to rare
            weights = 1.0 / (torch.arange(len(words)) + 2.7)
            before, after = _around(tokenizer)
            after = () if decodes else after
        return cls(torch.tensor(words), weights, before, after, ends, min(pad, size - 1), decoder_start)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Random words of the given shape."""
        count = int(torch.Size(shape).numel())
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.words[index].view(*shape)


def writes(model: Any) -> bool:
    """Whether it is a decoder-only language model."""
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def _special_tokens(*configs: Any) -> set[int]:
    """Every token that a config gives a meaning: `pad_token_id`, `image_token_index`, …"""
    found: set[int] = set()
    for config in configs:
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return found


@lru_cache(maxsize=4)
def _ordinary(source: str, size: int, special: frozenset[int]) -> tuple[int, ...]:
    """Tokens of two characters and more that no rule sets apart, in the tokenizer's order."""
    tokenizer = local_tokenizer(source)
    left_out = special | set(tokenizer.all_special_ids)
    return tuple(
        index
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if index < size
        and index not in left_out
        and not (token.startswith(("[", "<")) and token.endswith(("]", ">")))
        and len(token.lstrip("Ġ▁#").replace("</w>", "")) > 1
    )


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after every text."""
    special = set(tokenizer.all_special_ids)
    tokens = list(tokenizer("a")["input_ids"])
    inner = [index for index, token in enumerate(tokens) if token not in special]
    if not inner:
        return (), ()
    return tuple(tokens[: inner[0]]), tuple(tokens[inner[-1] + 1 :])


def _tuple(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def _or(value: int | None, other: int) -> int:
    return other if value is None else value
