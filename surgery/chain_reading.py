"""Reading chains (`surgery.chains`) off one recorded call of a branch, whoever wrote it.

A branch that does anything else than a chain is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from surgery.chains import Activation, Chain, Weights


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
    outputs: tuple[Tensor, ...]

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    def tensor(self, name: str) -> Tensor | None:
        """An operand that is a plain floating-point tensor, in float32 at least, or None where it is missing."""
        value = self.named.get(name)
        if value is None:
            return None
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_floating_point():
            raise _NoChain
        found: Tensor = value.detach()
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found  # folding adds up


_ACTIVE = ("relu", "relu6", "hardtanh", "gelu", "silu", "hardswish")
_BINARY = ("input", "other", "alpha")
_OPERANDS: Mapping[Any, tuple[str, tuple[str, ...]]] = {
    F.layer_norm: ("norm", ("input", "normalized_shape", "weight", "bias", "eps")),
    F.rms_norm: ("rms", ("input", "normalized_shape", "weight", "eps")),
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
    Tensor.to: ("cast", ("input",)),
    Tensor.float: ("cast", ("input",)),
    Tensor.type_as: ("cast", ("input",)),
    Tensor.contiguous: ("cast", ("input",)),
    torch.chunk: ("chunk", ("input", "chunks", "dim")),
    Tensor.chunk: ("chunk", ("input", "chunks", "dim")),
    torch.pow: ("pow", ("input", "exponent")),
    Tensor.pow: ("pow", ("input", "exponent")),
    Tensor.__pow__: ("pow", ("input", "exponent")),
    torch.square: ("square", ("input",)),
    Tensor.square: ("square", ("input",)),
    torch.mean: ("mean", ("input", "dim", "keepdim")),
    Tensor.mean: ("mean", ("input", "dim", "keepdim")),
    torch.rsqrt: ("rsqrt", ("input",)),
    Tensor.rsqrt: ("rsqrt", ("input",)),
    torch.add: ("shift", _BINARY),
    Tensor.add: ("shift", _BINARY),
    Tensor.__add__: ("shift", _BINARY),
    Tensor.__radd__: ("shift", _BINARY),
    torch.mul: ("scale", _BINARY),
    Tensor.mul: ("scale", _BINARY),
    Tensor.mul_: ("scale", _BINARY),
    Tensor.__mul__: ("scale", _BINARY),
    Tensor.__rmul__: ("scale", _BINARY),
}


@dataclass
class _Calls(TorchFunctionMode):
    """Notes every call that gives tensors, or nothing."""

    found: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and note it."""
        result = func(*args, **(kwargs or {}))
        name, operands = _OPERANDS.get(func, ("", ()))
        outputs = _tensors(result)
        if outputs or result is None:  # `h[:, 0] = 1` gives None
            named = dict(zip(operands, args, strict=False)) | (kwargs or {})
            self.found.append(_Call(name, named, _tensors((args, tuple((kwargs or {}).values()))), outputs))
        return result


def _tensors(value: Any) -> tuple[Tensor, ...]:
    """Every tensor in nested lists and tuples."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(t for one in value for t in _tensors(one)) if isinstance(value, (list, tuple)) else ()


@dataclass(frozen=True, slots=True)
class _Norm:
    eps: float
    rms: bool
    scale: Tensor | None
    shift: Tensor | None


@dataclass(slots=True)
class _Map:
    """What a map holds, and what it gave, later with the activation."""

    weight: Tensor
    bias: Tensor
    value: Tensor

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class _Reader:
    """Goes through the calls that lead from the residual stream to the branch's value; those that do not read the stream are left
    out.
    """

    def __init__(self, calls: list[_Call], residual: Tensor, value: Tensor) -> None:
        self.calls: list[_Call] = []
        self.of_stream = {id(residual)}
        self.aliases: dict[int, Tensor] = {}
        for call in calls:
            if not any(id(one) in self.of_stream for one in call.inputs):
                continue
            self.of_stream |= {id(one) for one in call.outputs}
            if call.name == "cast" or (call.name == "dropout" and not call.named.get("training", True)):
                if call.output is not call.named["input"]:
                    self.aliases[id(call.output)] = self.alias(call.named["input"])
            else:
                self.calls.append(call)
        self.current, self.value = residual, value
        self.index = 0

    def alias(self, value: Any) -> Any:
        """What a value was before casts and dropouts that do nothing."""
        return self.aliases.get(id(value), value)

    def read(self) -> Weights:
        norm = self.norm()
        call, first, times, activation = self.hidden()
        activations = [activation]
        if norm is not None:
            for one in (first, *([] if times is None else [times])):
                one.weight, one.bias = _normed(norm, *one.pair)
        middle, last = self.middle()
        full = middle is not None and _groups(last) == 1
        if middle is not None:
            activations.append(self.activation())
            last = self.map()
        self.rest(last)
        chain = Chain(
            width=len(first.weight if middle is None else middle[0]),
            norm=None if norm is None else norm.eps,
            first=_side(call),
            middle=0 if middle is None else middle[0].shape[-1],
            last=_side(last),
            activations=tuple(activations),
            rms=norm is not None and norm.rms,
            gated=times is not None,
            inner=len(first.weight) if full else 0,
        )
        maps = (chain.first, chain.middle, chain.last)
        widths = {len(_own(last)[0][0]), chain.width, *([] if full else [len(first.weight)])}
        if len(widths) > 1 or ((norm is not None or chain.gated) and any(maps)):
            raise _NoChain
        return Weights(chain, first.pair, middle, None if times is None else times.pair)

    def middle(self) -> tuple[tuple[Tensor, Tensor] | None, _Call]:
        """What the convolution in the middle holds, if there is one, and its call; else the call of the last map."""
        call = self.peek()
        if call is not None and call.name == "conv" and _groups(call) > 1:
            return self.batch(self.map(depthwise=True)), call
        call = self.map()
        at, value = self.index, self.current
        own = self.batch(call)
        following = self.peek()
        if call.name == "conv" and following is not None and following.name in _ACTIVE:
            return own, call
        self.index, self.current = at, value
        return None, call

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

    def times(self) -> Any:
        """What the current value is multiplied with by the next call, which is taken, or None."""
        call = self.peek()
        if call is None or call.name != "scale":
            return None
        one, other = self.alias(call.named.get("input")), self.alias(call.named.get("other"))
        if one is not self.current:
            one, other = other, one
        if one is not self.current:
            raise _NoChain
        self.index += 1
        self.current = call.output
        return other

    def norm(self) -> _Norm | None:
        """A norm over channels, by torch's own function or, an RMSNorm, written out."""
        if (call := self.take("norm", "rms")) is not None:
            if len(call.named["normalized_shape"]) != 1:
                raise _NoChain
            eps = call.named.get("eps")
            if eps is None:
                eps = (
                    torch.finfo(torch.promote_types(call.output.dtype, torch.float32)).eps
                    if call.name == "rms"
                    else 1e-5
                )
            return _Norm(float(eps), call.name == "rms", call.tensor("weight"), call.tensor("bias"))
        source = self.current
        power = self.take("pow", "square")
        if power is None:
            return None
        mean, shift = self.take("mean"), self.take("shift")
        if mean is None or shift is None or self.take("rsqrt") is None:
            raise _NoChain
        over, eps = mean.named.get("dim"), shift.named.get("other")
        if shift.named.get("alpha", 1) != 1:
            raise _NoChain
        last = (-1, source.dim() - 1)
        squared = power.name == "square" or power.named.get("exponent") == 2
        along = over in last or (isinstance(over, (list, tuple)) and len(over) == 1 and over[0] in last)
        if not (squared and along and mean.named.get("keepdim") and isinstance(eps, float)):
            raise _NoChain
        factor, self.current = self.current, source
        if self.times() is not factor:
            raise _NoChain
        scale = None
        if (following := self.peek()) is not None and following.name == "scale":
            scale = self.times()
            if not isinstance(scale, Tensor) or not self.is_scale(scale, source.shape[-1], -1):
                raise _NoChain
            scale = scale.detach().float() if scale.dtype in (torch.float16, torch.bfloat16) else scale.detach()
            scale = scale.flatten()
        return _Norm(eps, True, scale, None)

    def hidden(self) -> tuple[_Call, _Map, _Map | None, Activation]:
        """The call of the first map, what it holds, what the second map of a gated MLP holds, and the activation."""
        source, call = self.current, self.map()
        maps = [_Map(*self.batch(call), self.current)]
        if (halves := self.take("chunk")) is not None:
            maps = _halved(maps[0], halves)
        active, activation = -1, None
        while (following := self.peek()) is not None:
            reads = self.alias(following.named.get("input"))
            if following.name == "linear" and reads is source and len(maps) == 1:
                self.current = source
                maps.append(_Map(*_own(self.map()), self.current))
            elif activation is None and (found := [i for i, one in enumerate(maps) if one.value is reads]):
                active, self.current = found[0], maps[found[0]].value
                activation = self.activation()
                maps[active].value = self.current
            else:
                break
        if activation is None:
            raise _NoChain
        if len(maps) == 1:
            return call, maps[0], None, activation
        if len(maps[0].weight) != len(maps[1].weight):
            raise _NoChain
        self.current = maps[active].value
        if self.times() is not maps[1 - active].value:
            raise _NoChain
        return call, maps[active], maps[1 - active], activation

    def map(self, *, depthwise: bool = False) -> _Call:
        """A linear map or a convolution that keeps the map's size, over all channels or over each alone."""
        call = self.take("linear", "conv")
        weight = None if call is None else call.tensor("weight")
        if call is None or weight is None or id(call.named["weight"]) in self.of_stream:
            raise _NoChain
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

    def batch(self, of: _Call) -> tuple[Tensor, Tensor]:
        """What a map and the BatchNorm behind it hold, if there is one."""
        weight, bias = _own(of)
        call = self.take("batch")
        if call is None:
            return weight, bias
        mean, variance = call.tensor("running_mean"), call.tensor("running_var")
        if mean is None or variance is None or call.named.get("training", False) or _axis(of) != 1 - of.output.dim():
            raise _NoChain
        scale = (variance + call.named.get("eps", 1e-5)).rsqrt()
        if (learned := call.tensor("weight")) is not None:
            scale = scale * learned
        shift = call.tensor("bias")
        bias = (bias - mean) * scale + (0 if shift is None else shift)
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), bias

    def activation(self) -> Activation:
        call = self.take(*_ACTIVE)
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
        axis = _axis(last)
        while (following := self.peek()) is not None:
            if following.name == "scale":
                if not self.is_scale(self.times(), channels, axis):
                    raise _NoChain
                continue
            call = self.take("batch")
            if call is None or call.named.get("training", False) or axis != 1 - call.output.dim():
                raise _NoChain
        if self.alias(self.value) is not self.current:
            raise _NoChain

    def is_scale(self, value: Any, channels: int, axis: int) -> bool:
        """Whether a factor is a number, or one per channel along this axis, that does not come from the stream."""
        if not isinstance(value, Tensor):
            return True
        each = value.dim() >= -axis and value.shape[axis] == value.numel() == channels
        return (each or value.numel() == 1) and id(value) not in self.of_stream


def _own(call: _Call) -> tuple[Tensor, Tensor]:
    """A map's weight and bias."""
    weight, bias = call.tensor("weight"), call.tensor("bias")
    assert weight is not None
    return weight, torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias


def _halved(one: _Map, call: _Call) -> list[_Map]:
    """The two maps of a packed one, whose value `call` cuts in half."""
    values = call.outputs
    over = call.named.get("dim", 0)
    if len(values) != 2 or over not in (-1, values[0].dim() - 1) or len(one.weight) % 2:
        raise _NoChain
    parts = zip(one.weight.chunk(2), one.bias.chunk(2), values, strict=True)
    return [_Map(weight, bias, value) for weight, bias, value in parts]


def _normed(norm: _Norm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear map over what a norm gives before its own scale and shift."""
    if weight.dim() != 2:
        raise _NoChain
    if norm.shift is not None:
        bias = bias + weight @ norm.shift
    return weight if norm.scale is None else weight * norm.scale, bias


def _axis(call: _Call) -> int:
    """Which axis of a map's value are channels."""
    return -1 if call.name == "linear" else -3


def _side(call: _Call) -> int:
    return 0 if call.name == "linear" else int(call.named["weight"].shape[-1])


def _groups(call: _Call) -> int:
    return int(call.named.get("groups", 1))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
