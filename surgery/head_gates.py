"""Gates of kind `heads`: one decision per sample and head of one attention, `(N, H)`.

An inactive head contributes nothing. Where no head is active, the branch contributes what does not depend on heads: the
bias of its output projection, and whatever the model applies to that before the sum.

Axis letters: as in `surgery.heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.branches import Branch, Owners, added, split_outputs
from surgery.gates import Gate
from surgery.heads import ActiveHeads, HeadRoles, NoProduct, WeighedHeads, check_ran, zeroed
from surgery.sites import SitePlan
from surgery.state import GatedState


class HeadGate(Gate):
    """Decides and executes the heads of one attention.

    Args:
        planned: What the plan says of this site.
        state: The gated model's state, shared by all its gates.
        owners: Modules and names of the parameters that `HeadRoles.names` names.
    """

    def __init__(self, planned: SitePlan, state: GatedState, *, owners: Owners) -> None:
        super().__init__(planned, state)
        self.owners = owners  # in a tuple, so that the modules do not become children

    @property
    def roles(self) -> HeadRoles:
        """Where the heads are."""
        assert self.site.heads is not None
        return self.site.heads

    def shape_of(self, residual: Tensor) -> torch.Size:
        """`(N, H)`."""
        return torch.Size((len(residual), self.roles.count))

    def leaves_out(self, branch: Branch) -> bool:
        """Without heads the branch still adds a bias."""
        return False

    def weighed(
        self, branch: Branch, inputs: Sequence[Any], samples: int, weigh: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The branch with everything running and `weigh` applied to what its output projection reads, `(N, R, H, D)`.

        Returns:
            Its value and its further outputs.
        """
        with WeighedHeads(self.roles, self.watched(), weigh, samples) as mode:
            result = split_outputs(branch, branch(*inputs))
        check_ran(mode, self.site.name)
        return result

    def without(self, branch: Branch, inputs: Sequence[Any], decisions: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The branch with everything running and inactive heads, by `decisions` `(N, H)`, read as zeros."""
        return self.weighed(branch, inputs, len(decisions), zeroed(decisions))

    def mask(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """Everything runs, active heads are read."""
        if bool(decisions.all()):
            return self.open(branch, left, inputs)
        return self._added(branch, left, self.without(branch, inputs, decisions))

    def cond(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """No head is worth a branch of a graph, so all run."""
        return self.mask(branch, left, residual, inputs, decisions)

    def skip(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """Only active heads run."""
        if bool(decisions.all()):
            return self.open(branch, left, inputs)
        parameters = self.watched()
        if torch.is_grad_enabled() and (residual.requires_grad or any(p.requires_grad for p in parameters)):
            return self.mask(branch, left, residual, inputs, decisions)  # placeholders have no gradient
        try:
            with ActiveHeads(self.roles, parameters, decisions, keep_keys=branch.stateful) as mode:
                result = split_outputs(branch, branch(*inputs))
        except NoProduct:
            if branch.stateful:
                raise
            return self.mask(branch, left, residual, inputs, decisions)  # attention weights were asked for
        check_ran(mode, self.site.name)
        return self._added(branch, left, result)

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output projection, `(C, H*D)`."""
        return self.watched()[3]

    def watched(self) -> list[Tensor]:
        """The parameters of queries, keys, values and output."""
        return [getattr(*found) for found in self.owners if found is not None]

    def _added(self, branch: Branch, left: Tensor | None, result: tuple[Tensor, tuple[Any, ...]]) -> Any:
        value, escaped = result
        value = added(branch, left, value)
        return (value, *escaped) if branch.escapes else value
