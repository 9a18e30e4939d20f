"""Branches that are chains, written as networks write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import mlp

C, H = 6, 16
TOKENS, MAPS = (3, 5, C), (3, C, 5, 7)


class Inverted(nn.Module):
    """A branch of a MobileNet, BatchNorms with what they could have learned."""

    def __init__(self, channels: int = C, hidden: int = H, norm: bool = True) -> None:
        super().__init__()
        batch = nn.BatchNorm2d if norm else nn.Identity
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=not norm),
            batch(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            batch(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            batch(channels),
        )
        for part in self.body:
            if isinstance(part, nn.BatchNorm2d):
                for value in (part.weight, part.bias, part.running_mean):
                    nn.init.normal_(value)  # type: ignore[arg-type]
                nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


class Bottleneck(nn.Module):
    """A branch of a ResNet-50: a full convolution in the middle, with another width before it than behind it."""

    def __init__(self, channels: int = C, inner: int = 12, hidden: int = H) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        for part in self.body:
            if isinstance(part, nn.BatchNorm2d):
                for value in (part.weight, part.bias, part.running_mean):
                    nn.init.normal_(value, std=0.1)  # type: ignore[arg-type]
                nn.init.uniform_(part.running_var, 0.1, 0.2)  # type: ignore[arg-type]
                nn.init.uniform_(part.weight, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


class FeedForward(nn.Module):
    """A branch written with functions."""

    def __init__(self, act: Any = F.silu) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C, eps=1e-3), nn.Linear(C, H, bias=False), nn.Linear(H, C)
        self.drop, self.act, self.gamma = nn.Dropout(), act, nn.Parameter(torch.randn(C))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.drop(self.act(self.up(self.norm(x)))))) * self.gamma


class Squared(nn.Module):
    """An RMSNorm written out, as transformers has it."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(C)), offset

    def forward(self, x: Tensor) -> Tensor:
        made = x.to(torch.float32)
        made = made * torch.rsqrt(made.pow(2).mean(-1, keepdim=True) + 1e-3)
        if self.offset:
            return (made * (self.offset + self.weight.float())).type_as(x)  # as Gemma
        return self.weight * made.to(x.dtype)


def rms_norm(channels: int = C) -> nn.RMSNorm:
    norm = nn.RMSNorm(channels)
    nn.init.normal_(norm.weight)
    return norm


class Gated(nn.Module):
    """A branch with a product of two maps; in what order they come differs."""

    def __init__(self, order: str, norm: nn.Module | None = None, channels: int = C, hidden: int = H) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.gate, self.up = nn.Linear(channels, hidden), nn.Linear(channels, hidden, bias=False)
        self.down, self.packed = nn.Linear(hidden, channels), nn.Linear(channels, 2 * hidden)
        self.one = nn.Linear(channels, 1)
        self.order, self.act = order, nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.order == "gate first":
            return self.down(self.act(self.gate(x)) * self.up(x))
        if self.order == "up first":
            up = self.up(x)
            return self.down(up * self.act(self.gate(x)))
        if self.order == "both first":
            gate, up = self.gate(x), self.up(x)
            return self.down(up * self.act(gate))
        one, other = self.packed(x).chunk(2, dim=-1)
        return self.down(self.act(one) * other if self.order == "packed" else one * self.act(other))


BRANCHES = [
    (lambda: Inverted(8, 32), (8, 6, 6)),
    (lambda: Bottleneck(8, 16, 32), (8, 6, 6)),
    (lambda: mlp(8, 32), (5, 8)),
    (lambda: Gated("packed", rms_norm(8), channels=8, hidden=32), (5, 8)),
]
