"""Chains: branches that are layers in a row with one hidden width (`surgery.chain_reading` finds them).

    residual -> [LayerNorm or RMSNorm] -> map to H channels -> activation -> [convolution -> activation] -> map back
                                    `--> [map to H channels] --> times --'

That is an MLP of a transformer, also a gated one (SwiGLU), a basic block or a bottleneck of a ResNet (whose convolution in the
middle is a full one), an inverted residual of a MobileNet (where it is depthwise); BatchNorms may stand behind each map, and
whatever is linear channel by channel behind the last one.

Axis letters: `N` samples, `C` channels of the stream, `H` hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish"]

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


@dataclass(frozen=True, slots=True)
class Chain:
    """The layers of a branch in a row.

    Args:
        width: Hidden channels `H`, those that the last map reads.
        norm: Epsilon of the norm before the first map, or None where there is none.
        first: Side of the first map's kernel; 0 for a linear map over the last axis.
        middle: Side of the kernel of the convolution in the middle, or 0 where there is none.
        last: Side of the last map's kernel; 0 for a linear map.
        activations: After the first map, and after the convolution in the middle.
        rms: Whether the norm is an RMSNorm, else it is a LayerNorm.
        gated: Whether the activated channels are multiplied by a second map of the same input.
        inner: Channels `I` that the convolution in the middle reads where it is a full one; 0 where it is depthwise, or none.
    """

    width: int
    norm: float | None
    first: int
    middle: int
    last: int
    activations: tuple[Activation, ...]
    rms: bool = False
    gated: bool = False
    inner: int = 0

    def inner_width(self, width: int) -> int:
        """How many channels before a full convolution in the middle are kept with so many behind it; 0 where there is none."""
        return max(1, self.inner * width // self.width) if self.inner else 0

    def flops(self, channels: int, width: int) -> int:
        """FLOPs per position of the layers with so many hidden channels; norms and activations count nothing."""
        first, last, inner = max(1, self.first**2), max(1, self.last**2), self.inner_width(width)
        if inner:
            return 2 * (channels * inner * first + inner * width * self.middle**2 + width * channels * last)
        return 2 * width * (channels * (first + last + self.gated) + self.middle**2)


@dataclass(frozen=True, slots=True)
class Weights:
    """What the layers before the last map hold, with norms and BatchNorms folded in.

    Args:
        chain: The layers.
        first: `(H, C)` or `(H, C, k, k)`, and its bias `(H,)`; `I` in place of `H` before a full convolution.
        middle: Of the convolution in the middle, `(H, 1, k, k)` or `(H, I, k, k)`, and `(H,)`, or None.
        times: Of the second map of a gated MLP, `(H, C)` and `(H,)`, or None.
    """

    chain: Chain
    first: tuple[Tensor, Tensor]
    middle: tuple[Tensor, Tensor] | None = None
    times: tuple[Tensor, Tensor] | None = None
