"""Programs of one host: generated functions, one `forward` per call pattern and one function per branch.

    def _branch_mlp(self, x):                     # before:  def forward(self, x):
        norm = self.norm(x)                       #              return x + self.mlp(self.norm(x))
        return self.mlp(norm)

    def _forward_0(self, x):
        return self.surgery_gates.mlp(self._branch_mlp, x, x, x)

Graphs are never stored; a host that meets a new call pattern (another argument is None) traces again, once, and compares
what it made with the original (`surgery.first_calls`).
"""

from __future__ import annotations

import inspect
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from surgery import context
from surgery.attributes import Attributes
from surgery.context import Scope, runs_dense
from surgery.errors import PlanMismatch, TraceError
from surgery.first_calls import difference, kind_of_object
from surgery.generating import code_of, function_of, functions_of
from surgery.key_values import KeyWriter
from surgery.nested_calls import nested_stream, run_padded
from surgery.patterns import Held, Pattern, Signature, pattern_of
from surgery.query_rows import QueryRows
from surgery.regions import Region, find_regions, is_rest, or_nothing
from surgery.sites import RegionInput
from surgery.tracing import (
    ATTRIBUTES,
    CACHE_NAMES,
    DTYPE,
    GATES,
    INPLACE,
    is_autocast,
    is_watched,
    new_graph,
    remove_dead_code,
    trace,
    weights_dtype,
)

logger = logging.getLogger(__name__)
MOST = 64
"""Programs of one host, where its call patterns hold numbers or sizes fixed."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A site inside a host: where its gate hangs, which region it is, and how its inputs are cut."""

    site: str
    key: str
    anchor: tuple[str, ...]
    axes: Mapping[str, RegionInput]
    shared: bool = False
    leader: str = ""
    attention: str = ""
    """The module whose linear map makes queries, where they are decided per token."""


@dataclass(slots=True)
class Program:
    """What a host does in calls of one pattern."""

    run: Callable[..., Any] | None
    """Takes the host and all arguments; None where the original runs."""
    attributes: Attributes | None = None
    """What it was made for."""
    objects: tuple[int, ...] = ()
    """Places of arguments that are neither tensors nor constants."""
    trusted: bool = False
    """Whether a call like its first one was compared with the original before."""
    proved: dict[Any, bool] = field(default_factory=dict)
    """Kinds of those arguments -> whether it may run."""
    sure: bool = False
    """Whether it may run whatever they are, since there are none."""
    instead: Held = "kinds"
    """What has to be held fixed for these calls, if it is more than for others of this host."""

    def fits(self, module: nn.Module) -> bool:
        """Whether the module still is what it was made for."""
        return self.attributes is None or self.attributes.are_those_of(module)


@dataclass(slots=True)
class Programs:
    """The generated functions of one host, one `forward` per call pattern."""

    name: str
    base: type[nn.Module]
    signature: Signature
    marked: tuple[Marked, ...]
    inlined: frozenset[str]
    held: Held = "kinds"
    full: bool = False
    compiled: dict[Pattern, list[Program]] = field(default_factory=dict)
    """Programs of each pattern: one for every set of attributes that was met."""
    traced: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    """Classes of the modules that were traced through."""
    warned: set[str] = field(default_factory=set)
    sources: list[str] = field(default_factory=list)
    dtype: torch.dtype | None = None
    """The weights' dtype that decided what some program does, or None."""
    leaders: tuple[str, ...] = field(init=False)
    """Sites from whose routers others read."""
    nests: bool = field(init=False)
    """Whether calls with a nested tensor are to be expected."""
    required: int = field(init=False)
    """How many arguments a call has to give."""
    most: int = field(init=False)
    """How many it may give by place, if all have one, else -1."""
    defaults: tuple[Any, ...] = field(init=False)
    """Of all arguments by name."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while a program is made: threads may meet new patterns at once."""

    def __post_init__(self) -> None:
        self.leaders = tuple(mark.leader for mark in self.marked if mark.leader)
        self.nests = issubclass(self.base, nn.TransformerEncoderLayer)
        named, empty = self.signature.named, inspect.Parameter.empty
        self.defaults = tuple(parameter.default for parameter in named)
        self.required = sum(value is empty for value in self.defaults)
        self.most = -1 if self.signature.extra or self.signature.positional < len(named) else len(named)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the program of this call's pattern; generate it when the pattern is new. Dense calls run the
        original.
        """
        if runs_dense(module._modules[GATES].state):  # type: ignore[union-attr, arg-type]
            return self.base.forward(module, *args, **kwargs)
        if self.nests and (nested := nested_stream(self.base, args, kwargs)) is not None:
            return run_padded(lambda *call, **named: self.run(module, call, named), nested)
        if self.dtype is not None and (self.dtype != weights_dtype(module) or is_autocast(module)):
            logger.warning(
                "%s: this call runs dense, since its weights were %s when gates were inserted", self.name, self.dtype
            )
            return self.base.forward(module, *args, **kwargs)
        if self.traced and (changed := self._changed(module)):
            self._warn_once(f"{changed} was changed after gates were inserted")
            return self.base.forward(module, *args, **kwargs)
        values: Sequence[Any]
        rest: Mapping[str, Any]
        if not kwargs and self.required <= len(args) <= self.most:
            values, extra, rest = (*args, *self.defaults[len(args) :]), (), {}
        else:
            values, extra, rest = self.signature.bind(args, kwargs)
            if not self.signature.fits(values, rest, args):
                return self.base.forward(module, *args, **kwargs)  # says what is missing or too much
        program = self._program(module, values, extra, rest)
        if program.run is None:
            return self.base.forward(module, *args, **kwargs)
        inputs = (module, *values, *extra, *[rest[name] for name in sorted(rest)])
        if not program.sure and not self._may_run(program, inputs, lambda: self._original(values, extra, rest)):
            return self.base.forward(module, *args, **kwargs)
        return self._share(program.run, inputs) if self.leaders else program.run(*inputs)

    def _program(
        self, module: nn.Module, values: Sequence[Any], extra: Sequence[Any], rest: Mapping[str, Any]
    ) -> Program:
        program = self._of_pattern(module, pattern_of(values, extra, rest, self.held))
        if program.instead != "kinds":
            program = self._of_pattern(module, pattern_of(values, extra, rest, program.instead))
        return program

    def _of_pattern(self, module: nn.Module, pattern: Pattern) -> Program:
        """The program of a pattern that fits the module's attributes; it is made where there is none."""
        for program in self.compiled.get(pattern, ()):
            if program.fits(module):
                return program
        with self.lock:
            for program in self.compiled.get(pattern, ()):
                if program.fits(module):
                    return program
            return self.add(module, pattern, strict=False) if self._has_room(pattern) else Program(None)

    def _may_run(self, program: Program, inputs: tuple[Any, ...], original: Callable[[], Callable[..., Any]]) -> bool:
        """Whether a program is right for calls like this one; compared with the original in the first of them."""
        kinds = tuple([kind_of_object(inputs[place]) for place in program.objects])
        known = program.proved.get(kinds)
        if known is not None:
            if known and not program.objects:
                program.sure = True
            return known
        if program.trusted and not program.proved:
            program.proved[kinds] = True
            return True
        module = inputs[0]
        assert program.run is not None
        with self.lock:
            if kinds in program.proved:
                return program.proved[kinds]
            state = module._modules[GATES].state
            why = difference(program.run, original(), module, state, inputs[1:])
            if why is not None:
                program.proved[kinds] = not why
        if why:
            logger.warning(
                "%s: calls like this one run dense, since traced code is wrong: %s", self.name or "model", why
            )
        return not why

    def _original(self, values: Sequence[Any], extra: Sequence[Any], rest: Mapping[str, Any]) -> Callable[..., Any]:
        """The original `forward`, called with the arguments of a program."""
        named = [parameter.name for parameter in self.signature.named]
        positional = self.signature.positional if extra else 0
        names = sorted(rest)

        def run(module: nn.Module, *call: Any) -> Any:
            middle = len(named) + len(extra)
            given = dict(zip(named[positional:], call[positional : len(named)], strict=True))
            given |= zip(names, call[middle:], strict=True)
            return self.base.forward(module, *call[:positional], *call[len(named) : middle], **given)

        return run

    def _changed(self, module: nn.Module) -> str:
        """Name of a module that was traced through and is now watched, or another one; "" where there is none."""
        for name, cls in self.traced.items():
            inner: nn.Module | None = module
            for part in name.split("."):
                inner = inner._modules.get(part) if inner is not None else None
            if inner is None or type(inner) is not cls or is_watched(inner):
                return f"{self.name}.{name}" if self.name else name
        return ""

    def _warn_once(self, why: str) -> None:
        if why not in self.warned:
            self.warned.add(why)
            logger.warning("%s: runs dense, since %s", self.name or "model", why)

    def _share(self, program: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """Run a program; what its routers share is kept as long as it runs."""
        running = context.scope()
        if running is None:  # the host is called by itself
            with context.entered(Scope()):
                return program(*inputs)
        try:
            return program(*inputs)
        finally:
            for name in self.leaders:
                running.shared.pop(name, None)

    def _has_room(self, pattern: Pattern) -> bool:
        """Whether one more program may be made: numbers, sizes and attributes that are held fixed could be endless."""
        endless = self.held not in ("kinds", "dtypes")
        room = len(self.compiled) < MOST or not endless
        if not room and not self.full:
            self.full = True
            logger.warning(
                "%s: called with more than %d combinations of %s; further ones run dense", self.name, MOST, self.held
            )
        if len(self.compiled.get(pattern, ())) >= MOST:
            self._warn_once(f"its attributes were changed more than {MOST} times")
            return False
        return room

    def pattern(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pattern:
        """The call pattern of one call."""
        pattern = self.signature.pattern(tuple(args), kwargs, self.held)
        finer: Held = next((program.instead for program in self.compiled.get(pattern, ())), "kinds")
        return pattern if finer == "kinds" else self.signature.pattern(tuple(args), kwargs, finer)

    def made(self, module: nn.Module, pattern: Pattern) -> Callable[..., Any] | None:
        """The program of a pattern that was met, or None where the original runs."""
        return next((program.run for program in self.compiled.get(pattern, ()) if program.fits(module)), None)

    def add(self, module: nn.Module, pattern: Pattern, *, strict: bool, trusted: bool = False) -> Program:
        """Generate the program of one pattern.

        Args:
            module: The host.
            pattern: How it is called.
            strict: Whether all sites have to be there.
            trusted: Whether such calls were compared with the original before.

        Raises:
            PlanMismatch: If `strict`, and it cannot be traced or a site is not found again in the trace.
        """
        kinds = (*pattern.named, *pattern.extra, *(kind for _, kind in pattern.keywords))
        try:
            graph = trace(module, pattern, self.inlined)
        except TraceError as error:
            if strict:
                raise PlanMismatch(
                    f"{self.name or 'model'} is not called as in the plan: {error}; was the plan made for another model?"
                ) from error
            finer = pattern.holds == self.held == "kinds" and any(kind.startswith("tensor:") for kind in kinds)
            if not finer:
                logger.warning("%s: this call runs dense, since it cannot be traced: %s", self.name or "model", error)
            return self._keep(pattern, Program(None, instead="dtypes" if finer else "kinds"))
        self.dtype = graph.output_node().meta.get(DTYPE, self.dtype)
        matched = _match(find_regions(graph, module).regions, self.marked)
        missing = [m.site for m in self.marked if m not in [mark for mark, _ in matched]]
        if missing and strict:
            raise PlanMismatch(
                f"{self.name or 'model'}: the plan's sites {missing} are not found in this model; "
                "was the plan made for another architecture or another version of its library?"
            )
        if missing:
            logger.warning("%s: called in a new way in which %s cannot be skipped", self.name or "model", missing)
        index = len(self.sources)
        source, namespace = _generate(self, graph, pattern, matched, index)
        functions = functions_of(source, namespace, f"<surgery {self.name or 'model'} #{index}>")
        run = functions.pop(f"_forward_{index}")
        cls = type(module)
        for mark, region in matched:
            function: Any = functions[_branch_name(mark.key, index)]
            function.escapes = len(region.escapes)
            function.axes = _axes(mark, region)
            function.stateful = any(node.name in CACHE_NAMES for node in region.inputs) or mark.shared
            function.first = region.add.args[0] is region.term
            function.inplace = region.add.meta.get(INPLACE, False) and function.first
            function.keys = self._key_writer(mark, region, index) if function.stateful else None
            function.rows = None if function.stateful else self._query_rows(mark, region, index)
            setattr(cls, function.__name__, function)
        self.sources.append(source)
        objects = tuple(place for place, kind in enumerate(kinds, start=1) if kind == "object")
        return self._keep(pattern, Program(run, graph.output_node().meta[ATTRIBUTES], objects, trusted))

    def _keep(self, pattern: Pattern, program: Program) -> Program:
        self.compiled[pattern] = [*self.compiled.get(pattern, ()), program]
        return program

    def _key_writer(self, mark: Marked, region: Region, index: int) -> KeyWriter | None:
        """Writes the branch's keys and values alone, where its attention is one module that takes the cache."""
        takers = [
            node
            for node in region.nodes
            if node.op == "call_module" and any(source.name in CACHE_NAMES for source in node.all_input_nodes)
        ]
        if len(takers) != 1 or region.escapes:
            return None
        arguments = self._function(_arguments_graph(region, takers[0]), f"{_branch_name(mark.key, index)}_arguments")
        return KeyWriter(str(takers[0].target), arguments)

    def _query_rows(self, mark: Marked, region: Region, index: int) -> QueryRows | None:
        """Runs the branch for some query tokens, where its attention is one module that queries are made in."""
        calls = [n for n in region.nodes if n.op == "call_module" and mark.attention == n.target]
        rest = _rest_graph(region, calls[0]) if len(calls) == 1 else None
        if rest is None:
            return None
        name = _branch_name(mark.key, index)
        arguments = self._function(_arguments_graph(region, calls[0]), f"{name}_arguments")
        return QueryRows(str(calls[0].target), arguments, self._function(rest, f"{name}_rest"))

    def _function(self, graph: fx.Graph, name: str) -> Callable[..., Any]:
        made: Callable[..., Any] = function_of(graph, name, f"<surgery {self.name or 'model'} {name}>")
        return made


def _match(regions: list[Region], marked: Iterable[Marked]) -> list[tuple[Marked, Region]]:
    left = list(regions)
    pairs = []
    for mark in marked:
        region = next((r for r in left if r.anchor == mark.anchor), None)
        if region is not None:
            left.remove(region)
            pairs.append((mark, region))
    return pairs


def _axes(mark: Marked, region: Region) -> tuple[RegionInput, ...] | None:
    if any(node.name not in mark.axes for node in region.inputs):
        return None
    return tuple(mark.axes[node.name] for node in region.inputs)


def _branch_name(key: str, index: int) -> str:
    return f"_branch_{key}" if index == 0 else f"_branch_{key}_{index}"


def _generate(
    programs: Programs, graph: fx.Graph, pattern: Pattern, matched: list[tuple[Marked, Region]], index: int
) -> tuple[str, dict[str, Any]]:
    namespace: dict[str, Any] = {}
    parts = []
    for mark, region in matched:
        parts.append(code_of(_branch_graph(region), _branch_name(mark.key, index), namespace))
    main = _main_graph(programs, graph, pattern, matched, index)
    parts.append(code_of(main, f"_forward_{index}", namespace))
    return "\n\n".join(parts) + "\n", namespace


def _branch_graph(region: Region) -> fx.Graph:
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in region.inputs:
        env[node] = graph.placeholder(node.name)
    for node in region.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    result: Any = env[region.term]
    if region.escapes:
        result = (result, *(_copy_escape(graph, node, env) for node in region.escapes))
    graph.output(result)
    return graph


def _arguments_graph(region: Region, call: fx.Node) -> fx.Graph:
    """The branch up to the call of one module: what that is called with."""
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in region.inputs:
        env[node] = graph.placeholder(node.name)
    for node in region.nodes:
        if node is call:
            break
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(fx.map_arg((call.args, call.kwargs), env.__getitem__))
    remove_dead_code(graph)
    return graph


def _rest_graph(region: Region, call: fx.Node) -> fx.Graph | None:
    """The branch from a module's output on; None where it reads anything else."""
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {call: graph.placeholder("made")}

    def is_known(node: fx.Node) -> bool:
        return all(source in env for source in node.all_input_nodes)

    for node in region.nodes[region.nodes.index(call) + 1 :]:
        if is_known(node):
            env[node] = graph.node_copy(node, env.__getitem__)
    if region.term not in env or not all(node in env or is_known(node) for node in region.escapes):
        return None
    result: Any = env[region.term]
    if region.escapes:
        result = (result, *(_copy_escape(graph, node, env) for node in region.escapes))
    graph.output(result)
    remove_dead_code(graph)
    return graph


def _copy_escape(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    return env[node] if node in env else graph.node_copy(node, env.__getitem__)


def _main_graph(
    programs: Programs, source: fx.Graph, pattern: Pattern, matched: list[tuple[Marked, Region]], index: int
) -> fx.Graph:
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    given = {str(node.target): node for node in source.nodes if node.op == "placeholder"}
    for name in programs.signature.names(pattern):
        placeholder = graph.placeholder(name)
        if name in given:
            env[given[name]] = placeholder
    inside = {node for _, region in matched for node in region.own}
    escaped = {node for _, region in matched for node in region.escapes}
    gates: dict[fx.Node, list[tuple[Marked, Region]]] = {}
    for mark, region in matched:
        gates.setdefault(region.add, []).append((mark, region))
    for node in source.nodes:
        if node.op == "placeholder" or node in inside or node in escaped:
            continue
        if node in gates:
            env[node] = _gate_calls(graph, node, gates[node], env, index)
        elif node.op == "output" or all(source in env for source in node.all_input_nodes):
            env[node] = graph.node_copy(node, env.__getitem__)  # what is left out are shape reads inside a branch
    remove_dead_code(graph)
    return graph


def _gate_calls(
    graph: fx.Graph, add: fx.Node, branches: list[tuple[Marked, Region]], env: dict[fx.Node, fx.Node], index: int
) -> fx.Node:
    terms = [region.term for _, region in branches]
    others = [operand for operand in add.args if operand not in terms]
    left: fx.Node | None = env[others[0]] if others else None  # type: ignore[index]
    for mark, region in branches:
        function = graph.get_attr(_branch_name(mark.key, index))
        inputs = tuple(env[node] for node in region.inputs)
        call = graph.call_module(f"{GATES}.{mark.key}", (function, left, env[region.residual], *inputs))
        if region.escapes:
            for position, node in enumerate(region.escapes, start=1):
                further = graph.call_function(operator.getitem, (call, position))
                env[node] = graph.call_function(or_nothing, (further,)) if is_rest(node) else further
            call = graph.call_function(operator.getitem, (call, 0))
        left = call
    assert left is not None
    return left
