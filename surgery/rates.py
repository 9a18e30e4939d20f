"""Learning rates by width and over time, and clipped gradients.

By width: Adam moves every weight by about its rate, so the wider a map, the more its output moves.

A rate that suits one width suits another one if it falls with the number of inputs (Yang et al. 2022, "Tensor Programs V",
table 3). Those of `Options` were chosen on 128 channels, for skip paths that start from a closed form; a narrow one starts from
the branch's own weights, which a large rate spoils.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from surgery.gates import Gate
from surgery.skip_paths import NarrowSkip

WIDTH = 128
"""Channels up to which rates are what `Options` says."""
NARROW, NARROW_GATED = 0.1, 0.5
"""What of a rate is used for narrow skip paths, and for those of gated MLPs (docs/lab/skip_paths.md)."""


def parameter_groups(gates: Iterable[Gate], part: str, rate: float, *, by_width: bool = True) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser for one part of all gates, `router` or `skip_path`, one for every rate; parts without
    parameters are left out.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for gate in gates:
        module = getattr(gate, part)
        parameters = list(module.parameters())
        if parameters:
            factor = _factor(module) * (share(gate) if by_width else 1.0)
            groups.setdefault(rate * factor, []).extend(parameters)
    return [{"params": parameters, "lr": one} for one, parameters in groups.items()]


def one_cycle(
    groups: Iterable[Tensor] | Iterable[dict[str, Any]],
    steps: int,
    *,
    rate: float = 1e-3,
    weight_decay: float = 0.0,
) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    """An optimiser whose rate goes up and down once (Smith and Topin 2019, "Super-Convergence").

    Args:
        groups: Parameters, or groups of them with an `lr` of their own, as of `parameter_groups`.
        steps: Optimiser steps.
        rate: The largest rate, where groups have none of their own.
        weight_decay: Of AdamW.

    Returns:
        The optimiser, and the schedule, to be stepped after it.
    """
    optimiser = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
    peaks = [group["lr"] for group in optimiser.param_groups]
    # one step more than is taken, since the last one's rate is next to nothing; up for two steps at least
    return optimiser, OneCycleLR(optimiser, peaks, total_steps=steps + 1, pct_start=max(0.1, 2 / (steps + 1)))


def clip(parameters: Sequence[Tensor], largest: float) -> None:
    """Scale gradients down to a norm of at most `largest`. Where it is no number (an input whose output is NaN), all are dropped,
    so that this step changes nothing.
    """
    if not torch.nn.utils.clip_grad_norm_(parameters, largest).isfinite():
        for parameter in parameters:
            parameter.grad = None


def _factor(module: nn.Module) -> float:
    """What of a rate is used for a module, by what it starts from."""
    if not isinstance(module, NarrowSkip):
        return 1.0
    return NARROW_GATED if module.chain.gated else NARROW


def share(gate: Gate) -> float:
    """What of a rate is used at a gate."""
    return min(1.0, WIDTH / gate.site.channels)
