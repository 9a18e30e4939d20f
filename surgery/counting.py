"""Counting FLOPs of a run: torch's counter, with formulas for the fused kernels that it does not know.

Under `no_grad` torch runs `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` as one kernel each, which its
counter takes for free; until torch 2.14 it does the same with the CPU's fused attention product.

Recurrent layers are one kernel per layer and direction on the CPU (LSTMs), one for all of them on GPUs; every weight matrix
in it meets every position once. What torch runs step by step, as GRUs on the CPU and cells, is products that it counts.

Axis letters: `N` samples, `T` tokens, `S` keys, `C` channels, `H` heads, `D` head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


_pausing: ContextVar[bool] = ContextVar("surgery_uncounted", default=False)


def flop_counter() -> FlopCounterMode:
    """A counter to run a model in; `get_total_flops()` then gives FLOPs, one multiply-add = 2."""
    return _Counter(display=False, custom_mapping=dict(_FORMULAS))


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs in here is not part of what a model costs: checks that are made once."""
    token = _pausing.set(True)
    try:
        yield
    finally:
        _pausing.reset(token)


class _Counter(FlopCounterMode):
    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        return out if _pausing.get() else super()._count_flops(func_packet, out, args, kwargs)


def attention_flops(query: Shape, key: Shape, value: Shape, channels: int, heads: int, *_: Any, **__: Any) -> int:
    """Of one fused attention on `(N, T, C)`: three projections in and one out, scores, weighted sum."""
    samples, tokens, _width = query
    projections = 4 * tokens * channels * channels
    products = 2 * tokens * key[1] * channels
    return 2 * samples * (projections + products)


def encoder_layer_flops(source: Shape, channels: int, heads: int, *rest: Any, **__: Any) -> int:
    """Of one fused encoder layer: its attention, and two maps of `C x F` and `F x C`."""
    samples, tokens, _width = source
    hidden = next(shape[0] for shape in rest[11:] if isinstance(shape, (tuple, torch.Size)) and len(shape) == 2)
    return attention_flops(source, source, source, channels, heads) + 2 * samples * tokens * 2 * channels * hidden


def product_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of `N H T D` queries with `S` keys (of as many heads or fewer): scores, weighted sum."""
    samples, heads, tokens, width = query
    return 2 * samples * heads * tokens * key[2] * (width + value[3])


def recurrent_layer_flops(inputs: Shape, weight: Shape, recurrent: Shape, *_: Any, **__: Any) -> int:
    """Of one direction of one layer on `(T, N, C)`: its two weight matrices."""
    return recurrent_flops(inputs, (weight, recurrent))


def recurrent_flops(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Of all directions and layers at once, on `(T, N, C)`, or packed to one axis of positions; biases are not counted."""
    positions = math.prod(inputs[:-1])
    return 2 * positions * sum(math.prod(shape) for shape in weights if len(shape) == 2)


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._native_multi_head_attention: attention_flops,
    torch.ops.aten._transformer_encoder_layer_fwd: encoder_layer_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: product_flops,
    torch.ops.aten.mkldnn_rnn_layer: recurrent_layer_flops,
    torch.ops.aten._cudnn_rnn: recurrent_flops,
    torch.ops.aten.miopen_rnn: recurrent_flops,
}
