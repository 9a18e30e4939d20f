"""The smallest network with something to skip: for the self-test of `surgery doctor` and for examples."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """`x + mlp(x)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C)` -> `(N, C)`."""
        return x + self.mlp(x)


class TwoBlocks(nn.Module):
    """Two residual blocks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = Block(width)
        self.second = Block(width)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C)` -> `(N, C)`."""
        return self.second(self.first(x))
