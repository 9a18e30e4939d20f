"""Residual branches in one traced `forward`: add trees and exclusive cones.

An add tree `a + b + c` is flattened into terms. The term that all others depend on is the *residual*; every other term
is a *branch*. The branch's region is its exclusive cone: what feeds the branch, is not an ancestor of the residual,
and is read by nothing outside. Parallel residuals (`x + attn(n) + mlp(n)`) and projection shortcuts (`conv(x) + downsample(x)`,
where the cheaper term takes the residual's place) are covered. If the terms share no ancestor (`dense(hidden) + input`),
the add is *open*: its meaning shows only when this module is traced together with its parent.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from surgery.tracing import CACHE_NAMES, GATES, has_side_effect

_ADD_FUNCTIONS = frozenset({operator.add, operator.iadd, torch.add})
_SUB_FUNCTIONS = frozenset({operator.sub, operator.isub, torch.sub, torch.subtract})
_FUSED = (torch.addcmul, torch.addcdiv, torch.lerp)
PACKED = "its weights are packed (quantized) and cannot be read; convert the model first, and quantize afterwards"
_SHAPE_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})
_SHAPE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "__len__"})
_VIEW_NAMES = (
    "view reshape view_as flatten unflatten squeeze unsqueeze permute transpose movedim t mT T expand expand_as chunk split "
    "unbind narrow select getitem getattr detach diagonal unfold"
)
_VIEWS = frozenset(_VIEW_NAMES.split())
_PRODUCTS = frozenset(
    {
        "linear",
        "matmul",
        "bmm",
        "mm",
        "einsum",
        "baddbmm",
        "addmm",
        "scaled_dot_product_attention",
        "conv1d",
        "conv2d",
        "conv3d",
    }
)
_SHORTCUT_DEPTH = 0.5  # a shortcut with more than this share of the branch's weight matrices is a second branch


@dataclass(slots=True)
class Region:
    """One branch inside a host's graph.

    Args:
        add: The add node that consumes the branch.
        term: The node whose value is the branch's output.
        residual: The node whose value is the residual stream.
        own: The exclusive cone.
        nodes: The cone with the shape reads and parameters that it needs (copied, not moved), in topological order.
        inputs: Nodes outside that it reads, in order of first use.
        escapes: Further outputs of a tuple-returning call in the cone that are read outside; None in every observed
            call.
    """

    add: fx.Node
    term: fx.Node
    residual: fx.Node
    own: set[fx.Node]
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    escapes: list[fx.Node] = field(default_factory=list)
    direct: bool = True
    """Whether the other terms depend on the residual; else it is only the lightest of them."""

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the modules that it calls, relative to the host."""
        return tuple(str(node.target) for node in self.nodes if node.op == "call_module")

    @property
    def anchor(self) -> tuple[str, ...]:
        """What identifies the region in another graph of the same host: calls and attributes."""
        return tuple(str(node.target) for node in self.nodes if node.op in ("call_module", "get_attr"))


@dataclass(slots=True)
class Findings:
    """What one graph holds: closed regions, open adds (with the reason), and rejected adds (with the reason)."""

    regions: list[Region] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


def find_regions(graph: fx.Graph, module: nn.Module) -> Findings:
    """Find every residual branch in `graph`, a trace of `module`."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    ancestors = _ancestors(graph)
    findings = Findings(rejected=_other_sums(graph, module))
    for root in graph.nodes:
        if not is_add(root) or _feeds_add_alone(root):
            continue
        terms = _terms(root)
        terms = [t for t in terms if _reads_values(t)]
        if len(terms) < 2:
            continue  # a position embedding or a bias, not a residual
        if len({id(t) for t in terms}) != len(terms):
            continue
        resolved = _residual(terms, ancestors, module)
        if isinstance(resolved, str):
            (findings.open if resolved.startswith("open") else findings.rejected).append(
                resolved if resolved.startswith("open") else (_label(terms[-1]), resolved)  # type: ignore[arg-type]
            )
            continue
        residual = resolved
        direct = _depend_on(residual, terms, ancestors)
        for term in sorted((t for t in terms if t is not residual), key=order.__getitem__):
            add = _consumer(term)
            region = _cone(term, add, residual, ancestors, order)
            if not isinstance(region, str) and not _works(region, module):
                if packed := _packed(region, module):
                    findings.rejected.append((packed, PACKED))
                continue  # an activation or a mask, nothing that anyone would expect in the table
            if isinstance(region, str):
                findings.rejected.append((_label(term), region))
                continue
            region.direct = direct
            shared = [one for one in findings.regions if one.own & region.own]
            if direct and all(not one.direct and one.own | {one.add} <= region.own for one in shared):
                findings.regions = [one for one in findings.regions if one not in shared]
            elif shared:
                findings.rejected.append((_label(term), "it shares work with another branch"))
                continue
            findings.regions.append(region)
    findings.regions.sort(key=lambda region: order[region.add])
    _part(findings, order)
    return findings


def _part(findings: Findings, order: dict[fx.Node, int]) -> None:
    """A further output of one branch's call (weights of attention) is an input of the branch that reads it. It is known after
    the sum: where it is read before that, the call is left alone.
    """
    for region in list(findings.regions):
        if any(_runs(user, findings, order) <= order[region.add] for one in region.escapes for user in one.users):
            findings.regions.remove(region)
            findings.rejected.append((_label(region.term), "its further output is read before its sum"))
    escapes = {node for region in findings.regions for node in region.escapes}
    for region in findings.regions:
        if region.own & escapes:
            region.own -= escapes
            region.nodes, region.inputs = _with_copies(region.own, order)


def _runs(node: fx.Node, findings: Findings, order: dict[fx.Node, int]) -> int:
    """Where a node runs: work of a branch is moved to its sum."""
    return next((order[region.add] for region in findings.regions if node in region.own), order[node])


def _other_sums(graph: fx.Graph, module: nn.Module) -> list[tuple[str, str]]:
    """Branches that come to the stream by other means than a plain sum, with the reason why they are none here."""
    found = []
    for node in graph.nodes:
        how = _how_added(node)
        if how and (branch := _branch_in(graph, node, module)) is not None:
            found.append((_label(branch), f"its result is {how}; only what is added as it is can be skipped"))
    return found


def _how_added(node: fx.Node) -> str:
    """By what other means than a plain sum a node may add to its first operand; "" where it does not."""
    if _is(node, _ADD_FUNCTIONS | _SUB_FUNCTIONS, "add", "add_", "sub", "sub_") and "alpha" in node.kwargs:
        return "added with a factor (`alpha`)"
    if _is(node, _SUB_FUNCTIONS, "sub", "sub_"):
        return "subtracted"
    if _is(node, _FUSED, *(f"{f.__name__}{end}" for f in _FUSED for end in ("", "_"))):
        return f"added by `{getattr(node.target, '__name__', node.target)}`"
    return ""


def _is(node: fx.Node, functions: Collection[Any], *methods: str) -> bool:
    if node.op == "call_method":
        return node.target in methods
    return node.op == "call_function" and node.target in functions


def _branch_in(graph: fx.Graph, node: fx.Node, module: nn.Module) -> fx.Node | None:
    """The operand that is work on the first one, if there is one."""
    stream, *others = node.args
    if not isinstance(stream, fx.Node):
        return None
    ancestors, order = _ancestors(graph), {node: index for index, node in enumerate(graph.nodes)}
    for other in (operand for operand in others if isinstance(operand, fx.Node)):
        region = _cone(other, node, stream, ancestors, order) if stream in ancestors[other] else ""
        if not isinstance(region, str) and _works(region, module):
            return other
    return None


def _packed(region: Region, module: nn.Module) -> str:
    """Name of a layer whose weights are packed, as those that torch's quantization makes; "" where there is none."""
    for name in region.calls:
        if any(hasattr(part, "_packed_params") for part in module.get_submodule(name).modules()):
            return name
    return ""


def _works(region: Region, module: nn.Module) -> bool:
    """Whether the region holds weights, or a product of tensors."""
    for node in region.nodes:
        if node.op == "call_module" and any(p.dim() > 1 for p in module.get_submodule(str(node.target)).parameters()):
            return True
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _PRODUCTS:
            return True
        if node.op == "call_method" and node.target in _PRODUCTS:
            return True
    return False


def is_add(node: fx.Node) -> bool:
    """Whether the node is a plain sum of two values."""
    if (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    ):
        operands = node.args
        return (
            len(operands) == 2
            and not node.kwargs
            and all(isinstance(a, fx.Node) for a in operands)
            and not any(_is_shape_expression(a) for a in operands if isinstance(a, fx.Node))
        )
    return False


def is_inplace_add(node: fx.Node) -> bool:
    """Whether an add writes into its left operand."""
    return node.target is operator.iadd or node.target == "add_"


def _feeds_add_alone(node: fx.Node) -> bool:
    return len(node.users) == 1 and is_add(next(iter(node.users)))


def _terms(root: fx.Node) -> list[fx.Node]:
    terms: list[fx.Node] = []
    for operand in root.args:
        assert isinstance(operand, fx.Node)
        if is_add(operand) and len(operand.users) == 1:
            terms += _terms(operand)
        else:
            terms.append(operand)
    return terms


def _consumer(term: fx.Node) -> fx.Node:
    return next(user for user in term.users if is_add(user))


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    result: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        found: set[fx.Node] = set()
        for source in node.all_input_nodes:
            found |= result[source]
            found.add(source)
        result[node] = found
    return result


def _residual(terms: list[fx.Node], ancestors: dict[fx.Node, set[fx.Node]], module: nn.Module) -> fx.Node | str:
    for term in terms:
        if _depend_on(term, terms, ancestors):
            return term
    if len(terms) != 2:
        return "open: several terms without one that all others depend on"
    first, second = terms
    common = {n for n in (ancestors[first] | {first}) & (ancestors[second] | {second}) if not _is_copyable(n)}
    if not any(node.op != "get_attr" for node in common):
        return "open: the terms share no ancestor"
    weights = [_matrices(ancestors[t] | {t}, common, module) for t in terms]
    light, heavy = (0, 1) if weights[0] <= weights[1] else (1, 0)
    if weights[heavy] == 0 or weights[light] > _SHORTCUT_DEPTH * weights[heavy]:
        return "two branches of similar size meet here and neither is a shortcut"
    return terms[light]


def _depend_on(term: fx.Node, terms: list[fx.Node], ancestors: dict[fx.Node, set[fx.Node]]) -> bool:
    """Whether all other terms depend on this one; Python's `sum` begins with `0 + x`."""
    stem: Any = term.args[1] if _is(term, {operator.add}) and term.args[0] == 0 else term
    return all(other is term or stem in ancestors[other] for other in terms)


def _matrices(nodes: Iterable[fx.Node], without: Collection[fx.Node], module: nn.Module) -> int:
    total = 0
    for node in nodes:
        if node in without:
            continue
        if node.op == "call_module":
            named = module.get_submodule(str(node.target)).named_parameters()
            total += sum(p.dim() > 1 for name, p in named if GATES not in name)
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            total += getattr(module.get_submodule(owner), name).dim() > 1
    return total


def _cone(
    term: fx.Node, add: fx.Node, residual: fx.Node, ancestors: dict[fx.Node, set[fx.Node]], order: dict[fx.Node, int]
) -> Region | str:
    if set(term.users) != {add}:
        return "its output is also used outside the add"
    if is_inplace_add(add):
        target = add.args[0]
        assert isinstance(target, fx.Node)
        late = [user for user in target.users if order[user] > order[add]]
        if late:
            return "the add writes into a tensor that is used afterwards"
    forbidden = ancestors[residual] | {residual}
    cone = {node for node in ancestors[term] | {term} if node not in forbidden and node.op != "placeholder"}
    escapes: set[fx.Node] = set()
    while True:
        leaving = {n for n in cone if not _is_copyable(n) and _read_outside(n, cone, add, escapes)}
        extra = {e for n in leaving for e in _tuple_escapes(n, cone, add)}
        if extra - escapes:
            escapes |= extra
            continue
        if not leaving:
            break
        cone -= leaving
        if term not in cone:
            return "its work is also used outside the branch"
    cone -= {n for n in cone if _is_copyable(n)}
    if all(node.op == "call_function" and node.target is operator.getitem for node in cone):
        return "nothing worth skipping is left in it"
    for node in sorted(cone, key=order.__getitem__):
        if why := _writes_outside(node, cone):
            return why
    escapes = {e for e in escapes if e.args[0] in cone}
    nodes, inputs = _with_copies(cone, order)
    return Region(add, term, residual, cone, nodes, inputs, sorted(escapes, key=order.__getitem__))


def _writes_outside(node: fx.Node, cone: set[fx.Node]) -> str:
    """Why a node cannot be left out: it changes what was not made inside the branch. A key/value cache is looked after
    elsewhere."""
    if node.op == "call_module" or not has_side_effect(node):
        return ""
    root = node.args[0] if node.args else None
    while isinstance(root, fx.Node) and root in cone and _is_view(root):
        root = root.args[0]
    if isinstance(root, fx.Node) and (root in cone or root.name in CACHE_NAMES):
        return ""
    changed = isinstance(root, fx.Node) and root.op != "get_attr"
    return "it changes its input in place" if changed else "it has a side effect"


def _is_view(node: fx.Node) -> bool:
    """Whether a node may give the memory of its first argument."""
    name = getattr(node.target, "__name__", str(node.target))
    return node.op in ("call_method", "call_function") and (name in _VIEWS or has_side_effect(node)) and bool(node.args)


def _read_outside(node: fx.Node, cone: set[fx.Node], add: fx.Node, escapes: set[fx.Node]) -> bool:
    for user in node.users:
        if user is add or user in escapes:
            continue
        if _is_copyable(user):
            if _read_outside(user, cone, add, escapes):
                return True
        elif user not in cone:
            return True
    return False


def _tuple_escapes(node: fx.Node, cone: set[fx.Node], add: fx.Node) -> set[fx.Node]:
    """Elements k >= 1 of a call's tuple (or all of these) that are read outside, if nothing else is."""
    if node.op != "call_module":
        return set()
    outside = {u for u in node.users if u not in cone and u is not add}
    element = all(
        u.op == "call_function"
        and u.target is operator.getitem
        and (is_rest(u) or (type(u.args[1]) is int and u.args[1] >= 1))
        for u in outside
    )
    return outside if outside and element else set()


def is_rest(node: fx.Node) -> bool:
    """Whether the node is what follows the first element of a tuple, `outputs[1:]`."""
    return node.target is operator.getitem and node.args[1] == slice(1, None, None)


def or_nothing(rest: tuple[object, ...] | None) -> tuple[object, ...]:
    """What follows the first element of a tuple, of which a skipped branch makes nothing."""
    return () if rest is None else rest


def _with_copies(cone: set[fx.Node], order: dict[fx.Node, int]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Add the parameters and shape reads that the cone needs; list what it then reads from outside."""
    nodes, stack = set(cone), list(cone)
    inputs: list[fx.Node] = []
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in nodes:
                continue
            if source.op == "get_attr" or _is_shape_expression(source):
                nodes.add(source)
                stack.append(source)
    ordered = sorted(nodes, key=order.__getitem__)
    for node in ordered:
        inputs += [source for source in node.all_input_nodes if source not in nodes and source not in inputs]
    return ordered, inputs


def _reads_values(node: fx.Node) -> bool:
    """Whether the node depends on an argument by more than its shape (a position table made for a shape does not)."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen or _is_shape_expression(current):
            continue
        if current.op == "placeholder":
            return True
        seen.add(current)
        stack += current.all_input_nodes
    return False


def _is_copyable(node: fx.Node) -> bool:
    return node.op == "get_attr" or _is_shape_expression(node)


def _is_shape_expression(node: fx.Node) -> bool:
    """A read of a shape, dtype or device, an element of it, or arithmetic on such elements."""
    if node.op == "call_function":
        if node.target is getattr:
            return node.args[1] in _SHAPE_ATTRIBUTES
        if node.target is len:
            return True
        if getattr(node.target, "__module__", "") in ("_operator", "operator") and node.all_input_nodes:
            return all(_is_shape_expression(source) for source in node.all_input_nodes)
    return node.op == "call_method" and node.target in _SHAPE_METHODS


def _label(node: fx.Node) -> str:
    seen = [node]
    while seen:
        current = seen.pop(0)
        if current.op == "call_module":
            return str(current.target)
        seen += current.all_input_nodes
    return node.name
