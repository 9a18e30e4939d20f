"""A gated model with everything fixed that is looked up at run time, so that `torch.compile` and `torch.export` can read it.

A gated model asks `ContextVar`s how it is to run and finds the program of every call pattern; a graph can hold neither.
`pin` makes a copy, of the same class and over the same weights, whose hosts run one generated program each and whose
gates know their execution and threshold.

Axis letters: `N` samples, `T` tokens, `S` sites.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery import context
from surgery.branches import Branch
from surgery.budgets import current_point
from surgery.calling import Batch, as_batch, call
from surgery.calling import tensors as output_tensors
from surgery.context import Scope, Shared, state_of
from surgery.copying import share
from surgery.errors import PinError, check_choice
from surgery.gates import Gate, iter_gates
from surgery.healing import make_permanent
from surgery.nested_calls import nested_stream, run_padded
from surgery.patterns import Pattern, signature_of
from surgery.programs import Programs
from surgery.rewriting import subclass
from surgery.roots import first_tokens_of, padding_of, samples_in
from surgery.tracing import GATES, base_class

logger = logging.getLogger(__name__)
Execution = Literal["cond", "mask", "static"]
Tokens = Literal["mask", "gather"]
EXECUTIONS = ("cond", "mask", "static")
TOKENS = ("mask", "gather")


@dataclass(slots=True)
class Running:
    """What the gates of one pinned model share while it runs."""

    mask: Tensor | None = None
    """The call's attention mask, bool `(N, T)`."""
    rows: int = 0
    """Its number of samples."""
    first: Tensor | None = None
    """The first tokens of every sequence, where they run in full, bool `(N, T)`."""
    decisions: dict[str, Tensor] | None = None
    """Decisions by site name, where they are wanted."""
    shared: dict[str, Shared] = field(default_factory=dict)
    """What routers that others read from were asked last, by site."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a pinned gate knows instead of asking."""

    execution: str
    tokens: str
    threshold: float
    constant: bool | None
    """The decision where no router runs."""
    nested: bool
    """Whether the gate stands inside another one's branch; what is decided there cannot leave it."""
    padding_closed: bool
    """Whether it is closed for padding."""
    running: Running = field(compare=False)


class PinnedGate(Gate):
    """A gate that looks nothing up."""

    pinned: Pinned

    def _run(self, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        pinned = self.pinned
        if self.leads and pinned.constant is None:
            self.shared()[self.site.name] = Shared(residual)
        elif self.leader and pinned.constant is None and self.leader[0].site.name not in self.shared():
            return self.open(branch, left, inputs)
        if pinned.constant is not None:
            if pinned.constant or not branch.stateful:
                return self.open(branch, left, inputs) if pinned.constant else self.closed(branch, left, residual)
            decisions = self._constant(residual, pinned.constant)
        else:
            decisions = self.scores(residual) > pinned.threshold
            if pinned.padding_closed:
                decisions = self.without_padding(residual, decisions)
        running = pinned.running
        if running.decisions is not None and not pinned.nested:
            running.decisions[self.site.name] = decisions
        if pinned.execution == "mask" or (decisions.numel() != 1 and not self.per_token):
            return self.mask(branch, left, residual, inputs, decisions)
        if pinned.tokens == "gather" and self.per_token and not self.query and branch.axes is not None:
            if not branch.stateful and not branch.escapes:
                active = decisions.flatten().nonzero().squeeze(1)  # K, known only when the graph runs
                return self._skip_tokens(branch, left, residual, inputs, decisions, active)
        return self.cond(branch, left, residual, inputs, decisions)

    def padding(self, residual: Tensor) -> Tensor | None:
        """The call's attention mask, if it fits the residual stream here."""
        mask = self.pinned.running.mask
        if mask is None or residual.dim() != 3 or mask.shape != residual.shape[:2]:
            return None
        return mask

    def shared(self) -> dict[str, Shared]:
        """What the running call keeps for routers that read from others."""
        return self.pinned.running.shared

    def _scope(self) -> Scope:
        running = self.pinned.running
        return Scope(mask=running.mask, rows=running.rows, first=running.first)


def pin(
    gated: nn.Module,
    example: Any,
    execution: Execution = "cond",
    *,
    tokens: Tokens = "mask",
    threshold: Mapping[str, float] | float | None = None,
) -> nn.Module:
    """A copy of `gated` for `torch.compile(..., fullgraph=True)` and `torch.export`, fixed to the current budget.

    Args:
        gated: A gated model; it is not changed, and the copy shares its weights.
        example: What it will be called with: a tensor, tuple or dict. It fixes which arguments are given.
        execution: `cond`: a branch that nothing in the call needs does not run (per sample: at batch 1; per token: where
            no token is active). `mask`: everything runs, decisions select; any batch size. `static`: the static
            policy of the current budget, without routers. There is no second look: one pass gets the whole budget.
        tokens: What `cond` does with active tokens of a branch that treats tokens separately: `mask` runs all of them,
            `gather` the active ones alone, in a graph with data-dependent shapes.
        threshold: Another one than the budget's, or one per site.

    Returns:
        A module of the original class, called as the example is.

    Raises:
        NotConverted: If the model has no gates.
        PinError: If a module with gates is called in several ways during one call, or in one that cannot be traced, or
            sites decide heads, or once per prompt.
    """
    check_choice("execution", execution, EXECUTIONS)
    check_choice("tokens", tokens, TOKENS)
    state = state_of(gated)
    heads = [planned.site.name for planned in state.plan.sites if planned.site.heads is not None]
    if heads:
        raise PinError(
            f"{heads[0]} and {len(heads) - 1} other sites decide heads, whose number differs from call to call; a graph holds "
            "one program: convert with sites=['attention', 'mlp'] to pin or export"
        )
    once = [planned.site.name for planned in state.plan.sites if planned.granularity == "prefill"]
    if once:
        raise PinError(
            f"{once[0]} and {len(once) - 1} other sites are decided once per prompt and kept with a cache, which a graph has "
            "not: convert with granularity='token' to pin or export"
        )
    patterns, nested = _rehearse(gated, example)
    twin = share(gated).eval()
    make_permanent(twin)
    running = Running()
    for name, module in list(twin.named_modules()):
        if GATES in module._modules:
            _pin_host(module, type(gated.get_submodule(name)), patterns.get(name))
    _pin_root(twin, running, state.plan.first_tokens)
    static, at = state.static, threshold
    if state.margin is not None:  # a graph has no second look, so its one pass gets the whole budget
        point = current_point(state)
        static = {name: name in point.static for name in state.units}
        at = point.threshold if at is None else at
    for name, gate in iter_gates(twin):
        constant = True if gate.always_on else static.get(name, True) if execution == "static" else None
        at = gate.threshold if at is None else at
        gate.__class__ = PinnedGate
        own = float(at[name] if isinstance(at, Mapping) else at)
        closes = gate.closes_padding(own)
        gate.__dict__["pinned"] = Pinned(execution, tokens, own, constant, name in nested, closes, running)
    twin.__dict__["_surgery_running"] = running
    return twin


def drop_unused(pinned: nn.Module, used: Sequence[str]) -> list[str]:
    """Take every parameter and buffer out of `pinned` that is not in `used`; returns the names of what went."""
    gone = []
    keep = set(used)
    for prefix, module in pinned.named_modules():
        for table in (module._parameters, module._buffers):
            for key in list(table):
                name = f"{prefix}.{key}" if prefix else key
                if table[key] is not None and name not in keep:
                    table[key] = None
                    gone.append(name)
    return gone


def running_of(pinned: nn.Module) -> Running:
    """What the gates of a pinned model share."""
    running: Running = pinned.__dict__["_surgery_running"]
    return running


def _rehearse(gated: nn.Module, example: Any) -> tuple[dict[str, Pattern], set[str]]:
    """Call `gated` once: how each host is called, and which gates stand inside another one's branch.

    The call is captured, since libraries look at values in a running one: transformers drops an attention mask
    that is all ones, unless it is traced.
    """
    seen: dict[str, Pattern] = {}
    running: list[str] = []
    nested: set[str] = set()

    def note(name: str, programs: Programs) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            pattern = programs.pattern(args, kwargs)
            if seen.setdefault(name, pattern) != pattern:
                raise PinError(
                    f"{name or 'the model'} is called in two ways during one call: {seen[name]} and {pattern}; a graph holds "
                    "one; convert without the sites in this module (`surgery.convert(..., sites=...)`)"
                )

        return hook

    def handler(gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        if running:
            nested.add(gate.site.name)
        running.append(gate.site.name)
        value = gate.open(branch, left, inputs)
        running.pop()
        return value

    hooks = []
    for name, module in gated.named_modules():
        programs = getattr(type(module), "_surgery_programs", None)
        if programs is not None:
            hooks.append(module.register_forward_hook(note(name, programs), with_kwargs=True))
    batch = as_batch(example)
    try:
        with torch.no_grad(), context.handled(gated, handler):
            try:
                torch.export.export(_Tensors(gated, batch), batch.tensors, strict=False)
            except PinError:
                raise
            except Exception as error:  # torch.export raises many kinds; without it, captures may be refused later
                logger.info("%s is pinned as it runs, not as it is captured: %s", type(gated).__name__, error)
                seen.clear()
                running.clear()
                call(gated, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return seen, nested


class _Tensors(nn.Module):
    """A model that takes the tensors of a batch by position."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self.batch = batch

    def forward(self, *tensors: Tensor) -> Any:
        return tuple(output_tensors(call(self.model, self.batch.filled(tensors))))


def _pin_host(module: nn.Module, cls: type[nn.Module], pattern: Pattern | None) -> None:
    """Give the host the program of one pattern as its `forward`; one that was never called runs the original."""
    programs: Programs = cls._surgery_programs  # type: ignore[attr-defined]
    program = None if pattern is None else programs.made(module, pattern)
    if pattern is not None and program is None:
        raise PinError(
            f"{programs.name or 'the model'} cannot be traced in the way in which the example calls it, so its sites would "
            "run dense; call it as when it was converted"
        )
    namespace = {name: value for name, value in vars(cls).items() if name.startswith("_branch_")}
    if program is not None:
        assert pattern is not None
        namespace["forward"] = _straight(programs, program, pattern)
    module.__class__ = subclass(programs.base, namespace)


def _straight(programs: Programs, program: Callable[..., Any], pattern: Pattern) -> Callable[..., Any]:
    """A `forward` with the original's arguments that runs one program, if they are given as in its pattern."""
    named = tuple((p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY) for p in programs.signature.named)

    kinds = (*pattern.named, *pattern.extra, *(kind for _, kind in pattern.keywords))
    given = tuple(kind != "none" for kind in kinds)
    name_of_host = programs.name or "the model"
    known = tuple(name for name, _, _ in named)

    @functools.wraps(programs.base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (nested := nested_stream(programs.base, args, kwargs)) is not None:
            return run_padded(functools.partial(forward, self), nested)
        values = []
        for index, (name, default, by_name) in enumerate(named):
            if index < len(args) and not by_name:
                values.append(args[index])
            else:
                values.append(kwargs.get(name, default))
        values.extend(args[len(named) :])
        values.extend([kwargs[name] for name in sorted(kwargs) if name not in known])
        if len(values) != len(given) or any((v is not None) != g for v, g in zip(values, given, strict=True)):
            raise PinError(
                f"{name_of_host} is not called as when it was pinned (other arguments are None); pin with such an example, or "
                "call the gated model itself"
            )
        return program(self, *values)

    forward.__signature__ = inspect.signature(programs.base.forward)  # type: ignore[attr-defined]
    return forward


def _pin_root(twin: nn.Module, running: Running, count: int) -> None:
    """The call's padding mask and first tokens, as `surgery.roots` reads them, for the gates of this model."""
    cls = type(twin)
    base = base_class(twin)
    inner: Callable[..., Any] = vars(cls)["forward"] if GATES in twin._modules else base.forward

    names = tuple(p.name for p in signature_of(base).named)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        running.mask, running.rows = padding_of(arguments), samples_in(arguments)
        running.first = first_tokens_of(arguments, count) if count else None
        try:
            return inner(self, *args, **kwargs)
        finally:
            running.mask, running.rows, running.first = None, 0, None
            running.shared.clear()

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    kept = {k: v for k, v in vars(cls).items() if k.startswith("_branch_")}
    twin.__class__ = subclass(base, {**kept, "forward": forward})
