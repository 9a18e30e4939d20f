"""Inserting gates: the class stays, the forward is generated.

For every host two kinds of functions are generated from its trace, one per branch and the new `forward`:

    def _branch_mlp(self, x):                     # before:  def forward(self, x):
        norm = self.norm(x)                       #              return x + self.mlp(self.norm(x))
        return self.mlp(norm)

    def _forward_0(self, x):
        return self.surgery_gates.mlp(self._branch_mlp, x, x, x)

The host instance gets a dynamic subclass of its own class with these functions, so names in the state dict, `isinstance`,
hooks, gradient checkpointing, `save_pretrained` and `generate` go on working. Graphs are never stored; a host that
meets a new call pattern (another argument is None) traces again, once.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import logging
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from surgery import context, roots
from surgery.branches import Owners
from surgery.context import Scope, runs_dense, state_of
from surgery.copying import share
from surgery.errors import AlreadyConverted, PlanMismatch, TraceError, UnknownSite, UnsupportedModel, near, shortened
from surgery.gates import Gate
from surgery.generating import code_of, function_of, functions_of
from surgery.head_gates import HeadGate
from surgery.key_values import KeyWriter
from surgery.queries import owner
from surgery.query_rows import QueryRows
from surgery.regions import Region, find_regions, is_rest, or_nothing
from surgery.sites import Plan, RegionInput, Site, SitePlan, Sites, is_in_first
from surgery.state import CostModel, GatedState, SiteCost
from surgery.tracing import (
    CACHE_NAMES,
    DTYPE,
    GATES,
    INPLACE,
    Held,
    Pattern,
    Signature,
    base_class,
    is_autocast,
    new_graph,
    pattern_of,
    remove_dead_code,
    signature_of,
    trace,
    weights_dtype,
)

logger = logging.getLogger(__name__)
MOST = 64
"""Programs of one host, where its call patterns hold numbers or sizes fixed."""


class Gates(nn.Module):
    """The gates of one host, and the state that they share."""

    def __init__(self, state: GatedState) -> None:
        super().__init__()
        self.state = state

    def hang(self, planned: SitePlan, host: str, owners: Owners = ()) -> str:
        """Add the gate of one site; returns its name here. `owners` hold what it finds inside attention."""
        key = _key(planned.site.name, host, self)
        if planned.site.heads is not None:
            self.add_module(key, HeadGate(planned, self.state, owners=owners))
        else:
            self.add_module(key, Gate(planned, self.state, query=owners))
        return key


@dataclass(frozen=True, slots=True)
class Marked:
    """A site inside a host: where its gate hangs, which region it is, and how its inputs are cut."""

    site: str
    key: str
    anchor: tuple[str, ...]
    axes: Mapping[str, RegionInput] | None
    shared: bool = False
    leader: str = ""
    attention: str = ""
    """The module whose linear map makes queries, where they are decided per token."""


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
    compiled: dict[Pattern, Callable[..., Any] | None] = field(default_factory=dict)
    sources: dict[Pattern, str] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    """The weights' dtype that decided what some program does, or None."""
    leaders: tuple[str, ...] = field(init=False)
    """Sites from whose routers others read."""

    def __post_init__(self) -> None:
        self.leaders = tuple(mark.leader for mark in self.marked if mark.leader)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the program of this call's pattern; generate it when the pattern is new. Dense calls run the
        original.
        """
        if runs_dense(module._modules[GATES].state):  # type: ignore[union-attr, arg-type]
            return self.base.forward(module, *args, **kwargs)
        if self.dtype is not None and (self.dtype != weights_dtype(module) or is_autocast(module)):
            logger.warning(
                "%s: this call runs dense, since its weights were %s when gates were inserted", self.name, self.dtype
            )
            return self.base.forward(module, *args, **kwargs)
        values, extra, rest = self.signature.bind(args, kwargs)
        names = sorted(rest)
        pattern = pattern_of(values, extra, rest, self.held)
        try:
            program = self.compiled[pattern]
        except KeyError:
            program = self.add(module, pattern, strict=False) if self._has_room() else None
        if program is None:
            return self.base.forward(module, *args, **kwargs)
        inputs = (module, *values, *extra, *[rest[name] for name in names])
        return self._share(program, inputs) if self.leaders else program(*inputs)

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

    def _has_room(self) -> bool:
        """Whether one more program may be made: patterns that hold numbers or sizes fixed could be endless."""
        room = self.held == "kinds" or len(self.compiled) < MOST
        if not room and not self.full:
            self.full = True
            logger.warning(
                "%s: called with more than %d combinations of %s; further ones run dense", self.name, MOST, self.held
            )
        return room

    def pattern(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pattern:
        """The call pattern of one call."""
        return self.signature.pattern(tuple(args), kwargs, self.held)

    def add(self, module: nn.Module, pattern: Pattern, *, strict: bool) -> Callable[..., Any] | None:
        """Generate the program of one pattern.

        Raises:
            PlanMismatch: If `strict`, and it cannot be traced or a site is not found again in the trace.
        """
        try:
            graph = trace(module, pattern, self.inlined)
        except TraceError as error:
            if strict:
                raise PlanMismatch(
                    f"{self.name or 'model'} is not called as in the plan: {error}; was the plan made for another model?"
                ) from error
            logger.warning("%s: this call runs dense, since it cannot be traced: %s", self.name or "model", error)
            self.compiled[pattern] = None
            return None
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
        index = len(self.compiled)
        source, namespace = _generate(self, graph, pattern, matched, index)
        functions = functions_of(source, namespace, f"<surgery {self.name or 'model'} #{index}>")
        program = functions.pop(f"_forward_{index}")
        cls = type(module)
        for mark, region in matched:
            function: Any = functions[_branch_name(mark.key, index)]
            function.escapes = len(region.escapes)
            function.axes = _axes(mark, region)
            function.stateful = any(node.name in CACHE_NAMES for node in region.inputs) or mark.shared
            function.inplace = region.add.meta.get(INPLACE, False) and region.add.args[0] is region.term
            function.keys = self._key_writer(mark, region, index) if function.stateful else None
            function.rows = None if function.stateful else self._query_rows(mark, region, index)
            setattr(cls, function.__name__, function)
        self.sources[pattern] = source
        self.compiled[pattern] = program
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


def insert_gates(model: nn.Module, plan: Plan | Sites) -> nn.Module:
    """Put gates into a copy of `model` that shares its weights; all of them are open.

    Args:
        model: The dense model; it is not changed. It may be on the meta device.
        plan: What `sites.plan()` gave, or `Sites`, short for `sites.plan()`.

    Returns:
        A module of the same class, called in the same way, bit-equal to `model` until it is trained or forced.

    Raises:
        AlreadyConverted: If `model` carries gates.
        PlanMismatch: If the plan does not fit the model.
    """
    if isinstance(plan, Sites):
        plan = plan.plan()
    check_convertible(model)
    trainable = _trainable(model)
    modules = dict(model.named_modules())
    unknown = sorted({p.site.host for p in plan.sites} - set(modules))
    if unknown:
        raise PlanMismatch(f"the plan for {plan.model_name} names modules that {type(model).__name__} lacks: {unknown}")
    gated = share(model).eval()
    gate_in_place(gated, plan)
    state_of(gated).trainable = trainable
    for _, gate in _gates(gated):
        gate.eval()
        device = next((p.device for p in gated.parameters()), torch.device("cpu"))
        gate.to(device)
    return gated


def gate_in_place(model: nn.Module, plan: Plan) -> None:
    """Turn `model` itself into a gated model: for one that nobody else holds, such as a copy or one that is being loaded."""
    state = GatedState(plan=plan, costs=flop_costs(plan), threshold=float("-inf"), trainable=_trainable(model))
    for host in dict.fromkeys(p.site.host for p in plan.sites):
        install(model, host, [p for p in plan.sites if p.site.host == host], plan, state)
    gates = {gate.site.name: gate for _, gate in _gates(model)}
    for planned in plan.sites:
        if planned.leader:
            gates[planned.site.name].leader = (gates[planned.leader],)
    _make_root(model, state)


def remove(gated: nn.Module) -> nn.Module:
    """The dense model back: a module of the original class without gates, sharing the backbone's weights.

    What required gradients when gates were inserted requires them again.

    Raises:
        NotConverted: If the model has no gates.
    """
    trainable = state_of(gated).trainable
    dense = share(gated)
    for module in list(dense.modules()):
        if GATES in module._modules:
            del module._modules[GATES]
        module.__class__ = base_class(module)
    del dense.__dict__["_surgery_state"]
    roots.forget_loading(dense)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in trainable)
    return dense


def show(gated: nn.Module, name: str = "") -> str:
    """The generated code of one host, as readable Python.

    Args:
        gated: A gated model.
        name: Name of a host, of a site in it, or "" for the model itself.

    Raises:
        NotConverted: If the model has no gates.
        UnknownSite: If nothing of that name was rewritten.
    """
    state = state_of(gated)
    host = next((p.site.host for p in state.plan.sites if p.site.name == name), name)
    programs = getattr(type(gated.get_submodule(host)), "_surgery_programs", None) if _has(gated, host) else None
    if programs is None:
        hosts = list(dict.fromkeys(p.site.host or "''" for p in state.plan.sites))
        raise UnknownSite(
            f"{name!r} is neither a site of this {type(gated).__name__} nor a module that was rewritten"
            f"{near(name, (*state.names, *hosts))}; sites: {shortened(state.names)}; rewritten modules: {shortened(hosts)}"
        )
    return "\n".join(programs.sources.values())


def check_convertible(model: nn.Module) -> None:
    """Refuse what is not a dense module.

    Raises:
        UnsupportedModel: If it is not a module.
        AlreadyConverted: If it carries gates.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"expected a torch.nn.Module, got {type(model).__name__}")
    if "_surgery_state" in model.__dict__ or any(isinstance(m, Gate) for m in model.modules()):
        raise AlreadyConverted(
            f"this {type(model).__name__} already has gates; use surgery.set_budget(model, budget), "
            "or surgery.remove(model) for the dense model"
        )


def flop_costs(plan: Plan) -> CostModel:
    """The cost model in FLOPs of a plan; one multiply-add = 2."""
    from surgery.routers import make_router
    from surgery.skip_paths import make_skip_path

    sites: dict[str, SiteCost] = {}
    with torch.device("meta"):
        for planned in plan.sites:
            site = planned.site
            per_token = planned.granularity == "token"
            router = make_router(planned)
            asked = 0.0 if planned.always_on else float(router.flops(site.positions if per_token else 1))
            if site.heads is not None:
                share = SiteCost(float(site.heads.flops), 0.0, asked / site.heads.count)
                sites |= dict.fromkeys(site.units, share)
                continue
            skip = make_skip_path(planned.skip, site.channels, site.layout, planned.rank)
            keeps_keys = per_token or (planned.granularity == "prefill" and is_in_first(1, site))
            saved = site.query.flops if site.query is not None and keeps_keys else site.flops
            sites[site.name] = SiteCost(float(saved), float(skip.flops(site.positions)), asked)
    return CostModel("flops", float(max(plan.model_flops, 1)), sites)


def empty_gates(plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """Every host's name and its gates on the meta device, hung as in the network: `.surgery_gates.<key>`."""
    state = GatedState(plan=plan, costs=CostModel("flops", 1.0, {}))
    with torch.device("meta"):
        for host in dict.fromkeys(p.site.host for p in plan.sites):
            holder, gates = nn.Module(), Gates(state)
            for planned in plan.sites:
                if planned.site.host == host:
                    gates.hang(planned, host)
            holder.add_module(GATES, gates)
            yield host, holder


def install(gated: nn.Module, host: str, planned: Iterable[SitePlan], plan: Plan, state: GatedState) -> None:
    """Turn one module of `gated` into a host."""
    module = gated.get_submodule(host)
    prefix = f"{host}." if host else ""
    gates = Gates(state)
    marked = []
    for one in planned:
        key = gates.hang(one, host, _owners(gated, one))
        gates._modules[key].cache_layer = _cache_layer(gated, one.site)  # type: ignore[union-attr]
        axes = {i.name: i for i in one.site.inputs} if not one.site.restriction else None
        anchor = tuple(a[len(prefix) :] for a in one.site.anchor)
        attention = _attention(one).removeprefix(prefix)
        marked.append(Marked(one.site.name, key, anchor, axes, one.site.shared, one.leader, attention))
    base = base_class(module)
    inlined = frozenset(n[len(prefix) :] for n in plan.inlined if n.startswith(prefix))
    patterns = [Pattern.from_list(p) for p in plan.patterns[host]]
    programs = Programs(host, base, signature_of(base), tuple(marked), inlined, patterns[0].holds)
    module.add_module(GATES, gates)
    module.__class__ = subclass(base, {"forward": _dispatcher(base), "_surgery_programs": programs})
    for pattern in patterns:
        programs.add(module, pattern, strict=pattern == patterns[0])


def _owners(gated: nn.Module, planned: SitePlan) -> Owners:
    """Modules and names of the parameters that a gate looks for while its attention runs."""
    if planned.site.heads is not None:
        return tuple(owner(gated, name) for name in planned.site.heads.names)
    roles = planned.site.query
    if roles is None or planned.granularity == "sample":
        return ()
    return tuple(owner(gated, name) if name else None for name in (roles.query, roles.output))


def _attention(planned: SitePlan) -> str:
    """Name of the module whose linear map makes queries, sample by sample, of attention that is decided per token; or ""."""
    roles = planned.site.query
    if roles is None or planned.granularity != "token" or not roles.query_rows == roles.output_rows == "NT":
        return ""
    return roles.query.rpartition(".")[0].rpartition(".")[0]


def _cache_layer(gated: nn.Module, site: Site) -> int | None:
    """Index of the site's attention in key/value caches, by the name that transformers gives it."""
    parts = [part for name in site.modules if _has(gated, name) for part in gated.get_submodule(name).modules()]
    found = [getattr(part, "layer_idx", None) for part in parts]
    return next((index for index in found if isinstance(index, int)), None)


def _make_root(gated: nn.Module, state: GatedState) -> None:
    cls = base_class(gated)
    existing = {
        k: v for k, v in vars(type(gated)).items() if k in ("forward", "_surgery_programs") or k.startswith("_branch_")
    }
    extra = existing if type(gated) is not cls else {}
    gated.__class__ = subclass(cls, {**extra, **roots.namespace(cls)})
    gated.__dict__["_surgery_state"] = state


def subclass(base: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """A class that looks like `base` from outside, with the functions of `namespace`."""
    cls = type(
        base.__name__,
        (base,),
        {**namespace, "_surgery_base": base, "__module__": base.__module__, "__doc__": base.__doc__},
    )
    cls.__qualname__ = base.__qualname__
    return cls


def _dispatcher(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self)._surgery_programs.run(self, args, kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


def _key(site: str, host: str, gates: nn.Module) -> str:
    relative = site[len(host) + 1 :] if host and site.startswith(f"{host}.") else "" if site == host else site
    stem = re.sub(r"[^a-zA-Z0-9_]", "_", relative) or "branch"  # it becomes part of generated code
    if not stem.isidentifier() or keyword.iskeyword(stem) or hasattr(gates, stem):
        stem = f"branch_{stem}"
    key, count = stem, 1
    while key in gates._modules:
        count += 1
        key = f"{stem}_{count}"
    return key


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
    if mark.axes is None or any(node.name not in mark.axes for node in region.inputs):
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


def _trainable(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _gates(gated: nn.Module) -> Collection[tuple[str, Gate]]:
    return [(name, m) for name, m in gated.named_modules() if isinstance(m, Gate)]


def _has(model: nn.Module, name: str) -> bool:
    return name == "" or name in dict(model.named_modules())
