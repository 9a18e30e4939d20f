"""Which harm labels routers learn from: first-order ones from a backward pass, or by leaving out where there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from surgery.calling import Batch
from surgery.context import state_of
from surgery.harm import HarmLabels, harm_and_unreached
from surgery.leaving_out import label_by_leaving_out

Labels = Literal["auto", "first_order", "leave_one_out"]


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
    """Labels batch after batch in one way, which `auto` chooses at the first one."""

    gated: nn.Module
    method: Labels = "auto"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def label(self, batch: Batch) -> dict[str, HarmLabels]:
        """Label one batch, which is on the model's device."""
        if self.method == "auto":
            reason = why_no_gradient(self.gated, batch)
            self.method = "leave_one_out" if reason else "first_order"
            if reason:
                state_of(self.gated).note(f"harm was labelled by leaving out each site in turn, since {reason}")
        if self.method == "leave_one_out":
            return label_by_leaving_out(self.gated, batch)
        return harm_and_unreached(self.gated, batch, self.generator)[0]
