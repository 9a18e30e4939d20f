"""How a decision is executed: the branch runs for everything, for active samples or tokens, or not at all.

Axis letters: `N` samples, `T` tokens, `C` channels, `K` active rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from surgery import context
from surgery.branches import Branch, Owners, added, choose, split_outputs, take_samples, take_tokens
from surgery.context import Scope
from surgery.errors import PromptError
from surgery.prompts import cache_in, may_be_compact
from surgery.queries import MOST_ACTIVE, ActiveQueries
from surgery.sites import Site, SitePlan
from surgery.skip_paths import SkipPath
from surgery.slices import cheaper_than_gathering, may_slice, slices_of

FEW_ROWS = 256
"""Up to so many tokens, an operation costs more than what it computes."""


class Executor(nn.Module):
    """Executes the decisions of one site; `surgery.gates.Gate` makes them."""

    planned: SitePlan
    site: Site
    skip_path: SkipPath
    query: Owners
    """Module and name of the parameters that make queries and project the output, for per-token attention."""
    decodes: bool
    """Whether it is in the decoder of an encoder-decoder."""
    cache_layer: int | None
    """Index of the attention's layer in key/value caches, where it says so."""

    @property
    def per_token(self) -> bool:
        """Whether this gate decides for every token."""
        return self.planned.granularity == "token"

    @property
    def once(self) -> bool:
        """Whether this gate decides once per sequence, from the prompt."""
        return self.planned.granularity == "prefill"

    def open(self, branch: Branch, left: Tensor | None, inputs: Sequence[Any]) -> Any:
        """The original computation."""
        value, escaped = split_outputs(branch, branch(*inputs))
        value = value.add_(left) if branch.inplace and left is not None else added(branch, left, value)
        return (value, *escaped) if branch.escapes else value

    def closed(self, branch: Branch, left: Tensor | None, residual: Tensor) -> Any:
        """The skip path alone; the branch is not called."""
        if left is None:
            value = self.skip_path(residual)
        elif self.skip_path.is_identity:
            value = left.clone()  # in-place operations may follow; the sum that is skipped made a new tensor as well
        elif left is residual:
            value = self.skip_path(residual, added=True)
        else:
            value = self.skip_path(residual)
            same = value.dtype == left.dtype and value.shape == left.shape and not torch.is_grad_enabled()
            value = value.add_(left) if same else left + value  # a skip path's value is nobody else's
        return (value, *(None,) * branch.escapes) if branch.escapes else value

    def mask(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """Everything runs, decisions select: the reference for every other execution."""
        value, escaped = split_outputs(branch, branch(*inputs))
        value = added(branch, left, torch.where(self.expand(decisions, value), value, self.skip_path(residual)))
        return (value, *escaped) if branch.escapes else value

    def cond(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """The branch is left out as a whole where nothing in the call needs it, and runs on everything otherwise.

        This is what a graph without data-dependent shapes can express: `torch.cond`, an ONNX `If`.
        """
        if branch.stateful or context.runs_whole():
            return self.mask(branch, left, residual, inputs, decisions)
        leaves, spec = tree_flatten((left, residual, tuple(inputs)))
        operands = tuple({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())  # each one once
        order = {id(tensor): i for i, tensor in enumerate(operands)}
        at = [order[id(leaf)] if isinstance(leaf, Tensor) else None for leaf in leaves]

        def rebuild(tensors: Sequence[Tensor]) -> Any:
            return tree_unflatten([leaf if i is None else tensors[i] for leaf, i in zip(leaves, at, strict=True)], spec)

        def active(*tensors: Tensor) -> Tensor:
            own_left, own_residual, own = rebuild(tensors)
            if decisions.numel() == 1:
                value = self.open(branch, own_left, own)
            else:
                value = self.mask(branch, own_left, own_residual, own, decisions)
            return split_outputs(branch, value)[0]

        def passive(*tensors: Tensor) -> Tensor:
            own_left, own_residual, _ = rebuild(tensors)
            return split_outputs(branch, self.closed(branch, own_left, own_residual))[0]

        value = choose(decisions.any(), active, passive, operands)
        return (value, *(None,) * branch.escapes) if branch.escapes else value

    def skip(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """Only active samples or tokens run."""
        if context.runs_whole():
            return self.mask(branch, left, residual, inputs, decisions)
        if self.once and branch.stateful:
            return self._skip_sequences(branch, left, residual, inputs, decisions)
        if branch.stateful and not self.query:
            return self.mask(branch, left, residual, inputs, decisions)
        if decisions.numel() == 1:
            active, count = decisions, int(decisions)
        else:
            active = decisions.flatten().nonzero().squeeze(1)  # K
            count = len(active)
        if count == decisions.numel():
            return self.open(branch, left, inputs)
        if count == 0 and not branch.stateful:
            return self.closed(branch, left, residual)
        if self.query and self.per_token:
            if count > MOST_ACTIVE * decisions.numel():
                return self.mask(branch, left, residual, inputs, decisions)
            if count and len(decisions) == 1 and branch.rows is not None:
                made = self._skip_rows(branch, left, residual, inputs, decisions, active)
                if made is not None:
                    return made
            return self._skip_queries(branch, left, residual, inputs, decisions if count else None)
        if branch.axes is None:
            return self.mask(branch, left, residual, inputs, decisions)
        if self.per_token:
            value = self._skip_tokens(branch, left, residual, inputs, decisions, active)
        else:
            value = self._skip_samples(branch, left, residual, inputs, decisions, active)
        return (value, *(None,) * branch.escapes) if branch.escapes else value

    def expand(self, decisions: Tensor, like: Tensor) -> Tensor:
        """Decisions with singleton axes appended, to broadcast against the residual stream."""
        return decisions.view(*decisions.shape, *(1,) * (like.dim() - decisions.dim()))

    def _skip_samples(
        self,
        branch: Branch,
        left: Tensor | None,
        residual: Tensor,
        inputs: Sequence[Any],
        decisions: Tensor,
        active: Tensor,
    ) -> Tensor:
        assert branch.axes is not None
        size = len(decisions)
        whole = list(zip(inputs, branch.axes, strict=True))
        runs = slices_of(decisions) if may_slice(residual, left) else None
        if runs is not None and cheaper_than_gathering(runs, residual, self.site.parameters):
            values = [branch(*(take_samples(v, axes, run, size) for v, axes in whole)) for run in runs.active]
            return runs.merge(left, residual, [split_outputs(branch, value)[0] for value in values], self.skip_path)
        value, _ = split_outputs(branch, branch(*(take_samples(v, axes, active, size) for v, axes in whole)))
        if runs is not None:
            return runs.merge(
                left, residual, value.split([run.stop - run.start for run in runs.active]), self.skip_path
            )
        return self._merge(left, residual, decisions, active, value)

    def _skip_tokens(
        self,
        branch: Branch,
        left: Tensor | None,
        residual: Tensor,
        inputs: Sequence[Any],
        decisions: Tensor,
        active: Tensor,
    ) -> Tensor:
        assert branch.axes is not None
        cut = [
            take_tokens(value, axes, active, decisions.dim()) for value, axes in zip(inputs, branch.axes, strict=True)
        ]
        value, _ = split_outputs(branch, branch(*cut))
        return self._merge_rows(left, residual, decisions, active, value)

    def _skip_sequences(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """Only active sequences run; the cache's layer holds theirs alone, or the keys and values of all."""
        scope, cache = self._scope(), cache_in(inputs)
        if cache is not None and not self._is_compact():
            new = scope is not None and scope.kept is not None and not scope.continues
            if not (new and branch.axes is not None and may_be_compact(cache, self.cache_layer)):
                count = int(decisions.sum())
                if count == len(decisions):
                    return self.open(branch, left, inputs)
                if not self.query or count > MOST_ACTIVE * len(decisions):
                    return self.mask(branch, left, residual, inputs, decisions)
                tokens = decisions[:, None].expand(residual.shape[:2]) if count else None
                return self._skip_queries(branch, left, residual, inputs, tokens)
            assert scope is not None and scope.kept is not None and self.cache_layer is not None
            scope.kept.compact[self.site.name] = self.cache_layer
        active = decisions.nonzero().squeeze(1)  # K
        if len(active) == 0:
            return self.closed(branch, left, residual)
        if len(active) == len(decisions):
            return self.open(branch, left, inputs)
        if branch.axes is None and cache is None:
            return self.mask(branch, left, residual, inputs, decisions)
        if branch.axes is None:
            raise PromptError(
                f"{self.site.name}: the prompt's cache holds active sequences alone, but this call passes other kinds of "
                "arguments, of which it is unknown how to leave sequences out; pass an attention mask from the first call on"
            )
        cut = [take_samples(v, axes, active, len(decisions)) for v, axes in zip(inputs, branch.axes, strict=True)]
        value, _ = split_outputs(branch, branch(*cut))
        merged = self._merge(left, residual, decisions, active, value)
        return (merged, *(None,) * branch.escapes) if branch.escapes else merged

    def _skip_rows(
        self,
        branch: Branch,
        left: Tensor | None,
        residual: Tensor,
        inputs: Sequence[Any],
        decisions: Tensor,
        active: Tensor,
    ) -> Any:
        """Active query tokens of one sample in generated code; None where there is none for this call."""
        assert branch.rows is not None
        if torch.compiler.is_compiling():
            return None
        host: nn.Module = branch.__self__  # type: ignore[attr-defined]
        made = branch.rows.run(host, inputs, active, decisions.shape[1])
        if made is None:
            return None
        value, escaped = split_outputs(branch, made)
        merged = self._merge_rows(left, residual, decisions, active, value)
        return (merged, *escaped) if branch.escapes else merged

    def _skip_queries(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor | None
    ) -> Any:
        """Keys and values for every token, the rest for active ones; `decisions` is None where no token is active."""
        assert self.site.query is not None
        query, output = self.query_parameters()
        if (
            decisions is None
            and branch.keys is not None
            and self._is_apart(query)
            and not torch.compiler.is_compiling()
        ):
            host: nn.Module = branch.__self__  # type: ignore[attr-defined]
            if branch.keys.write(host, inputs):
                return self.closed(branch, left, residual)
        shape, device = residual.shape[:-1], residual.device
        with ActiveQueries(self.site.query, query, output, shape, decisions, device) as mode:
            value, escaped = split_outputs(branch, branch(*inputs))
        escaped = tuple(map(mode.restore, escaped)) if escaped else ()
        if decisions is None:
            closed = self.closed(branch, left, residual)
            return (closed[0], *escaped) if branch.escapes else closed
        value = added(branch, left, torch.where(self.expand(decisions, value), value, self.skip_path(residual)))
        return (value, *escaped) if branch.escapes else value

    def query_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """The parameters that make queries and project the output, where they are known."""
        query, output = (None if found is None else getattr(*found) for found in self.query)
        return query, output

    def _is_apart(self, query: Tensor | None) -> bool:
        """Whether no projection makes queries together with keys or values, in rows that could be left out."""
        roles = self.site.query
        return query is None or (roles is not None and (roles.last - roles.first) * self.site.channels == query.numel())

    def _merge_rows(
        self, left: Tensor | None, residual: Tensor, decisions: Tensor, active: Tensor, value: Tensor
    ) -> Tensor:
        """`_merge` over the flattened samples x positions; `value` holds active rows."""
        rows = decisions.dim() - 1
        merged = self._merge(
            None if left is None else left.flatten(0, rows),
            residual.flatten(0, rows),
            decisions.flatten(),
            active,
            value.flatten(0, rows),
        )
        return merged.view(residual.shape)

    def _merge(self, left: Tensor | None, residual: Tensor, decisions: Tensor, active: Tensor, value: Tensor) -> Tensor:
        """`left` plus the branch at active rows and the skip path at the others."""
        base = torch.zeros_like(residual) if left is None else left
        if self.skip_path.is_identity:
            return base.index_add(0, active, value.to(base.dtype))
        if self.per_token and len(decisions) <= FEW_ROWS:
            # skip paths for all of them: leaving out active rows takes more calls than it saves
            merged = self.skip_path(residual).to(base.dtype)
            value = value.to(base.dtype)
            if left is not None:
                merged, value = left + merged, left.index_select(0, active) + value
            return merged.index_copy_(0, active, value)
        merged = base.index_add(0, active, value.to(base.dtype))
        passive = decisions.logical_not().nonzero().squeeze(1)
        return merged.index_add_(0, passive, self.skip_path(residual[passive]).to(base.dtype))

    def _scope(self) -> Scope | None:
        """The running call, as the half of the model sees it that this gate is in."""
        scope = context.scope()
        return scope.decoder if scope is not None and scope.decoder is not None and self.decodes else scope

    def _is_compact(self) -> bool:
        """Whether the running call's cache holds keys and values of active sequences alone here."""
        scope = self._scope()
        return scope is not None and scope.kept is not None and self.site.name in scope.kept.compact

    def shape_of(self, residual: Tensor) -> torch.Size:
        """Shape of this gate's decisions."""
        return residual.shape[:-1] if self.per_token else residual.shape[:1]

    def leaves_out(self, branch: Branch) -> bool:
        """Whether the branch is not called at all where everything is inactive."""
        return not branch.stateful and not context.runs_whole()

    def _constant(self, residual: Tensor, *values: bool) -> Tensor:
        """The same for all samples: one decision, or one per head."""
        if len(values) == 1:
            return torch.full(self.shape_of(residual), values[0], dtype=torch.bool, device=residual.device)
        return torch.tensor(values, device=residual.device).expand(self.shape_of(residual))
