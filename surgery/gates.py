"""Gates: one decision, several ways to execute it.

A generated `forward` calls `gate(branch, left, residual, *inputs)` where the original computed `left +
branch(*inputs)`. `left` is None for the first of two parallel branches, whose sum with the residual comes later.

Axis letters: `N` samples, `T` tokens, `C` channels, `K` active rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from surgery import context
from surgery.branches import Branch, Owners, Turned, Unfolded, turn, turns, unfold
from surgery.budgets import first_pass
from surgery.context import Event, Forced, Overrides, Scope, Shared
from surgery.errors import ForceError, PromptError
from surgery.executing import Executor
from surgery.routers import FollowingRouter, Router, make_router
from surgery.sites import SitePlan
from surgery.skip_paths import SkipPath, make_skip_path
from surgery.state import GatedState

_LARGEST = torch.finfo(torch.float32).max
"""No threshold is above it, so that an infinite score is open at every one."""


class Gate(Executor):
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
        self.skip_path: SkipPath = make_skip_path(planned)
        self.cache_layer: int | None = None
        """Index of the attention's layer in key/value caches, where it says so."""
        self.offset = 0.0  # log of the cost saved by skipping, subtracted from the predicted log harm

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
        """Active rate on calibration data at the current budget (of heads their mean), or None before calibration."""
        if not self.state.table:
            return None
        rates = first_pass(self.state)[0].active_rate
        return statistics.fmean(rates[unit] for unit in self.site.units)

    def forward(self, branch: Branch, left: Tensor | None, residual: Tensor, *inputs: Any) -> Any:
        """What the original sum gives where the branch is active, `left + skip_path(residual)` where it is not."""
        if self.site.sequence_first:
            return self._run_turned(branch, left, residual, inputs)
        if not self.site.folded or residual.dim() != 2:
            return self._run(branch, left, residual, inputs)
        rows = len(residual)
        left, residual, *apart = unfold((left, residual, *inputs), self._samples_in(rows), rows)
        merged: Tensor = self._run(Unfolded(branch, branch.axes), left, residual, apart)
        return merged.flatten(0, 1)

    def _run_turned(self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """`forward` where tokens come before samples."""
        which = [True, True, *turns(branch.axes, inputs)]
        left, residual, *apart = turn((left, residual, *inputs), which)
        merged = self._run(Turned.of(branch, branch.axes), left, residual, apart)
        if branch.escapes:
            return merged[0].transpose(0, 1), *merged[1:]
        return merged.transpose(0, 1)

    def _run(self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """`forward` where samples have an axis of their own."""
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
        if self.always_on and not (over.forced is not None and over.forced.names(self.site.name)):
            if over.tape is not None:
                opened = self._constant(residual, *(True,) * len(self.site.units))
                over.tape.append(Event(self.site.name, self, opened, None, self._weights(residual)))
            return self.open(branch, left, inputs)
        if over.forced is not None and over.tape is None and mode != "mask" and not self.once:
            constant = self._forced_alike(residual, over.forced)
            if constant or (constant is False and self.leaves_out(branch)):
                return self.open(branch, left, inputs) if constant else self.closed(branch, left, residual)
            if constant is False and mode == "skip" and self.query and not context.runs_whole():
                return self._skip_queries(branch, left, residual, inputs, None)
        if self.once:
            decisions, scores = self._decide_once(residual, over, static=mode == "static" and over.forced is None)
            if self._is_compact():
                mode = "skip"  # keys and values of what is skipped are missing in the cache
        elif mode == "static" and over.forced is None:
            kept = self._kept(over)
            if over.tape is None and (all(kept) or (not any(kept) and self.leaves_out(branch))):
                return self.open(branch, left, inputs) if all(kept) else self.closed(branch, left, residual)
            decisions, scores = self._constant(residual, *kept), None
        else:
            decisions, scores = self.decide(residual, over)
        if over.tape is not None:
            over.tape.append(Event(self.site.name, self, decisions, scores, self._weights(residual)))
        if mode == "mask" or (not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(decisions)):
            return self.mask(branch, left, residual, inputs, decisions)  # inside `vmap` none can be looked at
        if mode == "cond":
            return self.cond(branch, left, residual, inputs, decisions)
        return self.skip(branch, left, residual, inputs, decisions)

    def _samples_in(self, rows: int) -> int:
        """Samples in so many rows of samples and tokens."""
        running = self._scope()
        return running.rows if running is not None and running.rows and rows % running.rows == 0 else rows

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
        decisions = scores > min(threshold, _LARGEST)
        if self.closes_padding(threshold):
            decisions = self.without_padding(residual, decisions)
        return decisions, scores

    def _kept(self, over: Overrides) -> list[bool]:
        """What the static policy decides."""
        if over.static is not None:
            return [unit in over.static for unit in self.site.units]
        return [self.state.static.get(unit, True) for unit in self.site.units]

    def closes_padding(self, threshold: float) -> bool:
        """Whether it is closed for padding. Not at minus infinity: there it is open for everything, and the model gives bit
        for bit what the dense one does.
        """
        return self.per_token and self.state.padding_is_unread and threshold > -math.inf

    def without_padding(self, residual: Tensor, decisions: Tensor) -> Tensor:
        """Decisions per token with padding closed."""
        real = self.padding(residual)
        return decisions if real is None else decisions & real

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
            decisions, scores = self._constant(residual, *self._kept(over)), None
        else:
            decisions, scores = self.decide(residual, over)
        if kept is not None:
            kept.decisions[name] = decisions
        return decisions, scores

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
            asked = self.router(residual, self.pooled_tokens(residual))
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
        hidden: Tensor = self.router(residual, self.pooled_tokens(residual), hidden=True)
        if seen is not None:
            seen.hidden = hidden
        return hidden

    def shared(self) -> dict[str, Shared]:
        """What the running call keeps for routers that read from others."""
        scope = context.scope()
        return {} if scope is None else scope.shared

    def pooled_tokens(self, residual: Tensor) -> Tensor | None:
        """Which tokens the router pools, bool `(N, T)`, or None where all are or it pools none."""
        if self.per_token:
            return None
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
        if scope is None or scope.mask is None or residual.dim() != 3:
            return None
        positions = residual.shape[::2] if self.site.layout == "NCT" else residual.shape[:2]
        return scope.mask if scope.mask.shape == positions else None

    def _weights(self, residual: Tensor) -> Tensor | None:
        """How much each decision counts, for the tape."""
        return self.padding(residual) if self.per_token else None

    def saving(self) -> float:
        """What skipping everything here saves per sample, in the unit of the cost model."""
        costs = [self.state.costs.sites[unit] for unit in self.site.units]
        return sum(cost.branch - cost.skip for cost in costs)

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


def iter_gates(gated: nn.Module) -> Iterator[tuple[str, Gate]]:
    """`(site name, gate)` in order of execution.

    Raises:
        NotConverted: If the model has no gates.
    """
    state = context.state_of(gated)
    found = {module.site.name: module for module in gated.modules() if isinstance(module, Gate)}
    return iter([(name, found[name]) for name in state.names])


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
