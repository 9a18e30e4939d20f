"""Chains: branches that are layers in a row with one hidden width, read off one recorded call.

    residual -> [LayerNorm] -> map to H channels -> activation -> [depthwise convolution -> activation] -> map back

That is an MLP of a transformer, a basic block of a ResNet, an inverted residual of a MobileNet; BatchNorms may stand behind each
map, and whatever is linear channel by channel behind the last one. A branch that does anything else is no chain.

Axis letters: `N` samples, `C` channels of the stream, `H` hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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
        width: Hidden channels `H`.
        norm: Epsilon of the LayerNorm before the first map, or None where there is none.
        first: Side of the first map's kernel; 0 for a linear map over the last axis.
        middle: Side of the depthwise convolution's kernel, or 0 where there is none.
        last: Side of the last map's kernel; 0 for a linear map.
        activations: After the first map, and after the depthwise convolution.
    """

    width: int
    norm: float | None
    first: int
    middle: int
    last: int
    activations: tuple[Activation, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """What the layers before the last map hold, with norms and BatchNorms folded in.

    Args:
        chain: The layers.
        first: `(H, C)` or `(H, C, k, k)`, and its bias `(H,)`.
        middle: `(H, 1, k, k)` and `(H,)`, or None.
    """

    chain: Chain
    first: tuple[Tensor, Tensor]
    middle: tuple[Tensor, Tensor] | None


def read_chain(run: Callable[[], Tensor], residual: Tensor) -> Weights | None:
    """Read the layers of a branch off one call.

    Args:
        run: Runs the branch on `residual`.
        residual: The stream that it reads.

    Returns:
        Its layers and their weights, or None where it is no chain.
    """
    calls = _Calls()
    with torch.no_grad(), calls:
        value = run()
    try:
        return _Reader(calls.found, residual, value).read()
    except _NoChain:
        return None


class _NoChain(Exception):
    """The branch is no chain; never leaves this module."""


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    named: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    output: Tensor

    def tensor(self, name: str) -> Tensor | None:
        """An operand that is a plain floating-point tensor, in float32 at least, or None where it is missing."""
        value = self.named.get(name)
        if value is None:
            return None
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_floating_point():
            raise _NoChain
        found: Tensor = value.detach()
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found  # folding adds up


_OPERANDS: Mapping[Any, tuple[str, tuple[str, ...]]] = {
    F.layer_norm: ("norm", ("input", "normalized_shape", "weight", "bias", "eps")),
    F.linear: ("linear", ("input", "weight", "bias")),
    F.conv2d: ("conv", ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.batch_norm: ("batch", ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")),
    F.relu: ("relu", ("input", "inplace")),
    torch.relu: ("relu", ("input",)),
    Tensor.relu: ("relu", ("input",)),
    F.relu6: ("relu6", ("input", "inplace")),
    F.hardtanh: ("hardtanh", ("input", "min_val", "max_val", "inplace")),
    F.gelu: ("gelu", ("input", "approximate")),
    F.silu: ("silu", ("input", "inplace")),
    F.hardswish: ("hardswish", ("input", "inplace")),
    F.dropout: ("dropout", ("input", "p", "training", "inplace")),
    torch.mul: ("scale", ("input", "other")),
    Tensor.mul: ("scale", ("input", "other")),
    Tensor.mul_: ("scale", ("input", "other")),
    Tensor.__mul__: ("scale", ("input", "other")),
    Tensor.__rmul__: ("scale", ("input", "other")),
}


@dataclass
class _Calls(TorchFunctionMode):
    """Notes every call that gives a tensor."""

    found: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and note it."""
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            name, operands = _OPERANDS.get(func, ("", ()))
            named = dict(zip(operands, args, strict=False)) | (kwargs or {})
            inputs = tuple(v for v in (*args, *(kwargs or {}).values()) if isinstance(v, Tensor))
            self.found.append(_Call(name, named, inputs, output))
        return output


class _Reader:
    """Goes through the calls that lead from the residual stream to the branch's value."""

    def __init__(self, calls: list[_Call], residual: Tensor, value: Tensor) -> None:
        self.calls = [c for c in calls if c.name != "dropout" or c.named.get("training", True)]
        aliases = {id(c.output): c.named["input"] for c in calls if c.name == "dropout"}
        self.alias = lambda x: aliases.get(id(x), x)
        self.current, self.value = residual, value
        self.index = 0

    def read(self) -> Weights:
        norm = self.take("norm")
        first = self.map()
        weight, bias = self.batch(*_own(first))
        if norm is not None:
            weight, bias = _normed(norm, weight, bias)
        activations = [self.activation()]
        middle = None
        if (following := self.peek()) is not None and following.name == "conv" and _groups(following) > 1:
            middle = self.batch(*_own(self.map(depthwise=True)))
            activations.append(self.activation())
        last = self.map()
        self.rest(last)
        width = len(weight)
        chain = Chain(
            width,
            None if norm is None else float(norm.named.get("eps", 1e-5)),
            _side(first),
            0 if middle is None else middle[0].shape[-1],
            _side(last),
            tuple(activations),
        )
        if last.tensor("weight").shape[1] != width or (norm is not None and chain.first):  # type: ignore[union-attr]
            raise _NoChain
        return Weights(chain, (weight, bias), middle)

    def peek(self) -> _Call | None:
        return self.calls[self.index] if self.index < len(self.calls) else None

    def take(self, *names: str) -> _Call | None:
        """The next call if it is one of these on the current value, which becomes its output."""
        call = self.peek()
        if call is None or call.name not in names:
            return None
        if self.alias(call.named.get("input")) is not self.current:
            raise _NoChain
        self.index += 1
        self.current = call.output
        return call

    def map(self, *, depthwise: bool = False) -> _Call:
        """A linear map or a convolution that keeps the map's size, over all channels or over each alone."""
        call = self.take("linear", "conv")
        if call is None or call.tensor("weight") is None:
            raise _NoChain
        weight = call.tensor("weight")
        assert weight is not None
        if call.name == "conv":
            side = weight.shape[-1]
            plain = weight.shape[-2:] == (side, side) and side % 2 == 1
            plain = plain and _pair(call.named.get("stride", 1)) == (1, 1) == _pair(call.named.get("dilation", 1))
            padding = call.named.get("padding", 0)
            plain = plain and (padding == "same" or _pair(padding) == (side // 2, side // 2))
            if not plain or _groups(call) != (len(weight) if depthwise else 1):
                raise _NoChain
        elif depthwise or weight.dim() != 2:
            raise _NoChain
        return call

    def batch(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A map with the BatchNorm behind it, if there is one."""
        call = self.take("batch")
        if call is None:
            return weight, bias
        mean, variance = call.tensor("running_mean"), call.tensor("running_var")
        if mean is None or variance is None or call.named.get("training", False):
            raise _NoChain
        scale = (variance + call.named.get("eps", 1e-5)).rsqrt()
        if (learned := call.tensor("weight")) is not None:
            scale = scale * learned
        shift = call.tensor("bias")
        bias = (bias - mean) * scale + (0 if shift is None else shift)
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), bias

    def activation(self) -> Activation:
        call = self.take("relu", "relu6", "hardtanh", "gelu", "silu", "hardswish")
        if call is None:
            raise _NoChain
        if call.name == "hardtanh":
            if (call.named.get("min_val", -1.0), call.named.get("max_val", 1.0)) != (0.0, 6.0):
                raise _NoChain
            return "relu6"
        if call.name == "gelu" and call.named.get("approximate", "none") == "tanh":
            return "gelu_tanh"
        return call.name  # type: ignore[return-value]

    def rest(self, last: _Call) -> None:
        """What is behind the last map: channel by channel and linear, or nothing."""
        channels = len(last.tensor("weight"))  # type: ignore[arg-type]
        while self.peek() is not None:
            call = self.take("batch", "scale")
            if call is None or (call.name == "batch" and call.named.get("training", False)):
                raise _NoChain
            if call.name == "scale":
                other = call.named.get("other")
                if isinstance(other, Tensor) and other.numel() not in (1, channels):
                    raise _NoChain
        if self.alias(self.value) is not self.current:
            raise _NoChain


def _own(call: _Call) -> tuple[Tensor, Tensor]:
    """A map's weight and bias."""
    weight, bias = call.tensor("weight"), call.tensor("bias")
    assert weight is not None
    return weight, torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias


def _normed(norm: _Call, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear map over what a LayerNorm gives before its own scale and shift."""
    if weight.dim() != 2 or tuple(norm.named["normalized_shape"]) != weight.shape[1:]:
        raise _NoChain
    scale, shift = norm.tensor("weight"), norm.tensor("bias")
    if shift is not None:
        bias = bias + weight @ shift
    return weight if scale is None else weight * scale, bias


def _side(call: _Call) -> int:
    return 0 if call.name == "linear" else int(call.named["weight"].shape[-1])


def _groups(call: _Call) -> int:
    return int(call.named.get("groups", 1))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
