"""Which harm labels routers learn from: first-order ones, or by leaving out where no gradient goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from surgery.calling import Batch
from surgery.context import state_of
from surgery.harm import HarmLabels, harm_and_unreached, label_harm
from surgery.leaving_out import label_by_leaving_out

Labels = Literal["auto", "first_order", "leave_one_out"]


def why_no_gradient(gated: nn.Module, batch: Batch) -> str:
    """Why nothing can be learned from gradients of the output on this batch, as a clause; empty where it can."""
    return _first_order(gated, batch, None)[1]


def _first_order(
    gated: nn.Module, batch: Batch, generator: torch.Generator | None
) -> tuple[dict[str, HarmLabels], str]:
    """First-order labels, and why these are none, as a clause."""
    try:
        labels, unreached = harm_and_unreached(gated, batch, generator)
    except torch.OutOfMemoryError:
        return {}, "a backward pass does not fit into memory"
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        return {}, f"torch cannot go backward through it ({first})"
    absent = label_by_leaving_out(gated, batch, unreached) if unreached else {}
    cut = [name for name, label in absent.items() if bool((label.harm > 0).any())]
    if not cut:  # what no gradient reaches does not reach the output either
        return labels, ""
    more = f" and {len(cut) - 1} more sites" if len(cut) > 1 else ""
    return labels, f"it cuts off the gradient of {cut[0]}{more} (no_grad, inference_mode or detach in a forward)"


@dataclass(slots=True)
class Labeller:
    """Labels batch after batch in one way.

    Args:
        gated: A gated model.
        method: `first_order` or `leave_one_out`; `auto` becomes one of them at the first batch, the second with a note.
        generator: For the signs of objectives that need some.
    """

    gated: nn.Module
    method: Labels = "auto"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def label(self, batch: Batch) -> dict[str, HarmLabels]:
        """Label one batch, which is on the model's device."""
        if self.method == "auto":
            labels, reason = _first_order(self.gated, batch, self.generator)
            self.method = "leave_one_out" if reason else "first_order"
            if not reason:
                return labels
            state_of(self.gated).note(f"harm was labelled by leaving out each site in turn, since {reason}")
        if self.method == "leave_one_out":
            return label_by_leaving_out(self.gated, batch)
        return label_harm(self.gated, batch, self.generator)
