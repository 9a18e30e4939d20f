"""Sizes of values of unknown rank that are unpacked: recorded where they are passed on; elsewhere the code is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery

C, HEADS = 16, 2


def by_star(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], HEADS, C // HEADS)


def by_tuple(x: Tensor) -> Tensor:
    return x.reshape((*x.size()[:-1], HEADS, C // HEADS))


def behind_others(x: Tensor) -> Tensor:
    return torch.reshape(x.mT, (-1, *x.mT.shape[1:])).mT.view(*x.shape[:2], HEADS, -1)


class Block(nn.Module):
    def __init__(self, split: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.split = nn.Linear(C, 3 * C), nn.Linear(C, C), split
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = self.split(q).transpose(1, 2), self.split(k).transpose(1, 2), self.split(v).transpose(1, 2)
        made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(made.reshape(*made.shape[:-2], C))
        return x + self.mlp(x)


@pytest.mark.parametrize("split", [by_star, by_tuple, behind_others])
def test_sizes_that_are_passed_on(split: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(Block(split), Block(split), nn.Linear(C, 3)).eval().requires_grad_(False)
    sites = surgery.find_sites(model, torch.randn(3, 5, C))
    assert [site.kind for site in sites] == ["attention", "mlp"] * 2
    gated = surgery.insert_gates(model, sites)
    for shape in ((3, 5, C), (4, 7, C)):
        x = torch.randn(shape)
        with surgery.force(gated, 1.0):
            assert torch.equal(gated(x), model(x))
        found = []
        for mode in ("skip", "mask"):
            with surgery.force(gated, 0.5), surgery.execution(gated, mode):
                found.append(gated(x))
        assert torch.allclose(*found, atol=1e-5)


def looped(x: Tensor) -> Tensor:
    size = 1
    for one in x.shape[:-1]:
        size = size * one
    return x.view(size, C).view(x.shape)


def counted(x: Tensor) -> Tensor:
    return x * len(list(x.shape[:-1]))


def rest(x: Tensor) -> Tensor:
    _, *more = x.shape[:-1]
    return x * len(more)


def indexed(x: Tensor) -> Tensor:
    sizes = [*x.shape[:-1]]
    return x * sizes[0]


def elsewhere(x: Tensor) -> Tensor:
    return x.new_full((1,), 2.0).add(*x.shape[2:]) * x


@pytest.mark.parametrize("use", [looped, counted, rest, indexed, elsewhere])
def test_other_uses_are_refused(use: Callable[[Tensor], Tensor]) -> None:
    class Branch(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(use(self.out(x)))

    model = nn.Sequential(Branch(by_star), nn.Linear(C, 3)).eval()
    sites = surgery.find_sites(model, torch.randn(3, 5, C))
    reason = sites.rejections[0].reason
    assert len(sites) == 0 and ("cannot be traced" in reason or "unpacks the sizes" in reason)
