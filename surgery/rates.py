"""Learning rates by width: Adam moves every weight by about its rate, so the wider a map, the more its output moves.

A rate that suits one width suits another one if it falls with the number of inputs (Yang et al. 2022, "Tensor Programs V",
table 3). Those of `Options` were chosen on 128 channels, for skip paths that start from a closed form; a narrow one starts from
the branch's own weights, which a large rate spoils.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

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


def _factor(module: nn.Module) -> float:
    """What of a rate is used for a module, by what it starts from."""
    if not isinstance(module, NarrowSkip):
        return 1.0
    return NARROW_GATED if module.chain.gated else NARROW


def share(gate: Gate) -> float:
    """What of a rate is used at a gate."""
    return min(1.0, WIDTH / gate.site.channels)
