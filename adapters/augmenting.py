"""Training inputs that differ on every pass: pictures flipped and shifted, texts that go on as another one does.

Distillation needs inputs, not labels: the dense model answers what is made here as well, and is less sure of it than of what
it was trained on, so that there is more to learn from (Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and
consistent"; Liang et al. 2021, "MixKD", for texts).

Axis letters: `C` channels, `H` rows, `W` columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SHARE = 0.5
"""Of the texts, those that are spliced."""
SHORTEST = 6
"""Texts of fewer tokens stay as they are."""


def augment(samples: Sequence[Any], generator: torch.Generator, keys: Sequence[str] = ()) -> tuple[list[Any], bool]:
    """The samples of one batch, changed at random.

    Args:
        samples: Pictures `(C, H, W)`, or keyword arguments of single samples.
        generator: Of the random numbers.
        keys: Names of what holds one entry per token of a text, `input_ids` the first.

    Returns:
        The samples, and whether their labels still hold.
    """
    changed = [_picture(sample, generator) for sample in samples]
    if not all(isinstance(sample, Mapping) and keys and keys[0] in sample for sample in changed):
        return changed, True
    return _spliced(changed, generator, keys), False


def _picture(sample: Any, generator: torch.Generator) -> Any:
    """Flip left-right half of the time, shift by up to an eighth with reflected borders."""
    if isinstance(sample, Mapping):
        if "pixel_values" not in sample:
            return sample
        return {**sample, "pixel_values": _picture(sample["pixel_values"], generator)}
    if not isinstance(sample, Tensor) or sample.dim() != 3:
        return sample
    rows, columns = sample.shape[-2:]
    pad = max(1, min(rows, columns) // 8)
    top, left, flip = (int(torch.randint(0, n, (1,), generator=generator)) for n in (2 * pad + 1, 2 * pad + 1, 2))
    padded = functional.pad(sample[None], (pad, pad, pad, pad), mode="reflect")[0]
    image = padded[:, top : top + rows, left : left + columns]  # C H W
    return image.flip(-1) if flip else image


def _spliced(samples: list[Any], generator: torch.Generator, keys: Sequence[str]) -> list[Any]:
    """Some texts go on, from a random token, with the last tokens of another one of the batch, and keep their length where that
    one is long enough; special tokens at both ends stay where they are.
    """
    others = torch.randperm(len(samples), generator=generator).tolist()
    drawn = torch.rand(len(samples), 2, generator=generator).tolist()
    made = []
    for sample, other, (whether, where) in zip(samples, others, drawn, strict=True):
        length, last = len(sample[keys[0]]), len(samples[other][keys[0]])
        if whether >= SHARE or min(length, last) < SHORTEST:
            made.append(sample)
            continue
        start = 2 + int(where * (length - 4))  # 2 .. length - 3
        rest = max(1, last - (length - start))
        parts = {
            name: [*sample[name][:start], *samples[other][name][rest:]]
            for name in keys
            if name in sample and len(sample[name]) == length
        }
        made.append({**sample, **parts})
    return made
