"""Learning rates by width: Adam moves every weight by about its rate, so the wider a map, the more its output moves.

A rate that suits one width suits another one if it falls with the number of inputs (Yang et al. 2022, "Tensor Programs V",
table 3). Those of `Options` were chosen on 128 channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.gates import Gate

WIDTH = 128
"""Channels up to which rates are what `Options` says."""


def groups_of(gates: Iterable[Gate], part: str, rate: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser for one part of all gates, `router` or `skip_path`, one for every rate; parts without
    parameters are left out.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for gate in gates:
        parameters = list(getattr(gate, part).parameters())
        if parameters:
            groups.setdefault(rate * share(gate), []).extend(parameters)
    return [{"params": parameters, "lr": one} for one, parameters in groups.items()]


def share(gate: Gate) -> float:
    """What of a rate is used at a gate."""
    return min(1.0, WIDTH / gate.site.channels)
