"""Decisions made once per sequence, from its prompt, and kept with its key/value cache.

What a sequence skips never changes, so a skipped attention needs no keys and values of it: the cache's layer then holds the
active sequences alone. Layers from whose length masks and positions are made hold all of them.

Axis letters: `N` sequences, `T` tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.errors import PromptError

_NAME = "_surgery_kept"


@dataclass(slots=True)
class Kept:
    """What was decided for the sequences of one cache.

    Args:
        decisions: bool `(N,)`, or `(N, H)` of heads, by site.
        compact: Index of the cache's layer that holds keys and values of active sequences alone, by site.
    """

    decisions: dict[str, Tensor] = field(default_factory=dict)
    compact: dict[str, int] = field(default_factory=dict)

    def select(self, index: Tensor) -> None:
        """Keep the sequences that `index` names, in its order."""
        self.decisions = {name: value[index.to(value.device)] for name, value in self.decisions.items()}

    def rows(self, index: Tensor) -> dict[int, Tensor]:
        """By layer that holds active sequences alone: which of these `index` names."""
        found = {}
        for site, layer in self.compact.items():
            active = self.decisions[site].to(index.device)
            found[layer] = (active.cumsum(0) - 1)[index[active[index]]]
        return found


class _Keeping:
    """What a cache with decisions does beside what its class does."""

    layers: Sequence[Any]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequences change places, and their decisions with them."""
        self._move(beam_idx, "reorder_cache")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some sequences go on."""
        self._move(indices.nonzero().squeeze(1) if indices.dtype is torch.bool else indices, "batch_select_indices")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence goes on several times."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        kept: Kept = getattr(self, _NAME)
        kept.decisions = {name: value.repeat_interleave(repeats, 0) for name, value in kept.decisions.items()}

    def _move(self, index: Tensor, method: str) -> None:
        kept: Kept = getattr(self, _NAME)
        rows = kept.rows(index)
        if not rows:
            getattr(super(), method)(index)
        else:
            for number, layer in enumerate(self.layers):
                getattr(layer, method)(rows.get(number, index))
        kept.select(index)


def kept_with(cache: Any) -> Kept | None:
    """What was decided for the sequences of a cache, or None."""
    return getattr(cache, _NAME, None)


def keep(cache: Any, kept: Kept) -> None:
    """Attach decisions to a cache, which then carries them wherever it is reordered or copied.

    Raises:
        PromptError: If its class cannot be extended.
    """
    if not isinstance(cache, _Keeping):
        cls: Any = type(cache)
        try:
            cache.__class__ = _keeping(cls)
        except TypeError as error:
            raise PromptError(
                f"a {type(cache).__name__} cannot carry decisions ({error}); use a cache of transformers"
            ) from error
    setattr(cache, _NAME, kept)


@functools.cache
def _keeping(cls: Any) -> Any:
    made = type(cls.__name__, (_Keeping, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    made.__qualname__ = cls.__qualname__
    return made


def cache_in(values: Sequence[Any]) -> Any:
    """The key/value cache among a branch's inputs, or None."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def may_be_compact(cache: Any, layer: int | None) -> bool:
    """Whether a layer of a cache may hold some of the sequences only: it is still empty, and is not the first of its kind,
    whose length tells how long all are.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or layer is None or layer == 0:
        return False
    kinds = [type(one) for one in layers]
    if layer >= len(layers):  # layers that are added when they are first written to
        return True
    return kinds.index(kinds[layer]) != layer and not getattr(layers[layer], "is_initialized", True)


def span(padding: Tensor | None, length: float | Tensor, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Which tokens are the prompt: the first `length` real ones of every sequence, or that share of them; bool `(N, T)`.

    Raises:
        PromptError: If there is a length per sequence, but not for as many sequences.
    """
    real = torch.ones(rows, tokens, dtype=torch.bool, device=device) if padding is None else padding
    if isinstance(length, Tensor):
        if rows % len(length):
            raise PromptError(f"prompt_length names {len(length)} sequences, the call has {rows}")
        limit = length.to(device).repeat_interleave(rows // len(length))[:, None]
    elif isinstance(length, float):
        limit = (real.sum(1, keepdim=True) * length).ceil().clamp_min(1)
    else:
        limit = torch.tensor(length, device=device)
    return real & (real.cumsum(1) <= limit)


def check_length(length: Any) -> int | float | Tensor:
    """A prompt length that `span` takes.

    Raises:
        PromptError: If it is neither a positive whole number, nor a share in (0, 1), nor a tensor of whole numbers `(N,)`.
    """
    if isinstance(length, (list, tuple)):
        length = torch.tensor(length)
    if isinstance(length, Tensor):
        whole = length.dtype is not torch.bool and not length.is_floating_point()
        if length.dim() == 1 and len(length) and whole and int(length.min()) >= 1:
            return length
    elif (type(length) is float and 0 < length < 1) or (type(length) is int and length >= 1):
        return length
    raise PromptError(
        f"prompt_length must be a number of tokens, a share between 0 and 1, or whole numbers (N,); got {length!r}"
    )
