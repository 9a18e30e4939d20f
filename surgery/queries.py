"""Attention for some query tokens only: keys and values for every token, the query side for active tokens.

While a branch runs, a `TorchFunctionMode` watches for three calls: the linear map that makes queries, the attention product,
and the output projection (or, instead of these, torch's own `multi_head_attention_forward`). Each is computed for
active rows alone and scattered back, so shapes, caches, masks and control flow of the module stay as they are. Which
linear map plays which role is found by autograd in one recorded call, and every claim is checked by running it.

An attention product that is written out (`q @ k.T`, scaling, soft-capping, mask, softmax, `@ v`) runs on active rows from
its first product to its second: the scores are *short*, what works row by row keeps them short, and any other operation
gets them back at full length.

Axis letters: `N` samples, `T` tokens, `S` keys, `C` channels, `H` heads, `D` head dim, `K` active rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rows = Literal["NT", "TN"]
"""Order of the flattened rows of a linear map's input: sample by sample, or token by token."""
_ATTENTION = F.scaled_dot_product_attention
_WHOLE = F.multi_head_attention_forward
_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__})
MOST_ACTIVE = 0.85
"""With a larger share of active tokens than this, gathering costs more than it saves."""
_ROW_BY_ROW = frozenset(
    getattr(owner, name)
    for owner, names in (
        (
            Tensor,
            "add add_ __add__ __radd__ __iadd__ sub __sub__ __rsub__ __isub__ mul mul_ __mul__ __rmul__ __imul__ div div_ "
            "__truediv__ __itruediv__ neg __neg__ tanh clamp masked_fill masked_fill_ where to float half double type "
            "type_as contiguous",
        ),
        (
            torch,
            "add sub subtract mul multiply div true_divide neg tanh clamp max maximum min minimum masked_fill where",
        ),
        (F, "dropout"),
    )
    for name in names.split()
)
_TRANSPOSED = frozenset({Tensor.T.__get__, Tensor.t, torch.t})  # type: ignore[attr-defined]
_SOFTMAX = frozenset({torch.softmax, Tensor.softmax, F.softmax})


@dataclass(frozen=True, slots=True)
class QueryRoles:
    """Which parameters make queries and project the output, by name.

    Args:
        query: Parameter whose rows (columns in transformers' Conv1D) `first:last` make queries, or "" where queries are
            made for every token, since their rows are interleaved with those of keys and values.
        first: First row of them.
        last: Row after the last of them.
        query_rows: Order of the query map's input rows.
        output: Parameter of the output projection, or "" where it is outside the branch.
        output_rows: Order of its input rows.
        flops: What the active tokens of one sample cost beyond keys and values where all are active; one multiply-add = 2.
        core: The part of `flops` that grows with the number of keys, per query and key.
    """

    query: str
    first: int
    last: int
    query_rows: Rows
    output: str
    output_rows: Rows
    flops: int
    core: int = 0

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
        query: The parameter that `roles.query` names, or None.
        output: The parameter that `roles.output` names, or None.
        shape: Samples and tokens `(N, T)`.
        decisions: bool `(N, T)`, or None where no token is active.
        device: Where the branch runs; that of `decisions` by default.
    """

    def __init__(
        self,
        roles: QueryRoles,
        query: Tensor | None,
        output: Tensor | None,
        shape: torch.Size,
        decisions: Tensor | None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.roles, self.query, self.output, self.shape = roles, query, output, shape
        self.turned: dict[int, tuple[Tensor, Any]] = {}  # transposed weights by id
        self.short: dict[int, Tensor] = {}  # scores of active rows by id; held, so that no id is used twice
        self.index, self.flat = self._active(decisions, device)

    def _active(self, decisions: Tensor | None, device: torch.device | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Active tokens `(N, K)`, and active rows by order of rows."""
        rows, length = self.shape
        if decisions is None:
            none = torch.empty((rows, 0), dtype=torch.int64, device=device)
            return none, dict.fromkeys(("NT", "TN"), none.flatten())
        if rows == 1:
            one = decisions.nonzero()[:, 1]
            return one[None], dict.fromkeys(("NT", "TN"), one)
        samples, tokens = decisions.nonzero(as_tuple=True)
        widest = int(decisions.sum(1).max())
        # active tokens first; samples with fewer of them compute some inactive ones, which are not read
        index = decisions.int().argsort(dim=1, descending=True, stable=True)[:, :widest]
        return index, {"NT": samples * length + tokens, "TN": tokens * rows + samples}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the three calls, pass on all others."""
        kwargs = kwargs or {}
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if weight is self.query and weight is not None:
                return self._queries(*_linear_arguments(args, kwargs))
            if weight is self.output and weight is not None:
                return self._project(*_linear_arguments(args, kwargs))
        elif func is torch.addmm and len(args) == 3 and not kwargs:  # transformers' Conv1D
            bias, x, matrix = args
            if matrix is self.query:
                return self._queries(x, args[2].T, bias)
            if matrix is self.output:
                return self._project(x, args[2].T, bias)
        elif func is _ATTENTION:
            return self._attend(*args, **kwargs)
        elif func is _WHOLE and kwargs.get("attn_mask") is None and not kwargs.get("need_weights", True):
            return self._whole(*args, **kwargs)
        elif func in _TRANSPOSED and (args[0] is self.query or args[0] is self.output):
            turned = func(*args)
            self.turned[id(turned)] = (turned, args[0])
            return turned
        elif func in _PRODUCTS and len(args) == 2 and id(args[1]) in self.turned:  # x @ weight.T
            weight = self.turned[id(args[1])][1]
            made = self._queries if weight is self.query else self._project
            return made(args[0], weight, None)
        elif func in _PRODUCTS and self._starts(args, kwargs):
            return self._shorten(func(self._rows(args[0]), args[1]))
        if self.short and any(id(value) in self.short for value in _flat((args, kwargs))):
            return self._follow(func, args, kwargs)
        return func(*args, **kwargs)

    # -- linear maps ----------------------------------------------------------------------------------------------

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
        if len(flat) == 0:
            return x.new_zeros((*x.shape[:-1], len(weight)))
        made = F.linear(x.reshape(-1, x.shape[-1]).index_select(0, flat), weight, bias)  # K C
        full = made.new_zeros((x.numel() // x.shape[-1], made.shape[1]))
        return full.index_copy_(0, flat, made).view(*x.shape[:-1], made.shape[1])

    # -- fused attention ------------------------------------------------------------------------------------------

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
        some = self._rows(query)  # N H K D
        if is_causal:
            keys = torch.arange(key.shape[-2], device=key.device)
            attn_mask, is_causal = keys <= self.index.view(len(self.index), 1, -1, 1), False  # N 1 K S
        elif attn_mask is not None and attn_mask.dim() >= 2 and attn_mask.shape[-2] == tokens:
            attn_mask = self._rows(attn_mask)
        return self._lengthen(_ATTENTION(some, key, value, attn_mask, dropout_p, is_causal, **rest))

    # -- attention that is written out ----------------------------------------------------------------------------

    def _starts(self, args: Sequence[Any], kwargs: Any) -> bool:
        """Whether this is a product `(N, H, T, D) @ (N, H, D, S)` of every token with something."""
        if kwargs or len(args) != 2 or not all(isinstance(value, Tensor) and value.dim() == 4 for value in args):
            return False
        samples, tokens = self.shape
        query = args[0]
        return tokens > 1 and query.shape[0] == samples and query.shape[2] == tokens and id(query) not in self.short

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on short scores."""
        if func in _PRODUCTS and id(args[0]) in self.short and id(args[1]) not in self.short and not kwargs:
            return self._lengthen(func(*args))  # the second product: probabilities with values
        if func in _SHAPES:
            return self._full_shape(args[0].shape) if len(args) == 1 else self._full_shape(args[0].shape)[args[1]]
        if func in _FACTS:
            return func(*args, **kwargs)
        last = func in _SOFTMAX and {*args[1:2], kwargs.get("dim", -1)} <= {-1, 3}
        if (func in _ROW_BY_ROW or last) and "out" not in kwargs:
            output = func(*map(self._shorter, args), **{name: self._shorter(v) for name, v in kwargs.items()})
            return self._shorten(output) if isinstance(output, Tensor) else output
        return func(*map(self.restore, args), **{name: self.restore(v) for name, v in kwargs.items()})

    def restore(self, value: Any) -> Any:
        """At full length what is short; the rows of inactive tokens are zero."""
        return self._lengthen(value) if id(value) in self.short else value

    def _shorten(self, value: Tensor) -> Tensor:
        self.short[id(value)] = value
        return value

    def _shorter(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in self.short or value.dim() < 2:
            return value
        return self._rows(value) if value.shape[-2] == self.shape[1] else value

    def _rows(self, value: Tensor) -> Tensor:
        """Active rows: `(…, T, D)` -> `(N, H, K, D)`."""
        if value.dim() < 4:
            value = value.view(*(1,) * (4 - value.dim()), *value.shape)
        index = self.index.view(len(self.index), 1, -1, 1).expand(-1, value.shape[1], -1, value.shape[-1])
        return value.expand(len(self.index), -1, -1, -1).gather(-2, index)

    def _lengthen(self, value: Tensor) -> Tensor:
        """`(N, H, K, D)` -> `(N, H, T, D)`, zero elsewhere."""
        full = value.new_zeros(self._full_shape(value.shape))
        index = self.index.view(len(self.index), 1, -1, 1).expand(-1, value.shape[1], -1, value.shape[-1])
        return full.scatter_(-2, index, value)

    def _full_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], self.shape[1], shape[-1]))


_SHAPES = frozenset({Tensor.shape.__get__, Tensor.size})  # type: ignore[attr-defined]
_FACTS = frozenset(
    {Tensor.dtype.__get__, Tensor.device.__get__, Tensor.dim, Tensor.is_floating_point, Tensor.requires_grad.__get__}  # type: ignore[attr-defined]
)


def _flat(value: Any) -> Iterator[Any]:
    """The values inside arguments, one level of lists deep."""
    args, kwargs = value
    for item in (*args, *kwargs.values()):
        yield from item if isinstance(item, (tuple, list)) else (item,)


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
        if func in _TRANSPOSED:
            self.turned[id(output)] = (output, args[0])
        found = self._linear(func, args, kwargs)
        if found is not None:
            x, weight = found
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
        if func in _PRODUCTS and len(args) == 2 and output.dim() == 4 and all(v.dim() == 4 for v in args):
            leaf = output.detach().requires_grad_()
            first = next((s for s in self.scores if _feeds(s[2], args[0])), None)
            if first is None:
                self.scores.append((args[0], args[1].transpose(-1, -2), leaf))
            else:
                self.products.append((first[0], first[1], args[1], leaf))
            return leaf
        if func is _WHOLE and len(args) > 12:
            self.wholes.append((args[0], args[1], args[5], args[11]))  # query, key, input and output projections
        return output

    def _linear(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """Input and weight, if the call is a linear map."""
        if func is F.linear:
            return _linear_arguments(args, kwargs)[:2]
        if func is torch.addmm and len(args) == 3:
            return args[1], args[2]
        if func in _PRODUCTS and len(args) == 2 and id(args[1]) in self.turned:
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


def _linear_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return named["input"], named["weight"], named.get("bias")


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
