"""Per-call state, kept in `ContextVar`s and never on modules, so that threads and nested calls do not see each other.

*Overrides* (execution, forced decisions, tape) belong to one gated model and are set by the context managers here. The
*scope* belongs to one call of a gated model: which samples it holds, where padding is, at which position tokens start.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from surgery.errors import ForceError, NotConverted, near, shortened
from surgery.prompts import Kept, check_length

if TYPE_CHECKING:
    from surgery.gates import Gate
    from surgery.state import GatedState

Execution = Literal["dense", "mask", "skip", "cond", "static"]
EXECUTIONS: tuple[str, ...] = get_args(Execution)
Handler = Callable[..., Any]
Recording = Callable[[Callable[[], Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""`recorder(run, args, kwargs)` runs one call of a gated model and returns its output."""


@dataclass(slots=True)
class Event:
    """What one gate did in one call."""

    site: str
    gate: Gate
    decisions: Tensor
    """bool, `(N,)`, `(N, *positions)`, or `(N, H)` of heads."""
    scores: Tensor | None
    """Router scores, like `decisions`; None where no router ran."""
    weights: Tensor | None
    """Share of attention per position (0 where padded), like `decisions`; None means 1 everywhere."""

    def rate(self) -> float:
        """Share of samples or non-padding tokens that were active."""
        return float(self.rates().mean())

    def rates(self) -> Tensor:
        """Active share per sample, `(N,)`."""
        active = self.decisions.float().flatten(1) if self.decisions.dim() > 1 else self.decisions.float()[:, None]
        if self.weights is None:
            return active.mean(1)
        weights = self.weights.float().flatten(1)
        return (active * weights).sum(1) / weights.sum(1).clamp_min(1e-9)

    def by_unit(self) -> dict[str, Tensor]:
        """Active share per sample `(N,)` of the site, or of each of its heads."""
        units = self.gate.site.units
        if len(units) == 1:
            return {self.site: self.rates()}
        return dict(zip(units, self.decisions.float().unbind(1), strict=True))


class Tape(list[Event]):
    """What gates did in some calls, in order of execution.

    `looked` holds for every call with a second look which of its inputs were run again in full, bool `(N,)`; the
    events are those of the first pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.looked: list[Tensor] = []


@dataclass(slots=True)
class Forced:
    """Decisions set by hand: a rate drawn from a counter-based generator, or a value per site."""

    rate: float | None
    values: Mapping[str, bool | Tensor]
    seed: int
    samples: Tensor | None
    count: int = 0

    def names(self, site: str) -> bool:
        """Whether it decides this site."""
        return self.rate is not None or site in self.values

    def constant(self, site: str) -> bool | None:
        """The decision at a site where it is the same for everything, else None."""
        value = self.values.get(site) if self.rate is None else self.rate == 1 if self.rate in (0, 1) else None
        return value if isinstance(value, bool) else None


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a `with` block changes about one gated model."""

    execution: str | None = None
    forced: Forced | None = None
    tape: list[Event] | None = None
    handler: Handler | None = None
    thresholds: Mapping[str, float] | float | None = None
    static: frozenset[str] | None = None
    """What the static policy keeps open, in the place of the model's own."""
    prompt: int | float | Tensor | None = None
    recorder: Recording | None = None
    healed: bool = True
    """Whether changes to the backbone (`surgery.healing`) are in force where the model does not run dense."""
    margin: float | None = None
    """Inputs below it are looked at again, whatever the model itself is set to."""


@dataclass(slots=True)
class Shared:
    """What a router that others read from saw."""

    residual: Tensor
    """The residual stream before its site, `(N, *positions, C)`."""
    hidden: Tensor | None = None
    """Its hidden features, `(N, hidden)` or `(N, *positions, hidden)`, once somebody asked for them."""


@dataclass(slots=True)
class Scope:
    """One call of a gated model."""

    mask: Tensor | None = None
    """bool `(N, T)`, True at real tokens, or None."""
    positions: Tensor | None = None
    """int64 `(N, T)` position of every token of this call, or None."""
    samples: Tensor | None = None
    """int64 `(N,)` sample ids for forced decisions."""
    start: int = 0
    rows: int = 0
    """N, or 0 where it is unknown."""
    whole: bool = False
    """Whether attention weights or logits of experts are returned, so that every branch runs in full."""
    first: Tensor | Literal[False] | None = None
    """bool `(N, T)`, True at the first tokens of a sequence that run in full; False where the call holds none of them;
    None where only a token's place in the call is known."""
    kept: Kept | None = None
    """What is decided once per sequence, where the plan has such sites."""
    continues: bool = False
    """Whether the call's cache holds tokens already, so that `kept` is not decided any more."""
    prompt: Tensor | Literal[True] | None = None
    """Tokens of the prompt, bool `(N, T)`; True where all real ones are; None where it is unknown."""
    decoder: Scope | None = None
    """The decoder's tokens in an encoder-decoder, whose own mask and positions are then those of the encoder."""
    shared: dict[str, Shared] = field(default_factory=dict)
    """What routers that others read from were asked last, by site."""


NONE = Overrides()
_overrides: ContextVar[Mapping[int, Overrides] | None] = ContextVar("surgery_overrides", default=None)
_scope: ContextVar[Scope | None] = ContextVar("surgery_scope", default=None)


def overrides_of(state: GatedState) -> Overrides:
    """The overrides in force for one gated model."""
    table = _overrides.get()
    return table.get(id(state), NONE) if table else NONE


def default_execution(state: GatedState, over: Overrides) -> str:
    """The execution of a call for which none was chosen: dense until a budget is set or decisions are forced."""
    if over.execution is not None:
        return over.execution
    if over.forced is not None:
        return "skip"
    if state.budget is None or state.budget >= 1:
        return "dense"
    return "static" if state.policy == "static" else "skip"


def runs_dense(state: GatedState) -> bool:
    """Whether no gate has anything to do in this call."""
    over = overrides_of(state)
    return over.handler is None and over.tape is None and default_execution(state, over) == "dense"


def scope() -> Scope | None:
    """The running call, or None outside of one."""
    return _scope.get()


def runs_whole() -> bool:
    """Whether branches must run for everything in this call, since it returns what is noted inside of them."""
    running = _scope.get()
    return running is not None and running.whole


@contextmanager
def override(state: GatedState, **changes: Any) -> Iterator[Overrides]:
    """Change the overrides of one gated model inside the block."""
    table = dict(_overrides.get() or {})
    table[id(state)] = new = replace(table.get(id(state), NONE), **changes)
    token = _overrides.set(table)
    try:
        yield new
    finally:
        _overrides.reset(token)


@contextmanager
def entered(new: Scope) -> Iterator[Scope]:
    """Make `new` the running call."""
    token = _scope.set(new)
    try:
        yield new
    finally:
        _scope.reset(token)


@contextmanager
def execution(gated: nn.Module, mode: Execution) -> Iterator[None]:
    """Run `gated` in one execution inside the block.

    Args:
        gated: A gated model.
        mode: `dense` runs every branch and no router; `mask` runs everything and selects; `skip` runs active samples or
            tokens only; `cond` decides as an exported graph does (`surgery.pin`): a branch as a whole, where no sample
            or token needs it, else everything; `static` runs the static policy of the current budget.

    Raises:
        ForceError: If `mode` is none of these.
        NotConverted: If the model has no gates.
    """
    if mode not in EXECUTIONS:
        raise ForceError(f"execution {mode!r} is unknown; choose one of {', '.join(EXECUTIONS)}")
    with override(state_of(gated), execution=mode):
        yield


@contextmanager
def force(
    gated: nn.Module,
    decisions: float | Mapping[str, bool | Tensor],
    seed: int = 0,
    samples: Sequence[int] | Tensor | None = None,
) -> Iterator[None]:
    """Set decisions by hand inside the block; routers do not run where they are set.

    A rate is drawn per (seed, site, sample id, position), so it is the same whatever the batch, the padding and the
    cache.

    Args:
        gated: A gated model.
        decisions: Active rate in [0, 1], or `{site: bool or bool tensor (N,) or (N, T)}`; sites not named are routed.
        seed: Seed of the draw.
        samples: Sample ids of each row; a running index since entering by default. Rows expanded by beam search share
            their source's id.

    Raises:
        ForceError: If a site is unknown, or a value is neither bool nor a bool tensor, or the rate is outside [0, 1].

    Example:
        >>> with force(gated, {"blocks.3.mlp": False}):  # doctest: +SKIP
        ...     gated(x)
    """
    state = state_of(gated)
    ids = None if samples is None else torch.as_tensor(samples, dtype=torch.int64)
    if isinstance(decisions, Mapping):
        unknown = sorted(set(decisions) - set(state.names))
        if unknown:
            hint = near(unknown[0], state.names, f"there are: {shortened(state.names)}")
            raise ForceError(f"no site named {', '.join(map(str, unknown))}{hint}")
        for name, value in decisions.items():
            if isinstance(value, Tensor) and value.dtype is not torch.bool:
                raise ForceError(f"{name}: forced decisions must be bool, got {value.dtype}; use `values > 0`")
            if not isinstance(value, (bool, Tensor)):
                raise ForceError(
                    f"{name}: forced decisions must be a bool or a bool tensor, got {type(value).__name__}"
                )
        forced = Forced(None, dict(decisions), seed, ids)
    else:
        rate = _rate(decisions)
        forced = Forced(rate, {}, seed, ids)
    with override(state, forced=forced):
        yield


def _rate(value: Any) -> float:
    try:
        rate = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate <= 1:
        raise ForceError(
            f"the forced active rate must be in [0, 1], got {value!r}; for single sites give {{name: decisions}}"
        )
    return rate


@contextmanager
def prompt_length(gated: nn.Module, length: int | float | Sequence[int] | Tensor) -> Iterator[None]:
    """Say how much of every text is its prompt, for sites of granularity `prefill`, which decide from it.

    `generate` knows it by itself, and a call with an empty key/value cache is the prompt; any other call needs this.

    Args:
        gated: A gated model.
        length: Number of real tokens (padding left out), for all sequences or one for each `(N,)`; or a share of every
            text, between 0 and 1.

    Raises:
        PromptError: If it is none of these.
        NotConverted: If the model has no gates.
    """
    with override(state_of(gated), prompt=check_length(length)):
        yield


@contextmanager
def tape(gated: nn.Module) -> Iterator[Tape]:
    """Collect what every gate does inside the block, in order of execution.

    Args:
        gated: A gated model.

    Yields:
        The list of what was done, which grows with every call inside the block.

    Raises:
        NotConverted: If the model has no gates.
    """
    events = Tape()
    with override(state_of(gated), tape=events):
        yield events


@contextmanager
def handled(gated: nn.Module, handler: Handler, *, healed: bool = False) -> Iterator[None]:
    """Let `handler(gate, branch, left, residual, inputs)` execute every gate inside the block.

    Args:
        gated: A gated model.
        handler: Called for every gate.
        healed: Whether a healed backbone stays healed; else it is the dense model's, whatever gates do.
    """
    state = state_of(gated)
    with override(state, handler=handler, healed=healed and overrides_of(state).healed):
        yield


def state_of(gated: nn.Module) -> GatedState:
    """The state that a conversion attached to the model.

    Raises:
        NotConverted: If there is none.
    """
    state = getattr(gated, "__dict__", {}).get("_surgery_state")
    if state is None:
        raise NotConverted(f"{type(gated).__name__} has no gates; {_where_gates_are(gated)}")
    return state


def _where_gates_are(model: Any) -> str:
    """What to give in the place of a model without gates: the part of a wrapper (peft, accelerate) that has some."""
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    inner = next((name for name, part in parts if "_surgery_state" in part.__dict__), None)
    if inner is not None:
        return f"the converted model inside of it has: give its `{inner}`"
    return "convert it first: gated = surgery.convert(model, budget=0.6)"


def draw(rate: float, seed: int, site: str, samples: Tensor, positions: Tensor | None) -> Tensor:
    """Bool decisions of a counter-based generator keyed by (seed, site, sample id, position).

    Args:
        rate: Probability of True.
        seed: Any integer.
        site: Site name.
        samples: int64 `(N,)`.
        positions: int64 `(N, T)`, or None for one decision per sample.

    Returns:
        bool `(N,)` or `(N, T)`.
    """
    if positions is None and 0 < len(samples) <= _FEW and samples.device.type == "cpu":
        # a few Python integers are faster than a dozen operations on tensors
        return torch.tensor([draw_one(rate, seed, site, sample, None) for sample in samples.tolist()])
    if positions is not None and 0 < positions.numel() <= _FEW and positions.device.type == "cpu":
        return torch.tensor(
            [
                [draw_one(rate, seed, site, sample, place) for place in places]
                for sample, places in zip(samples.tolist(), positions.tolist(), strict=True)
            ]
        )
    start = _key(seed, site)
    mixed = _mix(_mix(torch.tensor(start, dtype=torch.int64, device=samples.device)) + samples)
    if positions is not None:
        mixed = _mix(mixed[:, None] + positions * 0x85EBCA77)
    uniform = (mixed & 0xFFFFFF).double() / 0x1000000
    return uniform < rate


def draw_one(rate: float, seed: int, site: str, sample: int, position: int | None) -> bool:
    """One decision of the same generator."""
    mixed = _mix_int(_mixed_key(seed, site) + sample)
    if position is not None:
        mixed = _mix_int(mixed + position * 0x85EBCA77)
    return (mixed & 0xFFFFFF) / 0x1000000 < rate


def _key(seed: int, site: str) -> int:
    return (seed & 0x7FFFFFFF) * 0x9E3779B1 + zlib.crc32(site.encode())


@functools.lru_cache(maxsize=4096)
def _mixed_key(seed: int, site: str) -> int:
    return _mix_int(_key(seed, site))


def draw_unit(seed: int, number: int) -> float:
    """A number in [0, 1) of the same generator, keyed by (seed, number)."""
    return (_mix_int(_mix_int(seed & _WORD) + number) & 0xFFFFFF) / 0x1000000


def _mix(value: Tensor) -> Tensor:
    """A 64-bit finaliser (Steele et al. 2014, SplitMix), with arithmetic shifts masked to logical ones."""
    value = value + -7046029254386353131
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(value: int) -> int:
    """`_mix` of one number."""
    value = (value - 7046029254386353131) & _WORD
    value = ((value ^ (value >> 30)) * -4658895280553007687) & _WORD
    value = ((value ^ (value >> 27)) * -7723592293110705685) & _WORD
    return value ^ (value >> 31)


_FEW = 32
_WORD = 0xFFFFFFFFFFFFFFFF
