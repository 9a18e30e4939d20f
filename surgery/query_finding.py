"""Which linear maps of an attention make queries and project its output: found by autograd in one call, proved by running.

Axis letters: as in `surgery.queries`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from surgery.operators import ATTENTION, PRODUCTS, TRANSPOSED, WHOLE, linear_arguments
from surgery.queries import ActiveQueries, QueryRoles, Rows


def find_roles(
    run: Callable[[], tuple[Tensor, Sequence[Any]]],
    value: Tensor,
    parameters: Mapping[str, Tensor],
    further: Sequence[Any] = (),
) -> QueryRoles | str:
    """Find who makes queries and who projects the output, from one recorded call of a branch.

    Args:
        run: Runs the branch on inputs `(N, T, C)` and gives its value and its further outputs.
        value: What it gave, `(N, T, C)`.
        parameters: Name -> parameter of the branch's modules.
        further: Its further outputs, which must come out the same whatever is active.

    Returns:
        The roles, checked by running with random decisions; or the reason why there are none.
    """
    recorder = _Recorder()
    with torch.enable_grad():
        with recorder:
            run()
        found = _roles(recorder, value.shape[:2], parameters)
    if isinstance(found, str):
        return found
    reason = ""
    for roles in _orders(found):
        why = _check(roles, run, value, parameters, further)
        if not why:
            return roles
        reason = reason or why
    return reason


def _orders(roles: QueryRoles) -> Iterator[QueryRoles]:
    """The roles as found, then with flattened rows the other way round: only running them can tell."""
    yield roles
    for query, output in (("NT", "NT"), ("TN", "TN"), ("NT", "TN"), ("TN", "NT")):
        other = replace(roles, query_rows=query, output_rows=output)  # type: ignore[arg-type]
        if other != roles:
            yield other


def _check(
    roles: QueryRoles,
    run: Callable[[], tuple[Tensor, Sequence[Any]]],
    value: Tensor,
    parameters: Mapping[str, Tensor],
    further: Sequence[Any],
) -> str:
    decisions = torch.rand(value.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
    decisions[:, 0] = True
    decisions[0, -1] = False
    decisions = decisions.to(value.device)
    owned = parameters.get(roles.query), parameters.get(roles.output)
    mode = ActiveQueries(roles, *owned, decisions.shape, decisions)
    with torch.no_grad(), mode:
        part, others = run()
    tolerance = 2e-4 if value.dtype in (torch.float32, torch.float64) else 5e-2
    difference = (part[decisions] - value[decisions]).nan_to_num().abs().max()
    if float(difference) > tolerance * float(value.nan_to_num().abs().max().clamp_min(1e-12)):
        return "active query tokens alone give another result"
    for other, whole in zip(others, further, strict=True):
        if isinstance(whole, Tensor) and id(other) not in mode.short and not torch.equal(other, whole):
            return "a second output of its module depends on queries and is used outside the branch"
    return ""


class _Recorder(TorchFunctionMode):
    """Notes linear maps and attention products; cuts the graph after each so that gradients show direct feeding
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linears: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self.products: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.scores: list[tuple[Tensor, Tensor, Tensor]] = []
        self.wholes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.turned: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and note it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in TRANSPOSED:
            self.turned[id(output)] = (output, args[0])
        found = self._linear(func, args, kwargs)
        if found is not None:
            x, weight = found
            leaf = output.detach().requires_grad_()
            self.linears.append((x, weight, leaf, bool(self.products)))
            return leaf
        if func is ATTENTION:
            query, key, value = (
                args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key", "value"))
            )
            leaf = output.detach().requires_grad_()
            self.products.append((query, key, value, leaf))
            return leaf
        if func in PRODUCTS and len(args) == 2 and output.dim() == 4 and all(v.dim() == 4 for v in args):
            leaf = output.detach().requires_grad_()
            first = next((s for s in self.scores if _feeds(s[2], args[0])), None)
            if first is None:
                self.scores.append((args[0], args[1].transpose(-1, -2), leaf))
            else:
                self.products.append((first[0], first[1], args[1], leaf))
            return leaf
        if func is WHOLE and len(args) > 12:
            self.wholes.append((args[0], args[1], args[5], args[11]))  # query, key, input and output projections
        return output

    def _linear(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """Input and weight, if the call is a linear map."""
        if func is F.linear:
            return linear_arguments(args, kwargs)[:2]
        if func is torch.addmm and len(args) == 3:
            return args[1], args[2]
        if func in PRODUCTS and len(args) == 2 and id(args[1]) in self.turned:
            return args[0], self.turned[id(args[1])][1]
        return None


def _roles(recorder: _Recorder, shape: torch.Size, parameters: Mapping[str, Tensor]) -> QueryRoles | str:
    names = {id(p): name for name, p in parameters.items()}
    if len(recorder.wholes) == 1 and not recorder.products:
        query, key, made, projected = recorder.wholes[0]
        if query.shape[:2] != shape[::-1] or id(made) not in names or id(projected) not in names:
            return "torch's MultiheadAttention does not get the token sequence"
        width, core = query.shape[2], 4 * query.shape[2]
        flops = shape[1] * (4 * width**2 + core * key.shape[0])
        return QueryRoles(names[id(made)], 0, width, "TN", names[id(projected)], "TN", int(flops), int(core))
    if len(recorder.products) != 1:
        found = f"{len(recorder.products)} attention products instead of 1"
        return found if recorder.products else f"{found} (transformers: load it with attn_implementation='sdpa')"
    query, key, _, product = recorder.products[0]
    if query.dim() != 4 or query.shape[0] != shape[0] or query.shape[2] != shape[1]:
        return "attention runs over windows or folded tokens"
    roles = _query_map(recorder, shape, names)
    if isinstance(roles, str):
        return roles
    linear = roles.flops  # of the query map, per token
    for x, weight, _, after in recorder.linears:
        if after and _feeds(product, x):
            order = _order(x, shape)
            if order is not None and id(weight) in names:
                roles = replace(roles, output=names[id(weight)], output_rows=order)
                linear += 2 * weight.numel()
            break
    core = int(4 * query.shape[1] * query.shape[3])
    return replace(roles, flops=int(shape[1] * (linear + core * key.shape[2])), core=core)


def _query_map(recorder: _Recorder, shape: torch.Size, names: Mapping[int, str]) -> QueryRoles | str:
    """Roles with the query map filled in, and its FLOPs per token; no name where its rows are interleaved."""
    query, key, value, _ = recorder.products[0]
    before = [(x, weight, leaf) for x, weight, leaf, after in recorder.linears if not after]
    leaves = [leaf for _, _, leaf in before]
    columns = {name: _columns(part, leaves) for name, part in (("q", query), ("k", key), ("v", value))}
    sources = [i for i, c in enumerate(columns["q"]) if c is not None]
    if len(sources) != 1:
        return "queries do not come from one linear map"
    x, weight, _ = before[sources[0]]
    used = columns["q"][sources[0]]
    assert used is not None
    shared = [c[sources[0]] for c in (columns["k"], columns["v"])]
    if any(c is not None and bool((c & used).any()) for c in shared):
        return "queries share a linear map's columns with keys or values"
    rows = used.nonzero().flatten()
    first, last = int(rows[0]), int(rows[-1]) + 1
    order = _order(x, shape)
    if order is None or id(weight) not in names:
        return "the query map's input is not the token sequence"
    if last - first != len(rows):
        return QueryRoles("", 0, 0, order, "", order, 0)
    return QueryRoles(names[id(weight)], first, last, order, "", order, 2 * (last - first) * x.shape[-1])


def _columns(part: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Which columns of each leaf feed `part`."""
    if not part.requires_grad or not leaves:
        return [None] * len(leaves)
    weights = torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(part)
    gradients = torch.autograd.grad((part * weights).sum(), list(leaves), retain_graph=True, allow_unused=True)
    return [None if g is None else g.reshape(-1, g.shape[-1]).abs().sum(0) > 0 for g in gradients]


def _feeds(source: Tensor, part: Tensor) -> bool:
    if not part.requires_grad:
        return False
    return torch.autograd.grad(part.sum(), [source], retain_graph=True, allow_unused=True)[0] is not None


def _order(x: Tensor, shape: torch.Size) -> Rows | None:
    if x.shape[:-1] == shape:
        return "NT"
    if x.shape[:-1] == shape[::-1]:
        return "TN"
    if x.dim() == 2 and len(x) == shape.numel():
        return "TN"  # torch's MultiheadAttention flattens token by token; the check by running settles it
    return None
