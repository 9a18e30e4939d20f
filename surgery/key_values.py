"""Keys and values alone: all that a token which skips attention owes to the cache.

The attention module's own `forward` is traced up to the point where it updates the cache, and everything that the update
does not need is left out: the query map, its norm and its rotation. What is left is ordinary generated code without
hooks. The first call of every pattern also runs the module itself up to its update and compares; where the two differ,
or it cannot be traced, the caller has to run the module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.counting import uncounted
from surgery.errors import TraceError
from surgery.generating import function_of
from surgery.patterns import Pattern, Signature, pattern_of, signature_of
from surgery.tracing import CACHE_NAMES, DTYPE, base_class, has_side_effect, is_autocast, is_watched, new_graph, trace

logger = logging.getLogger(__name__)
Update = tuple[Sequence[Any], Mapping[str, Any]]


class KeyWriter:
    """Writes keys and values of one attention module.

    Args:
        name: The module's name in its host.
        arguments: Generated function: host and inputs of the branch -> positional and named arguments of the module.
    """

    def __init__(self, name: str, arguments: Callable[..., Update]) -> None:
        self.name, self.arguments = name, arguments
        self.signature: Signature | None = None
        self.programs: dict[Pattern, Callable[..., Update] | None] = {}

    def write(self, host: nn.Module, inputs: Sequence[Any]) -> bool:
        """Update the cache of one call of the branch.

        Returns:
            Whether it was done; if not, nothing happened.
        """
        module = host.get_submodule(self.name)
        if is_watched(module) or is_autocast(module):
            return False
        args, kwargs = self.arguments(host, *inputs)
        signature = self.signature = self.signature or signature_of(base_class(module))
        values, extra, rest = signature.bind(tuple(args), kwargs)
        caches = [v for p, v in zip(signature.named, values, strict=True) if p.name in CACHE_NAMES and v is not None]
        caches += [value for name, value in rest.items() if name in CACHE_NAMES and value is not None]
        if len(caches) != 1 or hasattr(caches[0], "is_updated"):  # an encoder-decoder's holds two caches
            return False
        pattern = pattern_of(values, extra, rest)
        call = (module, *values, *extra, *[rest[name] for name in sorted(rest)])
        if pattern not in self.programs:
            program = self.programs[pattern] = key_program(module, signature, pattern)
            with uncounted():
                agrees = program is None or _same(program(*call), update_of(module, args, kwargs, caches[0]))
            if not agrees:
                logger.info("%s: keys and values alone are not what its forward writes; it runs", self.name)
                self.programs[pattern] = None
        program = self.programs[pattern]
        if program is None:
            return False
        given, named = program(*call)
        caches[0].update(*given, **named)
        return True


def key_program(module: nn.Module, signature: Signature, pattern: Pattern) -> Callable[..., Update] | None:
    """A function of the module and its arguments that gives what it calls its cache's `update` with; None where its
    `forward` cannot be traced up to there.
    """
    try:
        source = trace(module, pattern, until_cached=True)
        if DTYPE in source.output_node().meta:
            raise TraceError("what it computes depends on the dtype of its input")
        graph = _needed(source, signature, pattern)
    except TraceError as error:
        logger.info("%s: keys and values are not written alone: %s", base_class(module).__name__, error)
        return None
    program: Callable[..., Update] = function_of(graph, "_keys", f"<surgery keys of {base_class(module).__name__}>")
    return program


def update_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], cache: Any) -> Update | None:
    """What a call of the module updates its cache with; the cache stays as it is. None if it updates none."""
    probe = _probe(cache)
    try:
        module(
            *(probe if v is cache else v for v in args), **{k: probe if v is cache else v for k, v in kwargs.items()}
        )
    except _Reached as reached:
        return reached.update
    return None


class _Reached(Exception):
    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update


def _probe(cache: Any) -> Any:
    """A stand-in for a cache: the same state, but an update ends the call."""

    def update(self: Any, *args: Any, **kwargs: Any) -> None:
        raise _Reached((args, kwargs))

    cls = type(type(cache).__name__, (type(cache),), {"update": update})
    probe: Any = object.__new__(cls)
    probe.__dict__.update(cache.__dict__)
    return probe


def _needed(source: fx.Graph, signature: Signature, pattern: Pattern) -> fx.Graph:
    """What the output depends on, with all arguments of the call as placeholders.

    Raises:
        TraceError: If something that is left out changes a value in place.
    """
    needed: set[fx.Node] = set()
    stack = [source.output_node()]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    for node in source.nodes:
        if node not in needed and node.op != "call_module" and has_side_effect(node):
            raise TraceError(f"{node.target} changes something on the way")
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    given = {str(node.target): node for node in source.nodes if node.op == "placeholder"}
    for name in signature.names(pattern):
        placeholder = graph.placeholder(name)
        if name in given:
            env[given[name]] = placeholder
    for node in source.nodes:
        if node in needed and node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    return graph


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two updates are bit-equal."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    return type(ours) is type(theirs) and bool(ours == theirs)
