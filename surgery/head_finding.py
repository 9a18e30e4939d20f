"""Where the heads of an attention are, found by autograd in one recorded call and proved by leaving some out.

Axis letters: as in `surgery.heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from surgery.heads import (
    PARTS,
    ActiveHeads,
    HeadRoles,
    HeadRows,
    WeighedHeads,
    computes_plainly,
    zeroed,
)
from surgery.operators import ATTENTION, WHOLE

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
_COARSE = 5e-2  # of half precision


class Unfit(Exception):
    """Why the heads of an attention cannot be decided; never leaves this module."""


def find_heads(
    run: Callable[[], Tensor], value: Tensor, parameters: Mapping[str, Tensor], *, keep_keys: bool
) -> HeadRoles | str:
    """Find the heads of a branch.

    Args:
        run: Runs the branch on two samples or more.
        value: What it gave, batch first.
        parameters: Name -> parameter of the branch's modules.
        keep_keys: Whether it writes a key/value cache, so that keys and values of all heads are made.

    Returns:
        The roles, proved by running with random decisions; or the reason why there are none.
    """
    recorder = _Recorder()
    with torch.enable_grad(), recorder:
        run()
    try:
        with torch.enable_grad():
            roles = _roles(recorder, len(value), {id(p): name for name, p in parameters.items()}, keep_keys)
        _prove(run, value, roles, [parameters[name] for name in roles.names], keep_keys)
    except Unfit as reason:
        return str(reason)
    return roles


def _prove(
    run: Callable[[], Tensor], value: Tensor, roles: HeadRoles, parameters: Sequence[Tensor], keep_keys: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    for rate in (0.5, 0.25):
        decisions = torch.rand((len(value), roles.count), generator=generator) < rate
        decisions[0, 0], decisions[0, -1] = True, False
        decisions[-1, 0], decisions[-1, -1] = False, True
        decisions = decisions.to(value.device)
        with torch.no_grad():
            with WeighedHeads(roles, parameters, zeroed(decisions), len(value)) as reference:
                expected = run()
            with ActiveHeads(roles, parameters, decisions, keep_keys=keep_keys) as mode:
                found = run()
        if not (reference.done and mode.done):
            raise Unfit("its output projection is no plain linear map")
        limit = _TOLERANCE.get(value.dtype, _COARSE) * float(value.nan_to_num().abs().max().clamp_min(1e-12))
        if found.shape != expected.shape or float((found - expected).nan_to_num().abs().max()) > limit:
            raise Unfit("active heads alone give another result")


@dataclass(slots=True)
class _Linear:
    """One linear map that ran: its input, its weight, and its output cut off the graph."""

    x: Tensor
    weight: Tensor
    leaf: Tensor


@dataclass(slots=True)
class _Product:
    """One attention product: its operands, its output cut off the graph, and the linear maps that ran before it."""

    parts: tuple[Tensor, Tensor, Tensor]
    leaf: Tensor
    after: int


@dataclass
class _Recorder(TorchFunctionMode):
    """Notes linear maps and attention products; cuts the graph after each, so that gradients show what feeds directly."""

    linears: list[_Linear] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)
    wholes: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and note it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            leaf = output.detach().requires_grad_()
            self.linears.append(_Linear(named["input"], named["weight"], leaf))
            return leaf
        if func is ATTENTION:
            named = dict(zip(PARTS, args, strict=False)) | kwargs
            leaf = output.detach().requires_grad_()
            self.products.append(_Product((named["query"], named["key"], named["value"]), leaf, len(self.linears)))
            return leaf
        if func is WHOLE:
            self.wholes.append((args, kwargs))
        return output


def _roles(recorder: _Recorder, samples: int, names: Mapping[int, str], keep_keys: bool) -> HeadRoles:
    if len(recorder.wholes) == 1 and not recorder.products:
        return _whole_roles(*recorder.wholes[0], names)
    if not recorder.products:
        raise Unfit("it does not call scaled_dot_product_attention (its attention product is written out)")
    if len(recorder.products) != 1:
        raise Unfit(f"{len(recorder.products)} attention products instead of 1")
    product = recorder.products[0]
    query, key, value = product.parts
    if query.dim() != 4 or query.shape[0] % samples:
        raise Unfit("samples, heads and tokens are folded into one axis of its attention product")
    before = recorder.linears[: product.after]
    sources = [_source(part, before, what) for part, what in zip(product.parts, PARTS, strict=True)]
    heads, dims = query.shape[1], (query.shape[3], key.shape[3], value.shape[3])
    count = int(sources[1][1].sum()) // dims[1]
    if count == 0 or heads % count or key.shape[1] % count:
        raise Unfit("its keys are not one block of columns per head")
    if count < 2:
        raise Unfit("one key/value head serves all queries" if heads > 1 else "it has a single head")
    each = heads // count
    sizes = (each * dims[0], dims[1], dims[2])
    rows = query_rows, key_rows, value_rows = [
        _head_rows(names, linear.weight, columns, count, size, what)
        for (linear, columns), size, what in zip(sources, sizes, PARTS, strict=True)
    ]
    output = _output(product.leaf, recorder.linears[product.after :])
    if id(output.weight) not in names:
        raise Unfit("its output projection is outside the branch")
    moved = [
        _only_moved(part, linear.leaf, one) for part, (linear, _), one in zip(product.parts, sources, rows, strict=True)
    ]
    width = each * dims[2]
    flops = sum(
        2 * _positions(linear.x) // samples * one.size * linear.weight.shape[1]
        for (linear, _), one, what in zip(sources, rows, PARTS, strict=True)
        if what == "query" or not keep_keys
    )
    windows = query.shape[0] // samples
    flops += 2 * windows * each * query.shape[2] * key.shape[2] * (dims[0] + dims[2])
    flops += 2 * _positions(output.x) // samples * width * len(output.weight)
    moves = all(moved) and _nothing_else(sources, rows)
    output_name = names[id(output.weight)]
    return HeadRoles(count, query_rows, key_rows, value_rows, output_name, width, moves, flops)


def _whole_roles(args: Any, kwargs: Mapping[str, Any], names: Mapping[int, str]) -> HeadRoles:
    if not computes_plainly(args, kwargs):
        raise Unfit("torch's MultiheadAttention is called with separate projections, extra keys, or for its weights")
    query, key, _, width, heads, weight, *_ = args
    output = args[11]
    if id(weight) not in names or id(output) not in names:
        raise Unfit("its projections are outside the branch")
    if heads < 2:
        raise Unfit("it has a single head")
    dim = width // heads
    query_rows, key_rows, value_rows = (
        HeadRows(names[id(weight)], tuple(first + head * dim for head in range(heads)), dim)
        for first in (0, width, 2 * width)
    )
    tokens, keys = query.shape[0], key.shape[0]
    flops = 2 * width * dim * (tokens + 2 * keys) + 4 * tokens * keys * dim + 2 * tokens * dim * width
    return HeadRoles(heads, query_rows, key_rows, value_rows, names[id(output)], dim, True, int(flops))


def _source(part: Tensor, before: Sequence[_Linear], what: str) -> tuple[_Linear, Tensor]:
    """The linear map that feeds `part`, and which of its columns do."""
    found = [(linear, columns) for linear in before if (columns := _columns(part, linear.leaf)) is not None]
    if len(found) != 1:
        raise Unfit(f"its {_many(what)} come from {len(found) or 'no'} linear maps instead of 1")
    linear, columns = found[0]
    first = _columns(part[:, 0], linear.leaf)
    if first is not None and int(first.sum()) > part.shape[-1]:
        raise Unfit(f"its {_many(what)} depend on those of other heads (a norm over all heads)")
    return linear, columns


def _columns(part: Tensor, leaf: Tensor) -> Tensor | None:
    """Which columns of `leaf` feed `part`, bool; None where none does."""
    if not part.requires_grad:
        return None
    weights = torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(part)
    gradient = torch.autograd.grad((part * weights).sum(), leaf, retain_graph=True, allow_unused=True)[0]
    return None if gradient is None else gradient.reshape(-1, gradient.shape[-1]).abs().sum(0) > 0


def _head_rows(names: Mapping[int, str], weight: Tensor, columns: Tensor, count: int, size: int, what: str) -> HeadRows:
    """Heads are either blocks of one run of columns, or a run each."""
    if id(weight) not in names:
        raise Unfit(f"its {_many(what)} are made outside the branch")
    used = columns.nonzero().flatten().tolist()
    runs = [i for i, column in enumerate(used) if i == 0 or column != used[i - 1] + 1]
    if len(used) == count * size and len(runs) == 1:
        starts = tuple(used[0] + head * size for head in range(count))
    elif len(used) == count * size and runs == list(range(0, len(used), size)):
        starts = tuple(used[i] for i in runs)
    else:
        raise Unfit(f"the columns that make the {_many(what)} of a head do not follow each other")
    return HeadRows(names[id(weight)], starts, size)


def _output(product: Tensor, after: Sequence[_Linear]) -> _Linear:
    """The output projection: it reads the heads of the attention product side by side."""
    for linear in after:
        if not linear.x.requires_grad:
            continue
        fed = torch.autograd.grad(linear.x.sum(), product, retain_graph=True, allow_unused=True)[0]
        if fed is None:
            continue
        heads = product.transpose(1, 2).flatten(2)  # N T H*D
        if linear.x.numel() != heads.numel() or not torch.equal(linear.x.reshape(heads.shape), heads):
            raise Unfit("something stands between the attention product and the output projection (a norm or a gate)")
        return linear
    raise Unfit("no output projection follows its attention product")


def _only_moved(part: Tensor, leaf: Tensor, rows: HeadRows) -> bool:
    """Whether `part` `(B, H, T, D)` holds the columns of `leaf` `(B, T, C)` as they are, repeated for groups at most."""
    if leaf.dim() != 3 or leaf.shape[:2] != (part.shape[0], part.shape[2]):
        return False
    columns = [row for start in rows.starts for row in range(start, start + rows.size)]
    heads = leaf[..., columns].unflatten(-1, (-1, part.shape[3])).transpose(1, 2)
    if part.shape[1] % heads.shape[1]:
        return False
    return torch.equal(part, heads.repeat_interleave(part.shape[1] // heads.shape[1], 1))


def _nothing_else(sources: Sequence[tuple[_Linear, Tensor]], rows: Sequence[HeadRows]) -> bool:
    """Whether all rows of the linear maps make queries, keys or values."""
    for linear, _ in sources:
        used = sum(len(one.starts) * one.size for other, one in zip(sources, rows, strict=True) if other[0] is linear)
        if used != len(linear.weight):
            return False
    return True


def _positions(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _many(what: str) -> str:
    return {"query": "queries", "key": "keys", "value": "values"}[what]
