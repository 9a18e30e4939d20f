"""Trains a small network under `accelerate launch` and writes what came out: `two_processes.py OUTPUT.pt`."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from toys import Stack, gate_all, mlp

from surgery.context import state_of
from surgery.options import Options
from surgery.training import train_routers, trainable

C = 8


def train() -> dict[str, Tensor]:
    """Trainable parameters after a few steps, and the history; the same for any number of processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Stack(mlp(C), mlp(C), head=nn.Linear(C, 4))
    data = [torch.randn(7, C) for _ in range(4)]  # an odd size: processes get different shares
    gated = gate_all(model, data[0])
    state_of(gated).threshold = -0.2
    options = Options(steps=6, accumulate=2, router_rate=1e-2, harm_weight=0.3, diversity_weight=0.2)
    history = train_routers(gated, data, budget=0.5, options=options)
    result = {name: p.detach().clone() for name, p in trainable(gated).items()}
    return {**result, "cost": torch.tensor(history.columns()["cost"]), "loss": torch.tensor(history.columns()["loss"])}


if __name__ == "__main__":
    trained = train()
    accelerator = Accelerator(cpu=True)
    trained["processes"] = torch.tensor(accelerator.num_processes)
    torch.save(trained, f"{sys.argv[1]}.{accelerator.process_index}")
