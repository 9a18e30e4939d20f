"""Attention for some query tokens of one sample, as ordinary generated code.

`surgery.queries` watches calls while the module's own `forward` runs, so that what it passes on keeps its full length.
With few tokens that costs more than it saves. Here the module's `forward` is traced and its graph cut at the attention
product: keys, values and the mask are made as they are, and everything that leads to queries or follows the product is
made from the active rows of the inputs. The first call of every pattern also runs the module itself and compares; where
the two differ, or it cannot be traced, the caller goes on as before.

Axis letters: `T` tokens, `S` keys, `K` active rows, `H` heads, `D` channels of a head, `C` channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.counting import uncounted
from surgery.errors import TraceError
from surgery.generating import function_of
from surgery.operators import ATTENTION
from surgery.patterns import Pattern, Signature, pattern_of, signature_of
from surgery.tracing import DTYPE, base_class, has_side_effect, is_watched, new_graph, remove_dead_code, trace

logger = logging.getLogger(__name__)
_MAPS = frozenset({F.linear, torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm})


class QueryRows:
    """Runs one attention branch for active query tokens.

    Args:
        name: The attention module's name in its host.
        arguments: Generated function: host and inputs of the branch -> positional and named arguments of the module.
        rest: Generated function: host and the module's output -> the branch's output.
    """

    def __init__(self, name: str, arguments: Callable[..., Any], rest: Callable[..., Any]) -> None:
        self.name, self.arguments, self.rest = name, arguments, rest
        self.signature: Signature | None = None
        self.programs: dict[Pattern, Callable[..., Any] | None] = {}

    def run(self, host: nn.Module, inputs: Sequence[Any], index: Tensor, tokens: int) -> Any:
        """The branch's output with rows `index` alone, `(1, K, C)`; None where it has to be made in another way.

        Args:
            host: The module that the branch belongs to.
            inputs: Inputs of the branch, of one sample.
            index: Active tokens, int64 `(K,)`, at least one.
            tokens: `T`, at least two.
        """
        module = host.get_submodule(self.name)
        if module.training or is_watched(module):
            return None
        args, kwargs = self.arguments(host, *inputs)
        signature = self.signature = self.signature or signature_of(base_class(module))
        values, extra, rest = signature.bind(tuple(args), kwargs)
        pattern = pattern_of(values, extra, rest)
        if pattern in self.programs and self.programs[pattern] is None:
            return None
        call = (module, index, tokens, *values, *extra, *[rest[name] for name in sorted(rest)])
        if pattern not in self.programs:
            program = rows_program(module, signature, pattern)
            with uncounted(), torch.no_grad():
                agrees = program is not None and _agrees(program, call, module(*args, **kwargs), index)
            self.programs[pattern] = program if agrees else None
        program = self.programs[pattern]
        return None if program is None else self.rest(host, program(*call))


def rows_program(module: nn.Module, signature: Signature, pattern: Pattern) -> Callable[..., Any] | None:
    """A function of the module, active tokens, `T` and the module's arguments that gives its output for these tokens; None
    where its `forward` cannot be traced or cut.
    """
    try:
        source = trace(module, pattern, many_tokens=True)
        if DTYPE in source.output_node().meta:
            raise TraceError("what it computes depends on the dtype of its input")
        graph = _cut(source, signature, pattern)
    except TraceError as error:
        logger.info("%s: no generated code for active query tokens: %s", base_class(module).__name__, error)
        return None
    program: Callable[..., Any] = function_of(graph, "_rows", f"<surgery rows of {base_class(module).__name__}>")
    return program


def take_rows(value: Any, index: Tensor, tokens: int) -> Any:
    """Active rows of an argument, along the axis that holds tokens; what has none stays."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    axis = 1 if value.dim() == 2 else value.dim() - 2
    return value.index_select(axis, index) if value.shape[axis] == tokens else value


def attend_rows(
    index: Tensor,
    tokens: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Tensor:
    """`scaled_dot_product_attention` of active queries `(1, H, K, D)` with all keys and values `(1, H, S, D)`."""
    if is_causal:
        attn_mask = torch.arange(key.shape[-2], device=key.device) <= index[:, None]  # K S
    elif attn_mask is not None and attn_mask.dim() >= 2 and attn_mask.shape[-2] == tokens:
        attn_mask = attn_mask.index_select(-2, index)
    return ATTENTION(query, key, value, attn_mask, dropout_p, **rest)


def _cut(source: fx.Graph, signature: Signature, pattern: Pattern) -> fx.Graph:
    """The traced graph with active rows alone for queries and for what follows the attention product.

    Raises:
        TraceError: If there is not one attention product, or queries cannot be made apart from keys and values.
    """
    products = [node for node in source.nodes if node.op == "call_function" and node.target is ATTENTION]
    if len(products) != 1:
        raise TraceError(f"{len(products)} attention products instead of 1")
    product = products[0]
    query = product.args[0] if product.args else product.kwargs["query"]
    others = [node for node in product.all_input_nodes if node is not query]
    whole = _behind(others, {})
    # sizes of keys and values are those of all of them
    sizes = [n for n in source.nodes if _reads_shape(n) and n.args[0] in whole and n.args[0].op != "placeholder"]
    whole |= set(sizes)
    short = _behind([source.output_node()], {product: [query], **{node: [] for node in sizes}}) - set(sizes)
    if any(has_side_effect(node) for node in source.nodes if node.op != "output"):
        raise TraceError("it changes a value in place")
    if any(_is_map(node) for node in whole & short):
        raise TraceError("one map makes queries together with keys or values")
    graph = new_graph()
    index, tokens = graph.placeholder("active_tokens"), graph.placeholder("token_count")
    kinds = dict(zip(signature.names(pattern), _kinds(pattern), strict=True))
    given = {str(node.target): node for node in source.nodes if node.op == "placeholder"}
    full: dict[fx.Node, fx.Node] = {}
    rows: dict[fx.Node, fx.Node] = {}
    for name in kinds:
        placeholder = graph.placeholder(name)
        if name in given:
            full[given[name]] = placeholder
    for name, node in given.items():
        if node in short and kinds[name].startswith("tensor:"):
            rows[node] = graph.call_function(take_rows, (full[node], index, tokens))
        else:
            rows[node] = full[node]
    for node in source.nodes:
        if node.op == "placeholder":
            continue
        if node in whole:
            full[node] = graph.node_copy(node, full.__getitem__)
        if node is product:
            args = fx.map_arg(node.args, lambda n: rows[n] if n is query else full[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: rows[n] if n is query else full[n])
            rows[node] = graph.call_function(attend_rows, (index, tokens, *args), kwargs)
        elif node in short:
            rows[node] = graph.node_copy(node, rows.__getitem__)
        elif node in whole:
            rows[node] = full[node]
    remove_dead_code(graph)
    return graph


def _kinds(pattern: Pattern) -> list[str]:
    return [*pattern.named, *pattern.extra, *(kind for _, kind in pattern.keywords)]


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def _behind(ends: Sequence[fx.Node], instead: Mapping[fx.Node, Sequence[fx.Node]]) -> set[fx.Node]:
    """The nodes that `ends` depend on, and themselves; of the keys of `instead` only what its values name."""
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += instead.get(node, node.all_input_nodes)
    return found


def _is_map(node: fx.Node) -> bool:
    """Whether it is worth not to be done twice."""
    return node.op == "call_module" or (node.op == "call_function" and node.target in _MAPS)


def _agrees(program: Callable[..., Any], call: Sequence[Any], expected: Any, index: Tensor) -> bool:
    """Whether a program gives what its module gives."""
    try:
        if _same(program(*call), expected, index):
            return True
        reason: object = "they give another result"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # the module counts on all tokens
        reason = error
    logger.info("%s: no generated code for active query tokens: %s", type(call[0]).__name__, reason)
    return False


def _same(ours: Any, theirs: Any, index: Tensor) -> bool:
    """Whether our output is that of the module at active tokens; further outputs must not be tensors."""
    if isinstance(theirs, (tuple, list)):
        if not isinstance(ours, (tuple, list)) or len(ours) != len(theirs):
            return False
        further = zip(ours[1:], theirs[1:], strict=True)
        if any(isinstance(other, Tensor) or type(own) is not type(other) for own, other in further):
            return False
        ours, theirs = ours[0], theirs[0]
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor) and theirs.dim() == 3):
        return False
    expected = theirs.index_select(1, index)
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    tolerance = 2e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    largest = float(expected.nan_to_num().abs().max().clamp_min(1e-12))
    return float((ours - expected).nan_to_num().abs().max()) <= tolerance * largest
