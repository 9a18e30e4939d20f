"""torch's own encoder layers where they are called with one nested tensor.

Without gradients `nn.TransformerEncoder` cuts padding off before its layers run, and puts zeros in its place afterwards. A layer
with gates sees such a batch padded, with the mask that says so, and gives it back nested: what comes after the encoder may read
these zeros.

Axis letters: `N` samples, `T` tokens, `C` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def nested_stream(cls: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The nested tensor that an encoder layer is called with, and nothing beside it; else None."""
    alone = len(args) == 1 and not any(value is not None and value is not False for value in kwargs.values())
    if not alone or not issubclass(cls, nn.TransformerEncoderLayer):
        return None
    return args[0] if isinstance(args[0], Tensor) and args[0].is_nested else None


def run_padded(layer: Callable[..., Tensor], stream: Tensor) -> Tensor:
    """What a layer makes of a nested stream, `N` times `(T, C)` with any `T`, by way of a padded one."""
    lengths = [len(sample) for sample in stream.unbind()]
    padded = stream.to_padded_tensor(0.0)  # N T C
    places = torch.arange(padded.shape[1], device=padded.device)
    mask = places >= torch.tensor(lengths, device=padded.device)[:, None]
    made = layer(padded, src_key_padding_mask=mask)
    return torch.nested.as_nested_tensor([sample[:length] for sample, length in zip(made, lengths, strict=True)])
