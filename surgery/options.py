"""`Options`: how to train, checked when they are made.

`train_routers` reads them, and so do the trainings of skip paths and of changes of the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from surgery.errors import SurgeryError, check_choice, is_number
from surgery.labelling import Labels

LOWEST, HIGHEST = 0.45, 0.9  # budgets that a checkpoint serves beside its own
PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(slots=True)
class Options:
    """How to train; every field has a default that was chosen by measurement (docs/lab/skip_paths.md).

    Args:
        epochs: Passes over the data.
        steps: Number of optimiser steps; overrides `epochs` (needed for streaming data without a length).
        router_rate: Peak learning rate of routers at up to 128 channels; it falls with the width above
            (`surgery.rates`).
        skip_rate: Peak learning rate of skip paths, likewise; 0 freezes them.
        nested_rate: Peak learning rate of skip paths while they are trained for static policies; 0 leaves that out.
        budgets: Range that every step draws its budget from; by default from 0.45, or the budget if that is smaller, to
            0.9, or the budget if that is larger. Twice the same number trains for that budget alone. Skip paths of
            static policies are trained for cuts from the smallest of these, and 0.45 in any case, to 0.95.
        noise: Scale of the logistic noise on scores.
        temperature: Softmax temperature of the distillation.
        stream_weight: Weight of the error of the residual streams; by default 0 where every gate decides per token (the
            output tells which tokens matter, their streams do not), else 1.
        anneal: Share of the steps in which the smallest budget falls from the largest one.
        heal_rate: Peak learning rate of healing.
        heal_rank: Rank of low-rank changes while healing.
        label_weight: Weight of cross-entropy with the labels, if the data has some.
        harm_weight: Weight of first-order harm, labelled anew for every batch, as an auxiliary target of routers: which
            inputs a gate should be open for (`surgery.auxiliary`). Takes a forward and a backward pass more a batch.
        diversity_weight: Weight of the mutual information of input and decision, which keeps gates from treating all
            inputs of a batch alike (`surgery.auxiliary`).
        harm_labels: What routers are fitted to before training: `first_order`, `leave_one_out` or `auto`, as `labels` of
            `surgery.regress_routers`.
        accumulate: Batches per optimiser step.
        save_every: Steps between checkpoints.
        mixed_precision: `no`, `fp16` or `bf16`.

    Raises:
        SurgeryError: If a number is out of range or the precision is unknown.
    """

    epochs: int = 3
    steps: int | None = None
    router_rate: float = 2e-3
    skip_rate: float = 2e-3
    nested_rate: float = 3e-3
    budgets: tuple[float, float] | None = None
    noise: float = 0.3
    temperature: float = 2.0
    stream_weight: float | None = None
    anneal: float = 0.1
    heal_rate: float = 1e-3
    heal_rank: int = 8
    label_weight: float = 0.0
    harm_weight: float = 0.0
    diversity_weight: float = 0.0
    harm_labels: Labels = "auto"
    accumulate: int = 1
    save_every: int = 100
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "accumulate", "save_every", "heal_rank"):
            value = getattr(self, name)
            if not ((isinstance(value, int) and value >= 1) or (name == "steps" and value is None)):
                raise SurgeryError(f"Options.{name} must be a whole number of at least 1, got {value!r}")
        rates = ("router_rate", "skip_rate", "nested_rate", "heal_rate")
        for name in (*rates, "noise", "stream_weight", "anneal", "label_weight", "harm_weight", "diversity_weight"):
            value = getattr(self, name)
            if not (value is None and name == "stream_weight") and not (is_number(value) and value >= 0):
                raise SurgeryError(f"Options.{name} must be a number that is not negative, got {value!r}")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise SurgeryError(f"Options.temperature must be a positive number, got {self.temperature!r}")
        check_choice("Options.harm_labels", self.harm_labels, get_args(Labels))
        if self.budgets is not None:
            self.budgets = _range(self.budgets)
        if self.mixed_precision not in tuple(PRECISIONS):
            raise SurgeryError(
                f"Options.mixed_precision must be one of {', '.join(PRECISIONS)}, got {self.mixed_precision!r}"
            )


def _range(budgets: object) -> tuple[float, float]:
    """The smallest and the largest budget of a training."""
    if isinstance(budgets, (tuple, list)) and len(budgets) == 2 and all(map(is_number, budgets)):
        low, high = float(budgets[0]), float(budgets[1])
        if 0 < low <= high <= 1:
            return low, high
    raise SurgeryError(f"Options.budgets must be two fractions of dense, the smaller one first, got {budgets!r}")
