"""What tests of graph patterns share: small networks, what is found in them, and what their gates compute."""

from __future__ import annotations

from typing import Any

import torch
from subjects import assert_close, assert_equal, outputs
from torch import Tensor, nn

import surgery

N, T, C = 3, 5, 8


def convert(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[surgery.Sites, nn.Module]:
    """Sites of a toy, and the toy with gates whose skip paths are the identity."""
    model.eval().requires_grad_(False)  # as the gated copy's: see `Entry.build`
    sites = surgery.find_sites(model, kwargs if kwargs else args if len(args) > 1 else args[0])
    return sites, surgery.insert_gates(model, sites.plan(skip="identity"))


def check(model: nn.Module, x: Any, expected: list[str], closed: Tensor | None = None) -> surgery.Sites:
    """The sites are `expected`; open is the original, closed is `closed`, and `skip` is `mask`."""
    sites, gated = convert(model, x)
    assert list(sites.names) == expected, str(sites)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, x), outputs(model, x))
    for mode in ("skip", "mask"):
        if closed is not None:
            with surgery.execution(gated, mode), surgery.force(gated, 0.0):  # type: ignore[arg-type]
                assert_close(outputs(gated, x), [closed], 1e-6)
    for seed in range(4):
        found = []
        for mode in ("skip", "mask"):
            with surgery.execution(gated, mode), surgery.force(gated, 0.5, seed):  # type: ignore[arg-type]
                found.append(outputs(gated, x))
        assert_close(*found, 1e-5)
    return sites


def tokens() -> Tensor:
    return torch.randn(N, T, C)


def maps() -> Tensor:
    return torch.randn(N, C, 6, 6)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))


class Base(nn.Module):
    """A norm and an MLP, for toys that add them up in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.mlp = mlp()


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))
