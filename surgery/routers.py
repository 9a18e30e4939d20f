"""Routers: residual stream -> one score per sample, per token, or per sample and head.

A score estimates how much is lost by skipping; the gate is open where it exceeds the threshold. Router inputs are
*normalised*, because pooled features share a large common part and a router on raw ones collapses to a static policy.

The router of an attention site may lead: the MLP site of the same layer then owns one row that reads the leader's
hidden features (`FollowingRouter`), which are those of the stream before attention.

Axis letters: `N` samples, `T` tokens, `C` channels, `F` features, `H` heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.sites import CHANNELS_FIRST, Layout, SitePlan


class Scorer(nn.Module):
    """Hidden features -> score. Parameters stay fp32 whatever dtype the model is moved to."""

    up: nn.Linear

    def read(self, hidden: Tensor) -> Tensor:
        """Hidden features `(..., hidden)` -> `(...)`, or `(..., H)` where there are several heads to decide."""
        scores: Tensor = self.up(hidden)
        return scores.squeeze(-1)

    def flops(self, positions: int) -> int:
        """FLOPs per sample with `positions` decisions; one multiply-add = 2."""
        return 2 * positions * self.up.weight.numel()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.dtype is not torch.float32:
                parameter.data = parameter.data.float()
        for name, buffer in list(self._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        return result


def make_row(hidden: int, heads: int) -> nn.Linear:
    """The map from hidden features to scores; nearly 0 at first."""
    row = nn.Linear(hidden, heads)
    nn.init.normal_(row.weight, std=1e-3)
    nn.init.zeros_(row.bias)
    return row


class FollowingRouter(Scorer):
    """One score per sample or token from the hidden features of another router."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = make_row(hidden, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """The leader's hidden features `(..., hidden)` -> scores `(...)`."""
        return self.read(hidden)


class Router(Scorer):
    """Features -> bottleneck -> score."""

    def __init__(self, features: int, hidden: int, heads: int = 1) -> None:
        super().__init__()
        self.features = features
        self.down = nn.Linear(features, hidden)
        self.up = make_row(hidden, heads)

    def score(self, features: Tensor) -> Tensor:
        """`(..., F)` -> `(...)`, or `(..., H)` where there are several heads to decide."""
        return self.read(self.squeeze(features))

    def squeeze(self, features: Tensor) -> Tensor:
        """`(..., F)` -> hidden features `(..., hidden)`."""
        return F.gelu(self.down(features), approximate="tanh")  # called as modules: offloading hooks their calls

    def extract(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        """Residual stream -> features in fp32."""
        return residual.float()

    def forward(self, residual: Tensor, mask: Tensor | None = None, *, hidden: bool = False) -> Tensor:
        """Residual stream -> scores, or with `hidden` the features that they are read from.

        Args:
            residual: `(N, *positions, C)`, `(N, C, H, W)` or `(N, C, T)`.
            mask: False at padding, `(N, T)`.
            hidden: Whether hidden features are wanted, `(N, hidden)` or `(N, *positions, hidden)`.
        """
        found = self.squeeze(self.extract(residual, mask))
        return found if hidden else self.read(found)

    def flops(self, positions: int) -> int:
        """FLOPs per sample with `positions` decisions; one multiply-add = 2."""
        return super().flops(positions) + 2 * positions * self.down.weight.numel()


class TokenRouter(Router):
    """One score per token (or spatial position) from its own channels, LayerNorm without parameters in front."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, hidden)

    def extract(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(N, *positions, C)` -> the same, fp32 and normalised."""
        return F.layer_norm(residual.float(), residual.shape[-1:])


class SampleRouter(Router):
    """One score per sample from pooled channels: mean, and the first token (sequences) or the maximum (feature maps).

    Pooled features are standardised with statistics of the calibration data (`standardise`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, hidden: int, layout: Layout, heads: int = 1) -> None:
        features = channels if layout == "NC" else 2 * channels
        super().__init__(features, hidden, heads)
        self.layout = layout
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def extract(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        """Residual stream -> pooled features `(N, F)`, fp32, standardised; padding (`mask` False) does not count."""
        return (self.pool(residual, mask) - self.mean) / self.std

    def pool(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        """Residual stream -> raw pooled features `(N, F)`, fp32."""
        if self.layout == "NC":
            return residual.float()
        if self.layout == "NCT" and mask is not None:
            real = mask[:, None].bool()  # N 1 T
            mean = residual.float().masked_fill(~real, 0).sum(2) / real.sum(2).clamp_min(1)
            return torch.cat((mean, residual.float().masked_fill(~real, -torch.inf).amax(2).nan_to_num(neginf=0.0)), 1)
        if self.layout in CHANNELS_FIRST:
            axes = tuple(range(2, residual.dim()))
            return torch.cat((residual.mean(axes), residual.amax(axes)), 1).float()
        flat = residual if residual.dim() == 3 else residual.flatten(1, -2)  # N T C
        if self.layout == "NHWC":
            return torch.cat((flat.mean(1), flat.amax(1)), 1).float()
        if mask is None:
            return torch.cat((flat.mean(1), flat[:, 0]), 1).float()
        weights = mask.to(flat.dtype).unsqueeze(-1)  # N T 1
        first = flat[torch.arange(len(flat), device=flat.device), mask.int().argmax(1)]
        # float32 sums: a half-precision sum over a long, padded sequence would depend on the padding
        mean = (flat.float() * weights.float()).sum(1) / weights.float().sum(1).clamp_min(1)
        return torch.cat((mean, first.float()), 1)

    def standardise(self, pooled: Tensor) -> None:
        """Set the statistics from raw pooled features `(N, F)`."""
        self.mean.copy_(pooled.mean(0))
        self.std.copy_(pooled.std(0, correction=0).clamp_min(1e-3 * pooled.std().clamp_min(1e-6)))


def router_features(layout: Layout, channels: int, granularity: str) -> int:
    """Number of router inputs `F`."""
    return channels if granularity == "token" or layout == "NC" else 2 * channels


def make_router(planned: SitePlan) -> Router | FollowingRouter:
    """The router for a site: a `Router`, unless it follows another one."""
    site = planned.site
    if planned.leader:
        return FollowingRouter(planned.hidden)
    if planned.granularity == "token":
        return TokenRouter(site.channels, planned.hidden)
    return SampleRouter(site.channels, planned.hidden, site.layout, len(site.units))
