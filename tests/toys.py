"""Residual networks small enough to be worked out by hand.

Axis letters: `N` samples, `T` tokens, `C` channels.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.chains import Chain
from surgery.gates import Gate, iter_gates
from surgery.sites import Site, SitePlan
from surgery.skip_paths import make_skip_path


class Residual(nn.Module):
    """`x + inner(x)`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Stack(nn.Module):
    """Residual blocks, then a head on the mean over positions (`pool`), or on every token."""

    def __init__(self, *inner: nn.Module, head: nn.Module | None = None, pool: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(one) for one in inner)
        self.head = head or nn.Identity()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.pool:
            x = x.mean(1) if x.dim() == 3 else x.mean((2, 3))
        return self.head(x)


class Divided(Stack):
    """NaN where the first channel is 0, as a mean over nothing is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x[..., :1] / x[..., :1])


class Masked(nn.Module):
    """The same on padded sequences of embeddings."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(one) for one in inner)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        x = inputs_embeds
        for block in self.blocks:
            x = block(x)
        return x


class Times(nn.Module):
    """A square matrix product, `x @ weight.T`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Where(nn.Module):
    """One matrix for samples whose first channel is positive, another one for the others."""

    def __init__(self, positive: Tensor, negative: Tensor) -> None:
        super().__init__()
        self.positive, self.negative = nn.Parameter(positive), nn.Parameter(negative)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0, F.linear(x, self.positive), F.linear(x, self.negative))


class Noise(nn.Module):
    """A deterministic function of its input that nothing smooth can predict, times `size`."""

    def __init__(self, channels: int, size: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(100 * torch.randn(channels, channels))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.size * torch.sin(F.linear(x, self.weight))


class Sometimes(nn.Module):
    """A branch that runs where there is something for it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.always, self.sometimes = mlp(channels), mlp(channels)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = x + self.always(x)
        return x if more is None else x + self.sometimes(x * more)


class Set(nn.Module):
    """A router that opens where the first channel is positive; where it decides per sample, that of the first token."""

    def forward(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return residual[..., 0]


class Unsized:
    """Batches that can be read again and again, but not counted."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Once:
    """Claims to be re-iterable, yields nothing the second time, as a loader over an open file does."""

    def __init__(self, batches: list[Any]) -> None:
        self.source = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


def mlp(channels: int, hidden: int | None = None) -> nn.Module:
    """The usual branch."""
    hidden = hidden or 4 * channels
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))


def convolution(channels: int) -> nn.Module:
    """The usual branch of a convolutional network."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )


def gate_all(model: nn.Module, example: Any, **plan: Any) -> nn.Module:
    """`model` with gates at every site."""
    return surgery.insert_gates(model.eval(), surgery.find_sites(model, example).plan(**plan))


def path_of(kind: Any, channels: int, layout: Any, rank: int = 0, chain: Chain | None = None) -> Any:
    """A skip path as a plan makes it."""
    site = Site("branch", "block", "", 1, 1.0, 1, ("sample",), layout, channels, 1, chain=chain)
    return make_skip_path(SitePlan(site, "sample", kind, rank))


def assert_silent_yet_learns(path: nn.Module, x: Tensor) -> None:
    """It gives zeros, and two steps of training change every parameter."""
    with torch.no_grad():
        assert not path(x).any()
    before = [parameter.detach().clone() for parameter in path.parameters()]
    optimiser, wanted = torch.optim.Adam(path.parameters(), lr=1e-2), torch.randn_like(x)
    with torch.enable_grad():
        for _ in range(2):
            optimiser.zero_grad()
            (path(x) - wanted).square().sum().backward()
            optimiser.step()
    for (name, parameter), old in zip(path.named_parameters(), before, strict=True):
        assert not torch.equal(parameter, old), name


def gates(gated: nn.Module) -> list[Gate]:
    """Gates in order of execution."""
    return [gate for _, gate in iter_gates(gated)]


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that the state dict holds."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, for the names in `expected`."""
    changed = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert expected and not changed, changed


def interrupt_after_update(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the middle of a training step: parameters are new already, everything else is not."""
    update, count = torch.optim.AdamW.step, itertools.count(1)

    def interrupted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        if next(count) == step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)


def launched(script: str, output: str) -> subprocess.CompletedProcess[str]:
    """Run `script OUTPUT` in two processes of accelerate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `accelerate launch` does for several GPUs; for several CPUs it would need MPI
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", script, output]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=Path(output).parent, check=False
    )
