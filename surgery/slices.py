"""Active samples as slices of the batch: views instead of copies, where that is cheaper than gathering them.

Large feature maps cost more to copy (and new memory more to touch first) than small weights to read again.

Axis letters: `N` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from surgery.skip_paths import SkipPath

MOST = 32
"""With more slices than this, index operations over all rows are faster."""
CALL = 500_000
"""What one more call of a branch costs, in elements copied."""


@dataclass(frozen=True, slots=True)
class Slices:
    """Runs of neighbouring samples with the same decision."""

    active: tuple[slice, ...]
    passive: tuple[slice, ...]

    def merge(self, left: Tensor | None, residual: Tensor, values: Sequence[Tensor], skip_path: SkipPath) -> Tensor:
        """`left` plus the branch (`values`, one per active slice) or the skip path, in one new tensor."""
        merged = torch.empty_like(residual if left is None else left)
        for run, value in zip(self.active, values, strict=True):
            if left is None:
                merged[run] = value
            else:
                torch.add(left[run], value.to(left.dtype), out=merged[run])
        for run in self.passive:
            if left is None:
                merged[run] = skip_path(residual[run])
            elif skip_path.is_identity:
                merged[run] = left[run]
            else:
                torch.add(left[run], skip_path(residual[run]).to(left.dtype), out=merged[run])
        return merged


def slices_of(decisions: Tensor) -> Slices | None:
    """The runs in decisions `(N,)`, or None where there are too many."""
    values = decisions.tolist()
    bounds = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    if len(bounds) > MOST:
        return None
    runs = [slice(start, stop) for start, stop in pairwise(bounds)]
    return Slices(tuple(r for r in runs if values[r.start]), tuple(r for r in runs if not values[r.start]))


def may_slice(residual: Tensor, left: Tensor | None) -> bool:
    """Whether results may be written into slices: on the CPU (elsewhere calls cost more than copies), without
    gradients.
    """
    same = left is None or left.shape == residual.shape
    return residual.device.type == "cpu" and same and not torch.is_grad_enabled()


def cheaper_than_gathering(runs: Slices, residual: Tensor, parameters: int) -> bool:
    """Whether calling a branch once per active slice costs less than copying the active samples."""
    samples = sum(run.stop - run.start for run in runs.active)
    return (len(runs.active) - 1) * (parameters + CALL) < samples * residual[0].numel()
