"""Gates: one decision, several ways to execute it.

A generated `forward` calls `gate(branch, left, residual, *inputs)` where the original computed `left +
branch(*inputs)`. `left` is None for the first of two parallel branches, whose sum with the residual comes later.

Axis letters: `N` samples, `T` tokens, `C` channels, `K` active rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from surgery import context
from surgery.context import Event, Forced, Overrides, Scope, Shared
from surgery.errors import ForceError, PromptError
from surgery.key_values import KeyWriter
from surgery.prompts import cache_in, may_be_compact
from surgery.queries import MOST_ACTIVE, ActiveQueries
from surgery.routers import FollowingRouter, Router, make_router
from surgery.sites import RegionInput, SitePlan
from surgery.skip_paths import SkipPath, make_skip_path
from surgery.slices import cheaper_than_gathering, may_slice, slices_of
from surgery.state import GatedState

_LARGEST = torch.finfo(torch.float32).max
"""No threshold is above it, so that an infinite score is open at every one."""
Owners = tuple[tuple[nn.Module, str] | None, ...]
"""Module and name of the parameters that make queries and project the output; None where one is unknown; () without
roles.
"""


class Branch(Protocol):
    """A generated function that runs one branch. Attributes are set by `surgery.rewriting`."""

    axes: tuple[RegionInput, ...] | None
    """How to cut each input, or None where this call pattern was never probed."""
    escapes: int
    """Number of further outputs; the branch then returns a tuple."""
    stateful: bool
    """Whether it writes a key/value cache in this call pattern, so that it must run whatever is decided."""
    inplace: bool
    """Whether the original sum was written into the branch's output (`x += shortcut`)."""

    keys: KeyWriter | None
    """Writes its keys and values alone, where that is known; then it has no further outputs."""

    def __call__(self, *inputs: Any) -> Any:
        """Run it."""
        ...


@dataclass(slots=True)
class Unfolded:
    """A branch on rows `(N * T, C)`, called with `(N, T, C)`."""

    branch: Branch
    axes: tuple[RegionInput, ...] | None
    escapes: int = 0
    stateful: bool = False
    inplace: bool = False
    keys: KeyWriter | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        """Fold, run, unfold."""
        lead = next(value.shape[:2] for value in inputs if isinstance(value, Tensor) and value.dim() == 3)
        folded = [v.flatten(0, 1) if isinstance(v, Tensor) and v.dim() == 3 else v for v in inputs]
        output: Tensor = self.branch(*folded)
        return output.unflatten(0, lead)


def unfold(value: Any, samples: int, rows: int) -> Any:
    """`(N * T, C)` -> `(N, T, C)`; anything else stays."""
    if isinstance(value, Tensor) and value.dim() == 2 and len(value) == rows:
        return value.unflatten(0, (samples, rows // samples))
    return value


class Gate(nn.Module):
    """Decides one site and executes the decision.

    Args:
        planned: What the plan says of this site.
        state: The gated model's state, shared by all its gates.
        query: Module and name of the parameters that make queries and project the output, for per-token attention.
    """

    def __init__(
        self,
        planned: SitePlan,
        state: GatedState,
        *,
        query: Owners = (),
    ) -> None:
        super().__init__()
        site = planned.site
        self.planned = planned
        self.site = site
        self.state = state
        self.decodes = "decoder" in site.name.split(".")
        self.query = query  # in a tuple, so that the modules do not become children
        self.leader: tuple[Gate, ...] = ()
        """The gate whose router's hidden features this one's router reads, if any; in a tuple likewise."""
        self.leads = any(other.leader == site.name for other in state.plan.sites)
        self.router: Router | FollowingRouter = make_router(planned)
        self.skip_path: SkipPath = make_skip_path(planned.skip, site.channels, site.layout, planned.rank)
        self.cache_layer: int | None = None
        """Index of the attention's layer in key/value caches, where it says so."""
        self.offset = 0.0  # log of the cost saved by skipping, subtracted from the predicted log harm

    @property
    def per_token(self) -> bool:
        """Whether this gate decides for every token."""
        return self.planned.granularity == "token"

    @property
    def once(self) -> bool:
        """Whether this gate decides once per sequence, from the prompt."""
        return self.planned.granularity == "prefill"

    @property
    def always_on(self) -> bool:
        """Whether this gate is open unless it is forced; its router is then not asked."""
        return self.planned.always_on

    @property
    def threshold(self) -> float:
        """Scores above it keep the branch."""
        return self.state.threshold

    @property
    def active_rate(self) -> float | None:
        """Active rate on calibration data at the current budget, or None before calibration."""
        for point in self.state.table:
            if point.threshold == self.state.threshold:
                return point.active_rate[self.site.name]
        return None

    def forward(self, branch: Branch, left: Tensor | None, residual: Tensor, *inputs: Any) -> Any:
        """What the original sum gives where the branch is active, `left + skip_path(residual)` where it is not."""
        over = context.overrides_of(self.state)
        if self.leads:
            self.shared()[self.site.name] = Shared(residual)
        elif self.leader and self.leader[0].site.name not in self.shared():
            return self.open(branch, left, inputs)  # its leader was called in a way in which it cannot be skipped
        if over.handler is not None:
            return over.handler(self, branch, left, residual, inputs)
        mode = context.default_execution(self.state, over)
        if mode == "dense":
            return self.open(branch, left, inputs)
        if self.site.folded and residual.dim() == 2:
            running, rows = context.scope(), len(residual)
            samples = running.rows if running is not None and running.rows and rows % running.rows == 0 else rows
            values = [unfold(value, samples, rows) for value in (left, residual, *inputs)]
            merged: Tensor = self(Unfolded(branch, branch.axes), *values)
            return merged.flatten(0, 1)
        if self.always_on and not (over.forced is not None and over.forced.names(self.site.name)):
            if over.tape is not None:
                opened = self._constant(residual, *(True,) * len(self.site.units))
                over.tape.append(Event(self.site.name, self, opened, None, self._weights(residual)))
            return self.open(branch, left, inputs)
        if over.forced is not None and over.tape is None and mode != "mask" and not self.once:
            constant = self._forced_alike(residual, over.forced)
            if constant or (constant is False and self.leaves_out(branch)):
                return self.open(branch, left, inputs) if constant else self.closed(branch, left, residual)
            if constant is False and mode == "skip" and self.query:
                return self._skip_queries(branch, left, residual, inputs, None)
        if self.once:
            decisions, scores = self._decide_once(residual, over, static=mode == "static" and over.forced is None)
            if self._is_compact():
                mode = "skip"  # keys and values of what is skipped are missing in the cache
        elif mode == "static" and over.forced is None:
            kept = [self.state.static.get(unit, True) for unit in self.site.units]
            if over.tape is None and (all(kept) or (not any(kept) and self.leaves_out(branch))):
                return self.open(branch, left, inputs) if all(kept) else self.closed(branch, left, residual)
            decisions, scores = self._constant(residual, *kept), None
        else:
            decisions, scores = self.decide(residual, over)
        if over.tape is not None:
            over.tape.append(Event(self.site.name, self, decisions, scores, self._weights(residual)))
        if mode == "mask":
            return self.mask(branch, left, residual, inputs, decisions)
        if mode == "cond":
            return self.cond(branch, left, residual, inputs, decisions)
        return self.skip(branch, left, residual, inputs, decisions)

    # -- deciding -------------------------------------------------------------------------------------------------

    def decide(self, residual: Tensor, over: Overrides = context.NONE) -> tuple[Tensor, Tensor | None]:
        """Decisions, and the scores behind them (None where they were forced)."""
        if over.forced is not None:
            decisions = self._forced(residual, over.forced)
            if decisions is not None:
                return decisions, None
        scores = self.scores(residual)
        threshold: Any = self.threshold if over.thresholds is None else over.thresholds
        if isinstance(threshold, dict):
            threshold = threshold[self.site.name]
        return scores > min(threshold, _LARGEST), scores

    def _decide_once(self, residual: Tensor, over: Overrides, *, static: bool) -> tuple[Tensor, Tensor | None]:
        """What was decided for the sequences of the running call's cache; decided now where it is empty.

        Raises:
            PromptError: If the cache was filled without these decisions, or holds other sequences.
        """
        scope, name = self._scope(), self.site.name
        kept = None if scope is None else scope.kept
        if scope is not None and kept is not None and scope.continues:
            found = kept.decisions.get(name)
            if found is None or len(found) != len(residual):
                held = "no decisions" if found is None else f"those of {len(found)} sequences"
                raise PromptError(
                    f"{name}: granularity 'prefill' goes on with what was decided from the prompt, but the cache holds {held} "
                    f"for the {len(residual)} of this call; fill it by calling this model with the whole prompt"
                )
            return found, None
        if static:
            values = [self.state.static.get(unit, True) for unit in self.site.units]
            decisions, scores = self._constant(residual, *values), None
        else:
            decisions, scores = self.decide(residual, over)
        if kept is not None:
            kept.decisions[name] = decisions
        return decisions, scores

    def _is_compact(self) -> bool:
        """Whether the running call's cache holds keys and values of active sequences alone here."""
        scope = self._scope()
        return scope is not None and scope.kept is not None and self.site.name in scope.kept.compact

    def prompt(self, residual: Tensor) -> Tensor | None:
        """Tokens of the prompt, bool `(N, T)`, or None where all are.

        Raises:
            PromptError: If nobody said what the prompt is.
        """
        scope = self._scope()
        known = None if scope is None else scope.prompt
        if known is None:
            raise PromptError(
                f"{self.site.name} is decided from the prompt (granularity 'prefill'), and this call does not say what that is: "
                "use generate(), pass an empty key/value cache with the prompt, or call inside "
                "surgery.prompt_length(gated, tokens)"
            )
        return self.padding(residual) if known is True else known

    def scores(self, residual: Tensor) -> Tensor:
        """Predicted log harm per log saving: `(N,)` or `(N, *positions)`, fp32; infinite at first tokens that run in full."""
        if self.leader:
            asked = self.router(self.leader[0].hidden_features())
        elif self.leads:
            asked = self.router.read(self.hidden_features(residual))
        else:
            asked = self.router(residual, self._read(residual))
        scores: Tensor = asked - self.offset
        first = self.first_tokens(residual)
        return scores if first is None else scores.masked_fill(first, float("inf"))

    def hidden_features(self, residual: Tensor | None = None) -> Tensor:
        """What the router that leads makes of `residual`, or made of the stream in the running call: `(N, hidden)` or
        `(N, *positions, hidden)`.
        """
        seen = self.shared().get(self.site.name)
        if residual is None:
            assert seen is not None
            if seen.hidden is not None:
                return seen.hidden
            residual = seen.residual
        hidden: Tensor = self.router(residual, self._read(residual), hidden=True)
        if seen is not None:
            seen.hidden = hidden
        return hidden

    def shared(self) -> dict[str, Shared]:
        """What the running call keeps for routers that read from others."""
        scope = context.scope()
        return {} if scope is None else scope.shared

    def _read(self, residual: Tensor) -> Tensor | None:
        """Which tokens the router pools, bool `(N, T)`, or None where all are."""
        return self.prompt(residual) if self.once else self.padding(residual)

    def first_tokens(self, residual: Tensor) -> Tensor | None:
        """Which tokens this gate is open for whatever it is asked, bool `(N, T)`, or None where there are none."""
        count = self.state.plan.first_tokens
        if count == 0 or not self.per_token or residual.dim() != 3:
            return None
        scope = self._scope()
        first = None if scope is None else scope.first
        if first is False:
            return None
        if first is None or first.shape != residual.shape[:2]:
            return (torch.arange(residual.shape[1], device=residual.device) < count).expand(residual.shape[:2])
        return first

    def padding(self, residual: Tensor) -> Tensor | None:
        """The call's attention mask, bool `(N, T)`, if it fits the residual stream here."""
        scope = self._scope()
        if scope is None or scope.mask is None or residual.dim() != 3 or scope.mask.shape != residual.shape[:2]:
            return None
        return scope.mask

    def _weights(self, residual: Tensor) -> Tensor | None:
        """How much each decision counts, for the tape."""
        return self.padding(residual) if self.per_token else None

    def _scope(self) -> Scope | None:
        """The running call, as the half of the model sees it that this gate is in."""
        scope = context.scope()
        return scope.decoder if scope is not None and scope.decoder is not None and self.decodes else scope

    def shape_of(self, residual: Tensor) -> torch.Size:
        """Shape of this gate's decisions."""
        return residual.shape[:-1] if self.per_token else residual.shape[:1]

    def leaves_out(self, branch: Branch) -> bool:
        """Whether the branch is not called at all where everything is inactive."""
        return not branch.stateful

    def saving(self) -> float:
        """What skipping everything here saves per sample, in the unit of the cost model."""
        costs = [self.state.costs.sites[unit] for unit in self.site.units]
        return sum(cost.branch - cost.skip for cost in costs)

    def _constant(self, residual: Tensor, *values: bool) -> Tensor:
        """The same for all samples: one decision, or one per head."""
        if len(values) == 1:
            return torch.full(self.shape_of(residual), values[0], dtype=torch.bool, device=residual.device)
        return torch.tensor(values, device=residual.device).expand(self.shape_of(residual))

    def _forced_alike(self, residual: Tensor, forced: Forced) -> bool | None:
        """The forced decision where there is only one, or all are the same; else None."""
        name = self.site.name
        constant = forced.constant(name)
        if constant is not None or forced.rate is None or self.site.heads is not None:
            return constant
        if self.shape_of(residual).numel() != 1:
            return None
        position = _position(self._scope()) if self.per_token else None
        return context.draw_one(forced.rate, forced.seed, name, _sample_id(forced), position)

    def _forced(self, residual: Tensor, forced: Forced) -> Tensor | None:
        name, shape = self.site.name, self.shape_of(residual)
        if forced.rate is not None:
            constant = forced.constant(name)
            if constant is not None:
                return self._constant(residual, constant)
            samples = _sample_ids(forced, shape[0]).to(residual.device)
            positions = _positions(self._scope(), shape, residual.device) if self.per_token else None
            if len(shape) == 2 and not self.per_token:
                positions = torch.arange(shape[1], device=residual.device).expand(shape)  # heads count as positions
            flat = context.draw(forced.rate, forced.seed, name, samples, positions)
            return flat.view(shape)
        if name not in forced.values:
            return None
        value = forced.values[name]
        if isinstance(value, bool):
            return self._constant(residual, value)
        value = value.to(residual.device)
        if value.shape == shape:
            return value
        if len(shape) > 1 and value.shape == shape[:1]:
            return value.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
        raise ForceError(
            f"{name}: forced decisions have shape {tuple(value.shape)}, expected {tuple(shape)}"
            + (f" or {tuple(shape[:1])}" if len(shape) > 1 else "")
        )

    # -- executing ------------------------------------------------------------------------------------------------

    def open(self, branch: Branch, left: Tensor | None, inputs: Sequence[Any]) -> Any:
        """The original computation."""
        value, escaped = split_outputs(branch, branch(*inputs))
        if left is not None:
            value = value.add_(left) if branch.inplace else left + value
        return (value, *escaped) if branch.escapes else value

    def closed(self, branch: Branch, left: Tensor | None, residual: Tensor) -> Any:
        """The skip path alone; the branch is not called."""
        if left is None:
            value = self.skip_path(residual)
        elif self.skip_path.is_identity:
            value = left.clone()  # in-place operations may follow; the sum that is skipped made a new tensor as well
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
        value = torch.where(self.expand(decisions, value), value, self.skip_path(residual))
        value = value if left is None else left + value
        return (value, *escaped) if branch.escapes else value

    def cond(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """The branch is left out as a whole where nothing in the call needs it, and runs on everything otherwise.

        This is what a graph without data-dependent shapes can express: `torch.cond`, an ONNX `If`.
        """
        if branch.stateful:
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
            if own_left is own_residual:
                return self.skip_path.added(own_residual)
            return split_outputs(branch, self.closed(branch, own_left, own_residual))[0]

        value = choose(decisions.any(), active, passive, operands)
        return (value, *(None,) * branch.escapes) if branch.escapes else value

    def skip(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor
    ) -> Any:
        """Only active samples or tokens run."""
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
        rows = decisions.dim() - 1
        merged = self._merge(
            None if left is None else left.flatten(0, rows),
            residual.flatten(0, rows),
            decisions.flatten(),
            active,
            value.flatten(0, rows),
        )
        return merged.view(residual.shape)

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

    def _skip_queries(
        self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any], decisions: Tensor | None
    ) -> Any:
        """Keys and values for every token, the rest for active ones; `decisions` is None where no token is active."""
        if context.whole_rows():
            decisions = self._constant(residual, False) if decisions is None else decisions
            return self.mask(branch, left, residual, inputs, decisions)
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
        value = torch.where(self.expand(decisions, value), value, self.skip_path(residual))
        value = value if left is None else left + value
        return (value, *escaped) if branch.escapes else value

    def query_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """The parameters that make queries and project the output, where they are known."""
        query, output = (None if found is None else getattr(*found) for found in self.query)
        return query, output

    def _is_apart(self, query: Tensor | None) -> bool:
        """Whether no projection makes queries together with keys or values, in rows that could be left out."""
        roles = self.site.query
        return query is None or (roles is not None and (roles.last - roles.first) * self.site.channels == query.numel())

    def _merge(self, left: Tensor | None, residual: Tensor, decisions: Tensor, active: Tensor, value: Tensor) -> Tensor:
        """`left` plus the branch at active rows and the skip path at the others."""
        base = torch.zeros_like(residual) if left is None else left
        merged = base.index_add(0, active, value.to(base.dtype))
        if self.skip_path.is_identity:
            return merged
        passive = decisions.logical_not().nonzero().squeeze(1)
        return merged.index_add_(0, passive, self.skip_path(residual[passive]).to(base.dtype))


def choose(
    condition: Tensor, then: Callable[..., Tensor], otherwise: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> Tensor:
    """`then(*operands)` where the 0-d `condition` holds, else `otherwise(*operands)`.

    A program that is being captured gets both (`torch.cond`); a running one looks at the value.
    """
    if torch.compiler.is_compiling():
        return torch.cond(condition, then, otherwise, operands)
    return (then if bool(condition) else otherwise)(*operands)


def take_samples(value: Any, axes: RegionInput, index: Tensor | slice, size: int) -> Any:
    """The samples that `index` names, along the input's batch axis; what is shared (or has length 1 there) stays."""
    if isinstance(value, (tuple, list)):
        return type(value)(take_samples(item, axes, index, size) for item in value)
    if axes.batch_axis is None or not isinstance(value, Tensor) or value.shape[axes.batch_axis] != size:
        return value
    if isinstance(index, slice):
        return value.narrow(axes.batch_axis, index.start, index.stop - index.start)
    return value.index_select(axes.batch_axis, index)


def take_tokens(value: Any, axes: RegionInput, index: Tensor, lead: int) -> Any:
    """Rows of the flattened samples x positions, as one sample of K positions."""
    if axes.token_axis is None or not isinstance(value, Tensor):
        return value
    rows = value.flatten(0, lead - 1).index_select(0, index)  # K C
    return rows.view(*(1,) * (lead - 1), index.shape[0], *value.shape[lead:])  # `len` would fix K in a captured graph


def iter_gates(gated: nn.Module) -> Iterator[tuple[str, Gate]]:
    """`(site name, gate)` in order of execution.

    Raises:
        NotConverted: If the model has no gates.
    """
    state = context.state_of(gated)
    found = {module.site.name: module for module in gated.modules() if isinstance(module, Gate)}
    return iter([(name, found[name]) for name in state.names])


def split_outputs(branch: Branch, output: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """A branch's value, and its further outputs."""
    if branch.escapes:
        return output[0], tuple(output[1:])
    return output, ()


def _sample_id(forced: Forced) -> int:
    """The only sample of the running call."""
    scope = context.scope()
    ids = scope.samples if scope is not None and scope.samples is not None else forced.samples
    if ids is None:
        return 0 if scope is None else scope.start
    return int(_sample_ids(forced, 1)[0])


def _position(scope: Scope | None) -> int:
    """Position of the only token of the running call."""
    positions = None if scope is None else scope.positions
    return int(positions) if positions is not None and positions.numel() == 1 else 0


def _sample_ids(forced: Forced, rows: int) -> Tensor:
    scope = context.scope()
    start = 0 if scope is None else scope.start
    ids = scope.samples if scope is not None and scope.samples is not None else forced.samples
    if ids is None:
        return torch.arange(start, start + rows)
    if len(ids) == rows:
        return ids
    if rows % len(ids) == 0:
        return ids.repeat_interleave(rows // len(ids))
    raise ForceError(f"`samples` names {len(ids)} samples, the batch has {rows} rows")


def _positions(scope: Scope | None, shape: torch.Size, device: torch.device) -> Tensor:
    if scope is not None and scope.positions is not None and scope.positions.shape == shape:
        return scope.positions.to(device)
    count = int(torch.Size(shape[1:]).numel())
    return torch.arange(count, device=device).expand(shape[0], count)
