"""Two processes of accelerate write into one log: `two_loggers.py LOG`."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import nn
from toys import Stack, gate_all, mlp

import surgery

ROWS, SIZE = 48, 4


def build() -> tuple[nn.Module, torch.Tensor]:
    """The network and all inputs, the same in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gated = gate_all(Stack(mlp(8), mlp(8), head=nn.Linear(8, 4)), torch.randn(2, 8))
    return gated, torch.randn(ROWS, 8)


def main(path: str) -> None:
    """Record this process's share of the inputs."""
    accelerator = Accelerator(cpu=True)
    gated, inputs = build()
    names = [f"input-{index}" for index in range(ROWS)]
    with torch.no_grad(), surgery.execution(gated, "skip"), surgery.record(gated, path, rows=8) as log:
        with accelerator.split_between_processes(list(range(ROWS))) as mine:
            for start in range(0, len(mine), SIZE):
                index = mine[start : start + SIZE]
                log.name_inputs([names[i] for i in index])
                gated(inputs[index])


if __name__ == "__main__":
    main(sys.argv[1])
