"""Skip paths: what replaces a branch where it is skipped.

All are fitted in closed form before any training (`surgery.fitting`). All but narrow ones are linear in the residual stream (an
activation after the sum is the host's own).

Axis letters: `N` samples, `T` tokens, `C` channels, `R` rank, `H` hidden channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.chains import ACTIVATIONS, Chain, Weights
from surgery.sites import CHANNELS_FIRST, Layout, SitePlan, SkipKind

_LARGE = 2**16
"""Numbers in a map from which a pass over it costs more than a change to the weights."""
_CACHED = 2**21
"""Numbers in a map from which a depthwise convolution on the CPU is several times faster sample by sample."""


class SkipPath(nn.Module):
    """Base of all skip paths; the identity path adds nothing to the residual stream."""

    kind: SkipKind = "identity"

    def __init__(self, channels: int, layout: Layout) -> None:
        super().__init__()
        self.channels = channels
        self.layout = layout

    @property
    def is_identity(self) -> bool:
        """Whether the path contributes nothing."""
        return self.kind == "identity"

    def forward(self, residual: Tensor, *, added: bool = False) -> Tensor:
        """Residual stream -> what is added to it instead of the branch, or their sum; same shape."""
        return self.added(residual) if added else self.term(residual)

    def term(self, residual: Tensor) -> Tensor:
        """Residual stream -> what is added to it."""
        return torch.zeros_like(residual)

    def added(self, residual: Tensor) -> Tensor:
        """The sum of both, in as few passes over memory as the path allows."""
        if self.is_identity:
            return residual.clone()
        value = self.term(residual)
        same = value.dtype == residual.dtype and not torch.is_grad_enabled()
        return value.add_(residual) if same else residual + value  # a skip path's value is nobody else's

    def silence(self, *, fitted: bool = True) -> None:
        """Contribute nothing, yet learn: where the output is a product of parameters only the last factor becomes zero, since
        with all of them zero every gradient is.

        Args:
            fitted: Whether the other factors are worth keeping; else they become what they were before any fit.
        """
        for parameter in self.parameters():
            parameter.zero_()

    def flops(self, positions: int) -> int:
        """FLOPs per sample at `positions` positions; one multiply-add = 2."""
        return 0


class AffineSkip(SkipPath):
    """Per-channel scale and shift."""

    kind: SkipKind = "affine"

    def __init__(self, channels: int, layout: Layout) -> None:
        super().__init__(channels, layout)
        self.scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def term(self, residual: Tensor) -> Tensor:
        """Residual stream -> same shape."""
        scale, shift = self.scale.to(residual.dtype), self.shift.to(residual.dtype)
        if self.layout in CHANNELS_FIRST:
            shape = (1, self.channels, *(1,) * (residual.dim() - 2))
            scale, shift = scale.view(shape), shift.view(shape)
        return torch.addcmul(shift, residual, scale)

    def added(self, residual: Tensor) -> Tensor:
        """One pass over large maps and in graphs: `residual * (1 + scale) + shift`, which is what BatchNorm computes in eval."""
        if residual.numel() < _LARGE and not torch.compiler.is_compiling():
            return super().added(residual)
        if self.layout not in CHANNELS_FIRST:
            return torch.addcmul(self.shift.to(residual.dtype), residual, 1 + self.scale.to(residual.dtype))
        scale, shift = 1 + self.scale.to(residual.dtype), self.shift.to(residual.dtype)
        return F.batch_norm(residual, torch.zeros_like(shift), torch.ones_like(shift), scale, shift, eps=0.0)

    def flops(self, positions: int) -> int:
        """One multiply-add per element."""
        return 2 * positions * self.channels


class LinearSkip(SkipPath):
    """Full linear map over channels (a 1x1 convolution on feature maps)."""

    kind: SkipKind = "linear"

    def __init__(self, channels: int, layout: Layout) -> None:
        super().__init__(channels, layout)
        self.weight = nn.Parameter(torch.zeros(channels, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def term(self, residual: Tensor) -> Tensor:
        """Residual stream -> same shape."""
        return _linear(residual, self.weight, self.bias, self.layout)

    def added(self, residual: Tensor) -> Tensor:
        """One pass over large maps: the identity is added to the weights."""
        if self.layout not in CHANNELS_FIRST or not _is_product(residual) or residual.numel() < _LARGE:
            return super().added(residual)
        weight = _like(self.weight, residual).clone()
        weight.diagonal().add_(1)
        return _product(residual, weight, _like(self.bias, residual))

    def flops(self, positions: int) -> int:
        """C*C multiply-adds per position."""
        return 2 * positions * self.channels**2


class LowRankSkip(SkipPath):
    """Linear map of rank `R` over channels."""

    kind: SkipKind = "low-rank"

    def __init__(self, channels: int, layout: Layout, rank: int) -> None:
        super().__init__(channels, layout)
        self.rank = min(rank, channels)
        self.down = nn.Parameter(torch.zeros(self.rank, channels))
        self.up = nn.Parameter(torch.zeros(channels, self.rank))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.eye_(self.down)  # with `down` and `up` both zero nothing could be learnt

    def silence(self, *, fitted: bool = True) -> None:
        """Likewise."""
        self.up.zero_()
        self.bias.zero_()
        if not fitted or not self.down.any():
            nn.init.eye_(self.down)

    def term(self, residual: Tensor) -> Tensor:
        """Residual stream -> same shape."""
        return _linear(_linear(residual, self.down, None, self.layout), self.up, self.bias, self.layout)

    def flops(self, positions: int) -> int:
        """2*C*R multiply-adds per position."""
        return 4 * positions * self.channels * self.rank


class DepthwiseSkip(SkipPath):
    """Depthwise 3x3 convolution, then a full linear map over channels: for feature maps `(N, C, H, W)`."""

    kind: SkipKind = "depthwise"

    def __init__(self, channels: int, layout: Layout) -> None:
        super().__init__(channels, layout)
        self.kernel = nn.Parameter(torch.zeros(channels, 3, 3))
        self.weight = nn.Parameter(torch.zeros(channels, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        with torch.no_grad():
            self._look_at_own_position()

    def _look_at_own_position(self) -> None:
        self.kernel.zero_()
        self.kernel[:, 1, 1] = 1

    def silence(self, *, fitted: bool = True) -> None:
        """Likewise."""
        self.weight.zero_()
        self.bias.zero_()
        if not fitted or not self.kernel.any():
            self._look_at_own_position()

    def term(self, residual: Tensor) -> Tensor:
        """Residual stream -> same shape."""
        if residual.numel() > _CACHED and _is_product(residual):
            parts = [self._one(part) for part in residual.split(max(1, len(residual) * _CACHED // residual.numel()))]
            return torch.cat(parts)
        return self._one(residual)

    def _one(self, residual: Tensor) -> Tensor:
        kernel = _like(self.kernel, residual).unsqueeze(1)  # C 1 3 3
        spread = F.conv2d(residual, kernel, padding=1, groups=self.channels)
        return _linear(spread, self.weight, self.bias, self.layout)

    def flops(self, positions: int) -> int:
        """9*C + C*C multiply-adds per position."""
        return 2 * positions * self.channels * (9 + self.channels)


class NarrowSkip(SkipPath):
    """The branch itself with fewer hidden channels, BatchNorms folded in: for branches that are chains (`surgery.chains`).

    Which channels it keeps, and its last map, come from the fit (`surgery.narrowing`).

    Args:
        channels: Width `C` of the residual stream.
        layout: Of the residual stream.
        chain: The branch's layers.
        width: Hidden channels `H` that are kept; of those before a full convolution in the middle as large a share.
    """

    kind: SkipKind = "narrow"

    def __init__(self, channels: int, layout: Layout, chain: Chain, width: int) -> None:
        super().__init__(channels, layout)
        self.chain, self.width = chain, width
        self.inner = chain.inner_width(width)
        self.first = nn.Parameter(torch.zeros(self.inner or width, channels, *_kernel(chain.first)))
        self.first_bias = nn.Parameter(torch.zeros(self.inner or width))
        if chain.middle:
            self.middle = nn.Parameter(torch.zeros(width, self.inner or 1, chain.middle, chain.middle))
            self.middle_bias = nn.Parameter(torch.zeros(width))
        if chain.gated:
            self.times = nn.Parameter(torch.zeros(width, channels))
            self.times_bias = nn.Parameter(torch.zeros(width))
        self.last = nn.Parameter(torch.zeros(channels, width, *_kernel(chain.last)))
        self.bias = nn.Parameter(torch.zeros(channels))

    @property
    def holds_channels(self) -> bool:
        """Whether it makes use of channels of its branch; else the next fit chooses some."""
        return bool(self.last.any())

    def silence(self, *, fitted: bool = True) -> None:
        """Likewise; without a fit worth keeping nothing is left of its branch's channels."""
        for parameter in (self.last, self.bias) if fitted else self.parameters():
            parameter.zero_()

    def features(self, residual: Tensor) -> Tensor:
        """Residual stream -> hidden channels that the last map reads, `H` in place of `C`."""
        middle = (self.middle, self.middle_bias) if self.chain.middle else None
        times = (self.times, self.times_bias) if self.chain.gated else None
        return chain_features(Weights(self.chain, (self.first, self.first_bias), middle, times), residual, self.layout)

    def term(self, residual: Tensor) -> Tensor:
        """Residual stream -> same shape."""
        return _map(self.features(residual), self.last, self.bias, self.layout)

    def flops(self, positions: int) -> int:
        """Multiply-adds of the maps per position; norms and activations count nothing, as in the branch."""
        return positions * self.chain.flops(self.channels, self.width)


def chain_features(weights: Weights, residual: Tensor, layout: Layout) -> Tensor:
    """What a chain's last map reads.

    Args:
        weights: The layers before it.
        residual: The residual stream.
        layout: Of the residual stream.

    Returns:
        The residual's shape with `H` channels.
    """
    chain, made = weights.chain, first_features(weights, residual, layout)
    if weights.middle is None:
        return made
    weight, bias = (_like(value, made) for value in weights.middle)
    groups = 1 if chain.inner else len(weight)
    return ACTIVATIONS[chain.activations[1]](F.conv2d(made, weight, bias, padding=chain.middle // 2, groups=groups))


def first_features(weights: Weights, residual: Tensor, layout: Layout) -> Tensor:
    """What a chain's convolution in the middle reads, or its last map where it has none; likewise."""
    chain, x = weights.chain, residual
    if chain.norm is not None:
        norm = F.rms_norm if chain.rms else F.layer_norm
        x = norm(residual, residual.shape[-1:], eps=chain.norm)
    made = ACTIVATIONS[chain.activations[0]](_map(x, *weights.first, layout))
    return made if weights.times is None else made * _map(x, *weights.times, layout)


def make_skip_path(planned: SitePlan) -> SkipPath:
    """The skip path that a plan asks for; it contributes nothing until it is fitted."""
    kind, channels, layout, chain = planned.skip, planned.site.channels, planned.site.layout, planned.site.chain
    if kind == "affine":
        return AffineSkip(channels, layout)
    if kind == "linear":
        return LinearSkip(channels, layout)
    if kind == "depthwise":
        return DepthwiseSkip(channels, layout)
    if kind == "low-rank":
        return LowRankSkip(channels, layout, planned.rank)
    if kind == "narrow" and chain is not None:
        return NarrowSkip(channels, layout, chain, planned.rank)
    return SkipPath(channels, layout)


def _kernel(side: int) -> tuple[int, ...]:
    return (side, side) if side else ()


def _map(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Tensor:
    """A linear map over channels, or a convolution of a feature map that keeps its size."""
    if weight.dim() == 4 and weight.shape[-1] > 1:
        return F.conv2d(x, _like(weight, x), _like(bias, x), padding=weight.shape[-1] // 2)
    return _linear(x, weight.flatten(1), bias, layout)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    weight, bias = _like(weight, x), None if bias is None else _like(bias, x)
    if layout not in CHANNELS_FIRST:
        return F.linear(x, weight, bias)
    if len(x) > 1 and bias is not None and _is_product(x):
        return _product(x, weight, bias)
    convolve = F.conv2d if layout == "NCHW" else F.conv1d
    return convolve(x, weight.view(*weight.shape, *(1,) * (x.dim() - 2)), bias)


def _is_product(x: Tensor) -> bool:
    """Whether a 1x1 convolution is a product of matrices as its map lies in memory, which on the CPU takes down to a ninth of
    the time (`surgery.scripts.rows_speed --what skip`).
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.is_contiguous()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`weight` over the channels of `(N, C, *positions)`, plus `bias`."""
    rows = x.flatten(2)
    made = torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), rows)
    return made.view(len(x), -1, *x.shape[2:])


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter if parameter.dtype == x.dtype else parameter.to(x.dtype)
