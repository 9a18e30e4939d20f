"""Branches: what a generated `forward` hands to a gate, and how a branch's inputs are cut.

Axis letters: `N` samples, `T` tokens, `C` channels, `K` active rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from surgery.key_values import KeyWriter
from surgery.query_rows import QueryRows
from surgery.sites import RegionInput

Owners = tuple[tuple[nn.Module, str] | None, ...]
"""Module and name of the parameters that make queries and project the output; None where one is unknown; () without
roles.
"""


class Branch(Protocol):
    """A generated function that runs one branch. Attributes are set by `surgery.programs`."""

    axes: tuple[RegionInput, ...] | None
    """How to cut each input, or None where this call pattern was never probed."""
    escapes: int
    """Number of further outputs; the branch then returns a tuple."""
    stateful: bool
    """Whether it writes a key/value cache in this call pattern, so that it must run whatever is decided."""
    inplace: bool
    """Whether the original sum was written into the branch's output (`x += shortcut`)."""
    first: bool
    """Whether the branch is the left operand of the original sum (`branch(x) + x`)."""

    keys: KeyWriter | None
    """Writes its keys and values alone, where that is known; then it has no further outputs."""
    rows: QueryRows | None
    """Runs it for some query tokens of one sample, where that is known."""

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
    first: bool = False
    keys: KeyWriter | None = None
    rows: QueryRows | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        """Fold, run, unfold."""
        lead = next(value.shape[:2] for value in inputs if isinstance(value, Tensor) and value.dim() == 3)
        folded = [v.flatten(0, 1) if isinstance(v, Tensor) and v.dim() == 3 else v for v in inputs]
        output: Tensor = self.branch(*folded)
        return output.unflatten(0, lead)


@dataclass(slots=True)
class Turned:
    """A branch on `(T, N, C)`, called with `(N, T, C)`."""

    branch: Branch
    axes: tuple[RegionInput, ...] | None
    escapes: int
    stateful: bool
    inplace: bool
    first: bool
    keys: KeyWriter | None = None
    rows: QueryRows | None = None

    @classmethod
    def of(cls, branch: Branch, axes: tuple[RegionInput, ...] | None) -> Turned:
        """The branch whose inputs are cut along these axes."""
        return cls(branch, axes, branch.escapes, branch.stateful, branch.inplace, branch.first)

    def __call__(self, *inputs: Any) -> Any:
        """Turn to what the branch reads, run, turn back."""
        output = self.branch(*turn(inputs, turns(self.axes, inputs)))
        if self.escapes:
            return output[0].transpose(0, 1), *output[1:]
        return output.transpose(0, 1)


def turns(axes: tuple[RegionInput, ...] | None, inputs: Sequence[Any]) -> list[bool]:
    """Which inputs of a branch the gate sees as `(N, T, ...)` and the branch reads as `(T, N, ...)`."""
    return [False] * len(inputs) if axes is None else [a.sequence_first for a in axes]


def turn(values: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    """`(T, N, ...)` -> `(N, T, ...)` and back, where a tensor is to be turned; what is the same stays the same."""
    made = {
        id(v): v.transpose(0, 1) for v, turned in zip(values, which, strict=True) if turned and isinstance(v, Tensor)
    }
    return [made[id(v)] if turned and id(v) in made else v for v, turned in zip(values, which, strict=True)]


def unfold(values: Sequence[Any], samples: int, rows: int) -> list[Any]:
    """`(N * T, C)` -> `(N, T, C)`; anything else stays, and what is the same stays the same."""
    made = {id(value): _unfold(value, samples, rows) for value in values}
    return [made[id(value)] for value in values]


def _unfold(value: Any, samples: int, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() == 2 and len(value) == rows:
        return value.unflatten(0, (samples, rows // samples))
    return value


def split_outputs(branch: Branch, output: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """A branch's value, and its further outputs."""
    if branch.escapes:
        return output[0], tuple(output[1:])
    return output, ()


def added(branch: Branch, left: Tensor | None, value: Tensor) -> Tensor:
    """The sum, operands in the order of the original: the left one decides how the result lies in memory, and that how later
    layers round.
    """
    if left is None:
        return value
    return value + left if branch.first else left + value


def parts(value: Any) -> list[Any] | None:
    """What a tuple, list, dict, named tuple or dataclass holds; None where a value is one piece."""
    if isinstance(value, (tuple, list)):
        return list(value)
    if type(value) is dict:
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value) if field.init]
    return None


def rebuilt(value: Any, held: Sequence[Any]) -> Any:
    """A value like this one that holds something else."""
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(held)
    if isinstance(value, (tuple, list)):
        return type(value)(held)
    if type(value) is dict:
        return dict(zip(value, held, strict=True))
    names = [field.name for field in dataclasses.fields(value) if field.init]
    return dataclasses.replace(value, **dict(zip(names, held, strict=True)))


def take_samples(value: Any, axes: RegionInput, index: Tensor | slice, size: int) -> Any:
    """The samples that `index` names, along the input's batch axis; what is shared (or has length 1 there) stays."""
    held = parts(value)
    if held is not None:
        return rebuilt(value, [take_samples(item, axes, index, size) for item in held])
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


def choose(
    condition: Tensor, then: Callable[..., Tensor], otherwise: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> Tensor:
    """`then(*operands)` where the 0-d `condition` holds, else `otherwise(*operands)`.

    A program that is being captured gets both (`torch.cond`); a running one looks at the value.
    """
    if torch.compiler.is_compiling():
        return torch.cond(condition, then, otherwise, operands)
    return (then if bool(condition) else otherwise)(*operands)
