"""Channel pruning with torch-pruning: a peer of `surgery compare` for convolutional networks.

Whole channels of smallest group magnitude go, in all layers alike (Fang et al. 2023, DepGraph). Unlike everything else that is
compared, this changes the weights: nothing of the dense network is left, and tuning trains all of it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calling import Batch, batches, call, read_output
from surgery.costs import place
from surgery.counting import flop_counter
from surgery.errors import BudgetError, MissingDependency, UnsupportedModel
from surgery.objectives import divergence
from surgery.progress import Progress
from surgery.rates import one_cycle
from surgery.training import stream_of

NAME = "pruned channels"
RATE = 1e-3
"""Peak learning rate of the tuning."""
_TRIES = 8
_MOST = 0.95  # of the channels
_CLIP = 5.0


def pruned_to(model: nn.Module, batch: Batch, dense_flops: float, cost: float) -> tuple[nn.Module, float]:
    """A copy of `model` with as few channels as bring its cost down to `cost`.

    Args:
        model: The dense model.
        batch: One input.
        dense_flops: Of the dense model for it.
        cost: As a fraction of dense.

    Returns:
        It, and the cost it has.

    Raises:
        MissingDependency: If torch-pruning is not installed.
        UnsupportedModel: If this is no convolutional network, or torch-pruning cannot follow its channels.
        BudgetError: If it cannot become so cheap.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependency('pruning needs torch-pruning: pip install "bypass-surgery[compare]"') from error
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    attends = any("attention" in type(module).__name__.lower() for module in model.modules())
    if not convolutional or attends:
        raise UnsupportedModel(f"channels are pruned in convolutional networks; {type(model).__name__} is none")
    if len(batch.args) != 1 or batch.kwargs:
        raise UnsupportedModel(
            f"channels are pruned in networks that take one tensor; {type(model).__name__} takes more"
        )
    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    low, high = 0.0, _MOST
    best: tuple[nn.Module, float] | None = None
    for _ in range(_TRIES):
        ratio = (low + high) / 2
        try:
            found = _pruned(torch_pruning, model, batch.args[0], ratio)
            reached = _flops(found, batch) / dense_flops
        except Exception as error:  # it raises whatever its tracing runs into
            raise UnsupportedModel(
                f"torch-pruning fails on {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
        low, high = (ratio, high) if reached > cost else (low, ratio)
        if reached <= cost and (best is None or reached > best[1]):
            best = found, reached
    if best is None:
        raise BudgetError(f"pruning {_MOST:.0%} of the channels does not bring the cost down to {cost:.3f}")
    return best


def distil(
    student: nn.Module, teacher: nn.Module, data: Iterable[Any], steps: int, progress: Progress, stage: str
) -> None:
    """Train all of `student` to answer as `teacher` does; labels are not used.

    Args:
        student: Changed in place; in eval mode afterwards.
        teacher: The dense model.
        data: Re-iterable batches.
        steps: Optimiser steps.
        progress: Called after every step.
        stage: What it is called there.
    """
    parameters = [p.requires_grad_() for p in student.parameters()]
    optimiser, schedule = one_cycle(parameters, steps, rate=RATE, weight_decay=1e-4)
    stream = stream_of(data)
    student.train()
    for step in range(steps):
        batch = place(next(stream), teacher)
        with torch.no_grad():
            wanted = read_output(call(teacher, batch))
        with torch.enable_grad():
            loss = divergence(read_output(call(student, batch)), wanted, batch, 2.0).mean()
            optimiser.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimiser.step()
        schedule.step()
        progress(stage, step + 1, steps)
    student.eval()


def one_input(data: Iterable[Any], model: nn.Module) -> Batch:
    """The first input of the data, where the model is."""
    batch = place(next(batches(data)), model)
    return Batch(batch.args, batch.kwargs).rows(torch.tensor([0], device=batch.tensors[0].device))


def _pruned(library: Any, model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_()  # it follows gradients from layer to layer
    last = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1:]
    with torch.enable_grad():
        pruner = library.pruner.BasePruner(
            twin,
            example,
            importance=library.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=last,  # its outputs are the classes
        )
        pruner.step()
    return twin


def _flops(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad(), flop_counter() as counter:
        call(model, batch)
    return float(counter.get_total_flops())
