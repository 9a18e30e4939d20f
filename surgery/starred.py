"""Sizes that are unpacked while tracing: `q.view(*q.shape[:-1], heads, width)` of a value whose rank nobody knows.

Python asks for the sizes one by one. It gets one object that stands for all of them, and the call is recorded with the sum of
sizes in the place of its arguments, `q.view(q.shape[:-1] + (heads, width))`.
"""

from __future__ import annotations

import dis
import operator
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import fx

_UNPACKING = ("LIST_EXTEND", "CALL_FUNCTION_EX")  # `f(*a, b)`, `(*a, b)`; `f(*a)`
_METHODS = ("view", "reshape", "expand", "repeat", "tile", "new_zeros", "new_ones", "new_empty")


class Starred:
    """Stands for all sizes that a node holds."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


def is_unpacked(frame: FrameType | None) -> bool:
    """Whether the frame is about to unpack what it iterates over into arguments, a tuple or a list."""
    return frame is not None and dis.opname[frame.f_code.co_code[frame.f_lasti]] in _UNPACKING


def holds_sizes(node: fx.Node) -> bool:
    """Whether a node is `x.shape`, `x.size()` or a slice of it."""
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], slice):
        return isinstance(node.args[0], fx.Node) and holds_sizes(node.args[0])
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.op == "call_function" and node.target is getattr and node.args[1:] == ("shape",)


def with_sizes(kind: str, target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a method that takes sizes one by one, with one tuple of them where some are starred."""
    if kind == "call_method" and target in _METHODS and any(isinstance(arg, Starred) for arg in args[1:]):
        return args[0], args[1:]
    return args


def joined(values: Sequence[Any], add: Callable[[Any, Any], Any]) -> Any:
    """A tuple in which some values stand for several, as a sum of tuples."""
    parts: list[Any] = []
    for value in values:
        if isinstance(value, Starred):
            parts.append(value.node)
        elif parts and isinstance(parts[-1], tuple):
            parts[-1] = (*parts[-1], value)
        else:
            parts.append((value,))
    total = parts[0]
    for part in parts[1:]:
        total = add(total, part)
    return total
