"""Attention for some query tokens only: keys and values for every token, the query side for active tokens.

While a branch runs, a `TorchFunctionMode` watches for three calls: the linear map that makes queries, the attention product,
and the output projection (or, instead of these, torch's own `multi_head_attention_forward`). Each is computed for
active rows alone and scattered back, so shapes, caches, masks and control flow of the module stay as they are. Which
linear map plays which role is found by autograd in one recorded call, and every claim is checked by running it.

Axis letters: `N` samples, `T` tokens, `S` keys, `C` channels, `H` heads, `D` head dim, `K` active rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rows = Literal["NT", "TN"]
"""Order of the flattened rows of a linear map's input: sample by sample, or token by token."""
_ATTENTION = F.scaled_dot_product_attention
_WHOLE = F.multi_head_attention_forward
_DENSE_ABOVE = 0.85  # with more active tokens than this, gathering costs more than it saves


@dataclass(frozen=True, slots=True)
class QueryRoles:
    """Which parameters make queries and project the output, by name.

    Args:
        query: Parameter whose rows `first:last` make queries.
        first: First row of them.
        last: Row after the last of them.
        query_rows: Order of the query map's input rows.
        output: Parameter of the output projection, or "" where it is outside the branch.
        output_rows: Order of its input rows.
        flops: What one active token costs beyond keys and values; one multiply-add = 2.
    """

    query: str
    first: int
    last: int
    query_rows: Rows
    output: str
    output_rows: Rows
    flops: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QueryRoles:
        """Inverse of `to_dict`."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return asdict(self)


class ActiveQueries(TorchFunctionMode):
    """Computes queries, attention and output projection for active tokens only.

    Args:
        roles: What to watch for.
        query: The parameter that `roles.query` names.
        output: The parameter that `roles.output` names, or None.
        decisions: bool `(N, T)`.
    """

    def __init__(self, roles: QueryRoles, query: Tensor, output: Tensor | None, decisions: Tensor) -> None:
        super().__init__()
        self.roles, self.query, self.output = roles, query, output
        self.shape = decisions.shape
        samples, tokens = decisions.nonzero(as_tuple=True)
        self.flat = {"NT": samples * self.shape[1] + tokens, "TN": tokens * self.shape[0] + samples}
        widest = int(decisions.sum(1).max())
        # active tokens first; samples with fewer of them compute some inactive ones, which are not read
        self.index = decisions.int().argsort(dim=1, descending=True, stable=True)[:, :widest]  # N K

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the three calls, pass on all others."""
        kwargs = kwargs or {}
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if weight is self.query:
                return self._queries(*_linear_arguments(args, kwargs))
            if weight is self.output:
                return self._project(*_linear_arguments(args, kwargs))
        if func is _ATTENTION:
            return self._attend(*args, **kwargs)
        if func is _WHOLE and kwargs.get("attn_mask") is None and not kwargs.get("need_weights", True):
            return self._whole(*args, **kwargs)
        return func(*args, **kwargs)

    def _queries(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, last = self.roles.first, self.roles.last
        made = self._some(x, weight[first:last], None if bias is None else bias[first:last], self.roles.query_rows)
        if last - first == len(weight):
            return made
        parts = [made]
        if first > 0:
            parts.insert(0, F.linear(x, weight[:first], None if bias is None else bias[:first]))
        if last < len(weight):
            parts.append(F.linear(x, weight[last:], None if bias is None else bias[last:]))
        return torch.cat(parts, -1)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._some(x, weight, bias, self.roles.output_rows)

    def _some(self, x: Tensor, weight: Tensor, bias: Tensor | None, order: Rows) -> Tensor:
        flat = self.flat[order]
        made = F.linear(x.reshape(-1, x.shape[-1]).index_select(0, flat), weight, bias)  # K C
        full = made.new_zeros((x.numel() // x.shape[-1], made.shape[1]))
        return full.index_copy_(0, flat, made).view(*x.shape[:-1], made.shape[1])

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """torch's own MultiheadAttention takes fewer queries than keys as it is; token first: `(T, N, C)`."""
        if self.index.shape[1] == 0:
            return torch.zeros_like(query), None
        index = self.index.T.unsqueeze(-1).expand(-1, -1, query.shape[-1])  # K N C
        made, _ = _WHOLE(query.gather(0, index), key, value, *args, **kwargs)
        return torch.zeros_like(query).scatter_(0, index, made), None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Tensor:
        if self.index.shape[1] == 0:
            return query.new_zeros((*query.shape[:-1], value.shape[-1]))
        tokens = query.shape[-2]
        if tokens != self.shape[1] or tokens == 1:
            # decoding one token: some models fold grouped heads into this axis, and gathering keys would cost more
            return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        index = self.index.view(len(self.index), 1, -1, 1)  # N 1 K 1
        some = query.gather(-2, index.expand(-1, query.shape[1], -1, query.shape[-1]))  # N H K D
        if is_causal:
            keys = torch.arange(key.shape[-2], device=key.device)
            attn_mask, is_causal = keys <= index, False  # N 1 K S
        elif attn_mask is not None and attn_mask.dim() >= 2 and attn_mask.shape[-2] == tokens:
            mask = attn_mask.expand(
                len(index), *(attn_mask.shape[1:] if attn_mask.dim() == 4 else (1, *attn_mask.shape[-2:]))
            )
            attn_mask = mask.gather(-2, index.expand(-1, mask.shape[1], -1, mask.shape[-1]))  # N H K S
        made = _ATTENTION(some, key, value, attn_mask, dropout_p, is_causal, **rest)
        full = made.new_zeros((*query.shape[:-1], made.shape[-1]))
        return full.scatter_(-2, index.expand(-1, made.shape[1], -1, made.shape[-1]), made)


def worth_gathering(decisions: Tensor) -> bool:
    """Whether few enough tokens are active for gathering to pay."""
    return float(decisions.float().mean()) <= _DENSE_ABOVE


def find_roles(run: Callable[[], Tensor], value: Tensor, parameters: Mapping[str, Tensor]) -> QueryRoles | str:
    """Find who makes queries and who projects the output, from one recorded call of a branch.

    Args:
        run: Runs the branch on inputs `(N, T, C)`.
        value: What it gave, `(N, T, C)`.
        parameters: Name -> parameter of the branch's modules.

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
    decisions = torch.rand(value.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
    decisions[:, 0] = True
    decisions[0, -1] = False
    decisions = decisions.to(value.device)
    with torch.no_grad(), ActiveQueries(found, parameters[found.query], parameters.get(found.output), decisions):
        part = run()
    difference = (part[decisions] - value[decisions]).abs().max()
    tolerance = 2e-4 if value.dtype in (torch.float32, torch.float64) else 5e-2
    if float(difference) > tolerance * float(value.abs().max().clamp_min(1e-12)):
        return "active query tokens alone give another result"
    return found


class _Recorder(TorchFunctionMode):
    """Notes linear maps and attention products; cuts the graph after each so that gradients show direct feeding
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linears: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self.products: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.wholes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and note it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            x, weight, _ = _linear_arguments(args, kwargs)
            leaf = output.detach().requires_grad_()
            self.linears.append((x, weight, leaf, bool(self.products)))
            return leaf
        if func is _ATTENTION:
            query, key, value = (
                args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key", "value"))
            )
            leaf = output.detach().requires_grad_()
            self.products.append((query, key, value, leaf))
            return leaf
        if func is _WHOLE and len(args) > 12:
            self.wholes.append((args[0], args[1], args[5], args[11]))  # query, key, input and output projections
        return output


def _roles(recorder: _Recorder, shape: torch.Size, parameters: Mapping[str, Tensor]) -> QueryRoles | str:
    names = {id(p): name for name, p in parameters.items()}
    if len(recorder.wholes) == 1 and not recorder.products:
        query, key, made, projected = recorder.wholes[0]
        if query.shape[:2] != shape[::-1] or id(made) not in names or id(projected) not in names:
            return "torch's MultiheadAttention does not get the token sequence"
        width = query.shape[2]
        flops = shape[1] * (4 * width**2 + 4 * key.shape[0] * width)
        return QueryRoles(names[id(made)], 0, width, "TN", names[id(projected)], "TN", int(flops))
    if len(recorder.products) != 1:
        return f"{len(recorder.products)} attention products instead of 1"
    query, key, value, product = recorder.products[0]
    if query.dim() != 4 or query.shape[0] != shape[0] or query.shape[2] != shape[1]:
        return "attention runs over windows or folded tokens"
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
    if last - first != len(rows):
        return "the query columns are interleaved with others"
    order = _order(x, shape)
    if order is None or id(weight) not in names:
        return "the query map's input is not the token sequence"
    output, output_order, output_flops = "", order, 0
    for x_out, weight_out, _, after in recorder.linears:
        if after and _feeds(product, x_out):
            found = _order(x_out, shape)
            if found is not None and id(weight_out) in names:
                output, output_order = names[id(weight_out)], found
                output_flops = 2 * weight_out.numel()
            break
    core = 4 * query.shape[1] * key.shape[2] * query.shape[3]
    flops = shape[1] * (2 * (last - first) * weight.shape[1] + core + output_flops)
    return QueryRoles(names[id(weight)], first, last, order, output, output_order, int(flops))


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


def _linear_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return named["input"], named["weight"], named.get("bias")


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
