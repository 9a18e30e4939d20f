"""Attention for some query tokens only: keys and values for every token, the query side for active tokens.

While a branch runs, a `TorchFunctionMode` watches for three calls: the linear map that makes queries, the attention product,
and the output projection (or, instead of these, torch's own `multi_head_attention_forward`). Each is computed for
active rows alone and scattered back, so shapes, caches, masks and control flow of the module stay as they are. Which
linear map plays which role is found by `surgery.query_finding`.

An attention product that is written out (`q @ k.T`, scaling, soft-capping, mask, softmax, `@ v`) runs on active rows from
its first product to its second: the scores are *short*, what works row by row keeps them short, and any other operation
gets them back at full length.

Axis letters: `N` samples, `T` tokens, `S` keys, `C` channels, `H` heads, `D` head dim, `K` active rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from surgery.operators import ATTENTION, PRODUCTS, SOFTMAX, TRANSPOSED, WHOLE, linear_arguments

Rows = Literal["NT", "TN"]
"""Order of the flattened rows of a linear map's input: sample by sample, or token by token."""
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
                return self._queries(*linear_arguments(args, kwargs))
            if weight is self.output and weight is not None:
                return self._project(*linear_arguments(args, kwargs))
        elif func is torch.addmm and len(args) == 3 and not kwargs:  # transformers' Conv1D
            bias, x, matrix = args
            if matrix is self.query:
                return self._queries(x, args[2].T, bias)
            if matrix is self.output:
                return self._project(x, args[2].T, bias)
        elif func is ATTENTION:
            return self._attend(*args, **kwargs)
        elif func is WHOLE and kwargs.get("attn_mask") is None and not kwargs.get("need_weights", True):
            return self._whole(*args, **kwargs)
        elif func in TRANSPOSED and (args[0] is self.query or args[0] is self.output):
            turned = func(*args)
            self.turned[id(turned)] = (turned, args[0])
            return turned
        elif func in PRODUCTS and len(args) == 2 and id(args[1]) in self.turned:  # x @ weight.T
            weight = self.turned[id(args[1])][1]
            made = self._queries if weight is self.query else self._project
            return made(args[0], weight, None)
        elif func in PRODUCTS and self._starts(args, kwargs):
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
        made, _ = WHOLE(query.gather(0, index), key, value, *args, **kwargs)
        return made.new_zeros(query.shape).scatter_(0, index, made), None  # autocast may have chosen another dtype

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
            return ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        some = self._rows(query)  # N H K D
        if is_causal:
            keys = torch.arange(key.shape[-2], device=key.device)
            attn_mask, is_causal = keys <= self.index.view(len(self.index), 1, -1, 1), False  # N 1 K S
        elif attn_mask is not None and attn_mask.dim() >= 2 and attn_mask.shape[-2] == tokens:
            attn_mask = self._rows(attn_mask)
        return self._lengthen(ATTENTION(some, key, value, attn_mask, dropout_p, is_causal, **rest))

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
        if func in PRODUCTS and id(args[0]) in self.short and id(args[1]) not in self.short and not kwargs:
            return self._lengthen(func(*args))  # the second product: probabilities with values
        if func in _SHAPES:
            return self._full_shape(args[0].shape) if len(args) == 1 else self._full_shape(args[0].shape)[args[1]]
        if func in _FACTS:
            return func(*args, **kwargs)
        last = func in SOFTMAX and {*args[1:2], kwargs.get("dim", -1)} <= {-1, 3}
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


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
