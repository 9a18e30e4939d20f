"""Which harm labels routers learn from.

By default two kinds together: what inputs differ by comes from first-order harm, of which one backward pass labels every
input or token of every site; how much a site matters as a whole comes from leaving it out, which first order misjudges (it
adds up effects that cancel, and sees no curvature). Where no gradient goes, leaving out is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from surgery.calling import Batch
from surgery.context import state_of
from surgery.harm import HarmLabels, harm_and_unreached
from surgery.leaving_out import label_by_leaving_out

Labels = Literal["auto", "first_order", "leave_one_out"]

_SHARE = 8
"""Of every batch one in so many samples is used to find levels,"""
_FEWEST, _MOST = 16, 256
"""the first ones all, and so many at most,"""
_CALLS = 4096
"""or fewer, so that samples times what is left out stay below it."""


def why_no_gradient(gated: nn.Module, batch: Batch) -> str:
    """Why nothing can be learned from gradients of the output on this batch, as a clause; empty where it can."""
    try:
        unreached = harm_and_unreached(gated, batch)[1]
    except torch.OutOfMemoryError:
        return "a backward pass does not fit into memory"
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        return f"torch cannot go backward through it ({first})"
    if not unreached:
        return ""
    labels = label_by_leaving_out(gated, batch, unreached)
    cut = [name for name, label in labels.items() if bool((label.harm > 0).any())]
    if not cut:  # they do not reach the output at all
        return ""
    more = f" and {len(cut) - 1} more sites" if len(cut) > 1 else ""
    return f"it cuts off the gradient of {cut[0]}{more} (no_grad, inference_mode or detach in a forward)"


@dataclass(slots=True)
class Labeller:
    """Labels batch after batch in one way, which is settled at the first one.

    Args:
        gated: A gated model.
        method: `first_order`, `leave_one_out`, or `auto` for both (see above).
        generator: For the signs of objectives that need some.
    """

    gated: nn.Module
    method: Labels = "auto"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _gathered: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def label(self, batch: Batch) -> dict[str, HarmLabels]:
        """Label one batch, which is on the model's device."""
        if self.method == "auto" and not self._sums:
            reason = why_no_gradient(self.gated, batch)
            if reason:
                self.method = "leave_one_out"
                state_of(self.gated).note(f"harm was labelled by leaving out each site in turn, since {reason}")
        if self.method == "leave_one_out":
            return label_by_leaving_out(self.gated, batch)
        labels = harm_and_unreached(self.gated, batch, self.generator)[0]
        if self.method == "auto":
            self._gather(batch, labels)
        return labels

    def _gather(self, batch: Batch, labels: Mapping[str, HarmLabels]) -> None:
        most = min(max(_CALLS // max(len(state_of(self.gated).units), 1), _FEWEST), _MOST)
        share = max(math.ceil(batch.size / _SHARE), _FEWEST - self._gathered)
        count = min(batch.size, share, most - self._gathered)
        if count <= 0:
            return
        part = batch if count == batch.size else batch.rows(torch.arange(count))
        left_out = label_by_leaving_out(self.gated, part)
        self._gathered += count
        heads = {planned.site.name: len(planned.site.units) > 1 for planned in state_of(self.gated).plan.sites}
        for name, absent in left_out.items():
            first = labels[name].harm.float()[:count]
            weights = torch.ones_like(first) if absent.weights is None else absent.weights.float()
            weights = weights * (first.isfinite() & absent.harm.isfinite())
            parts = [torch.where(weights > 0, part, 0.0) for part in (absent.harm.float(), first, weights)]
            sums = torch.stack([part.sum(0) if heads[name] else part.sum().reshape(1) for part in parts])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def levels(self) -> dict[str, Tensor]:
        """What first-order harm of each site is to be multiplied by, `(1,)`, or `(H,)` of heads; empty unless asked for both.

        After that a site's mean is the square root of the mean divergence that leaving it out brings, which grows like
        first-order harm with the size of what is left out.
        """
        found = {}
        for name, (absent, first, count) in self._sums.items():
            known = (absent > 0) & (first > 0) & (count > 0)
            level, mean = (absent / count.clamp_min(1)).sqrt(), first / count.clamp_min(1)
            found[name] = torch.where(known, level / mean.clamp_min(1e-30), 1.0)
        return found
