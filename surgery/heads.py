"""Attention for some heads only: inactive heads are neither projected, nor attended with, nor read.

While a branch runs, a `TorchFunctionMode` watches for the linear maps that make queries, keys and values, for the
attention product, and for the output projection (or, instead of these, for torch's own
`multi_head_attention_forward`). Samples with equal decisions form a group; each call is computed group by group with the
rows (and, in the output projection, the columns) of active heads. What the module passes on in between has the full shape,
so its code stays as it is: a *placeholder* without content where it only moves values, zeros in the columns of inactive
heads where it computes with them (norms, rotary embedding), and everything where a key/value cache wants it.

A *head* here is what one decision is about: under grouped-query attention a key/value head with its query heads.

Axis letters: `N` samples, `R` rows per sample (tokens, in windows too), `T` tokens, `S` keys, `C` channels, `H` heads,
`Q` query heads per head, `D` head dim, `A` active heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from surgery.errors import PlanMismatch
from surgery.operators import ATTENTION, WHOLE, linear_arguments

PARTS = ("query", "key", "value")
Rows = slice | Tensor | None


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Which rows of a weight make one part (queries, keys or values), head by head.

    Args:
        weight: Name of the parameter.
        starts: First row of every head.
        size: Rows per head; they follow each other.
    """

    weight: str
    starts: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class HeadRoles:
    """Where the heads of one attention are.

    Args:
        count: Heads `H` that are decided.
        query: Rows that make queries.
        key: Rows that make keys.
        value: Rows that make values.
        output: Parameter of the output projection; its columns are the heads one after the other.
        width: Columns per head there.
        moves: Whether queries, keys and values are only moved between their linear maps and the attention product.
        flops: Cost of one head per sample; one multiply-add = 2.
    """

    count: int
    query: HeadRows
    key: HeadRows
    value: HeadRows
    output: str
    width: int
    moves: bool
    flops: int

    RETIRED: ClassVar[tuple[str, ...]] = ("whole",)
    """Keys of older files."""

    @property
    def names(self) -> tuple[str, str, str, str]:
        """The parameters of queries, keys, values and output."""
        return self.query.weight, self.key.weight, self.value.weight, self.output


class NoProduct(PlanMismatch):
    """The output projection came and no attention product before it: the module wrote its product out in this call."""


class WeighedHeads(TorchFunctionMode):
    """Everything runs, and what the output projection reads is changed head by head: the reference for `ActiveHeads`.

    Args:
        roles: Where the heads are.
        parameters: Those that `roles.names` names.
        weigh: Gets what the output projection reads, `(N, R, H, D)`, and returns what it is to read instead.
        samples: Number of samples `N`.
    """

    def __init__(
        self, roles: HeadRoles, parameters: Sequence[Tensor], weigh: Callable[[Tensor], Tensor], samples: int
    ) -> None:
        super().__init__()
        self.roles, self.output, self.weigh, self.samples = roles, parameters[3], weigh, samples
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Change the input of the output projection, pass on all other calls."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = linear_arguments(args, kwargs)
            if weight is self.output:
                return F.linear(self._weighed(x), weight, bias)
        if func is WHOLE:
            return self._whole(args, kwargs)
        return func(*args, **kwargs)

    def _weighed(self, x: Tensor) -> Tensor:
        self.done = True
        heads = x.reshape(self.samples, -1, self.roles.count, self.roles.width)  # N R H D
        return self.weigh(heads).reshape(x.shape)

    def _whole(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The heads come out side by side where the output projection is the identity."""
        eye = torch.eye(len(args[11]), dtype=args[11].dtype, device=args[11].device)
        heads, weights = WHOLE(*args[:11], eye, None, **kwargs)  # T N C
        weighed = self._weighed(heads.transpose(0, 1)).transpose(0, 1)
        return F.linear(weighed, args[11], args[12]), weights


class ActiveHeads(TorchFunctionMode):
    """Computes active heads only.

    Args:
        roles: Where the heads are.
        parameters: Those that `roles.names` names.
        decisions: bool `(N, H)`.
        keep_keys: Whether keys and values of all heads are wanted (by a cache).
    """

    def __init__(
        self, roles: HeadRoles, parameters: Sequence[Tensor], decisions: Tensor, *, keep_keys: bool = False
    ) -> None:
        super().__init__()
        self.roles, self.parameters, self.output = roles, dict(zip(PARTS, parameters, strict=False)), parameters[3]
        self.samples = len(decisions)
        self.groups = _groups(decisions)
        self.keep_keys = keep_keys
        self.moves = roles.moves and not keep_keys
        self.given: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self.made: list[Tensor | None] = []
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the calls that heads can be left out of, pass on all others."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = linear_arguments(args, kwargs)
            parts = [part for part, own in self.parameters.items() if own is weight]
            if parts:
                return self._project(parts, x, weight, bias)
            if weight is self.output:
                return self._gather_up(x.shape[:-1], weight, bias)
        if func is ATTENTION:
            return self._attend(*args, **kwargs)
        if func is WHOLE:
            if not computes_plainly(args, kwargs):
                raise NoProduct(f"{self.roles.output}: torch's MultiheadAttention was asked for its weights")
            return self._whole(args, kwargs)
        return func(*args, **kwargs)

    # -- the three calls ------------------------------------------------------------------------------------------

    def _project(self, parts: Sequence[str], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.moves:
            self.given |= dict.fromkeys(parts, (x, weight, bias))
            return x.new_empty(1).expand(*x.shape[:-1], len(weight))
        kept = [getattr(self.roles, part) for part in parts if part == "query" or not self.keep_keys]
        if not kept:
            return F.linear(x, weight, bias)
        rows = x.reshape(self.samples, -1, x.shape[-1])  # N R C
        full = x.new_zeros((*rows.shape[:2], len(weight)))
        always = _between(_blocks(kept, range(self.roles.count)), len(weight))
        for index, heads in self.groups:
            blocks = [*_blocks(kept, heads), *always]
            if blocks:
                made = F.linear(_take(rows, index), *_rows_taken(weight, bias, blocks))
                _put(full, index, _index_of(blocks, x.device), made)
        return full.view(*x.shape[:-1], len(weight))

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
        """Fills `self.made`, group by group `(N', Q*A, T, D)`; returns a placeholder."""
        self.made = []
        for index, heads in self.groups:
            if not heads:
                self.made.append(None)
                continue
            parts = self._moved(query, index, heads) if self.moves else self._picked((query, key, value), index, heads)
            mask = None if attn_mask is None else self._mask(attn_mask, query, index, heads)
            if parts[0].shape[1] != parts[1].shape[1]:
                rest["enable_gqa"] = True
            self.made.append(ATTENTION(*parts, mask, dropout_p, is_causal, **rest))
        return query.new_empty(1).expand(*query.shape[:-1], value.shape[-1])

    def _gather_up(self, lead: torch.Size, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output projection reads what was made for active heads."""
        if len(self.made) != len(self.groups):
            raise NoProduct(
                f"{self.roles.output}: no call of scaled_dot_product_attention came before it, so heads cannot be left out; "
                "load the model with attn_implementation='sdpa', and ask for no attention weights"
            )
        self.done = True
        outputs: list[Tensor | None] = []
        for heads, made in zip((heads for _, heads in self.groups), self.made, strict=True):
            if made is None:
                outputs.append(None)
                continue
            read = made.transpose(1, 2).flatten(2)  # N' T A*D
            if read.shape[2] != len(heads) * self.roles.width:  # one token, whose grouped queries lie on the token axis
                read = made.flatten(1)[:, None]
            outputs.append(F.linear(read, _columns_of(weight, heads, self.roles.width), bias))
        self.made = []
        if len(outputs) == 1 and outputs[0] is not None:
            return outputs[0].reshape(*lead, len(weight))
        full = weight.new_empty(
            (self.samples, lead.numel() // self.samples, len(weight)), dtype=_dtype(outputs, weight)
        )
        for (index, _), made in zip(self.groups, outputs, strict=True):
            if made is not None:
                made = made.reshape(-1, full.shape[1], len(weight))
            else:
                made = full.new_zeros(()) if bias is None else bias.to(full.dtype)
            full[slice(None) if index is None else index] = made
        return full.view(*lead, len(weight))

    # -- what one group needs -------------------------------------------------------------------------------------

    def _moved(self, query: Tensor, index: Rows, heads: Sequence[int]) -> list[Tensor]:
        """Queries, keys and values of active heads, straight from their linear maps: `(N', A, T, D)` each."""
        result: dict[str, Tensor] = {}
        for part in PARTS:
            if part in result:
                continue
            x, weight, bias = self.given[part]
            together = [p for p in PARTS if self.given[p][1] is weight and self.given[p][0] is x]
            own, own_bias = _rows_taken(weight, bias, _blocks([getattr(self.roles, p) for p in together], heads))
            some = _take(x.reshape(self.samples, -1, *x.shape[-2:]), index).flatten(0, 1)  # N' T C
            made = F.linear(some, own, own_bias)
            sizes = [getattr(self.roles, p).size for p in together]
            for p, columns, size in zip(together, made.split([len(heads) * s for s in sizes], -1), sizes, strict=True):
                dim = self._dim(p, query, size)
                result[p] = columns.unflatten(-1, (-1, dim)).transpose(1, 2)
        return [result[part] for part in PARTS]

    def _dim(self, part: str, query: Tensor, size: int) -> int:
        """Head dim `D`; only queries hold several heads per decision."""
        return query.shape[-1] if part == "query" else size

    def _picked(self, parts: Sequence[Tensor], index: Rows, heads: Sequence[int]) -> list[Tensor]:
        """Queries, keys and values of active heads, from those of all heads."""
        result = []
        for part in parts:
            each = part.shape[1] // self.roles.count
            windows = part.reshape(self.samples, -1, *part.shape[1:])
            some = _take(windows, index).flatten(0, 1)
            result.append(_columns_of(some, heads, each))  # heads are on axis 1 in both
        return result

    def _mask(self, mask: Tensor, query: Tensor, index: Rows, heads: Sequence[int]) -> Tensor:
        """Rows of the group's samples and heads, where the mask has any."""
        mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
        if mask.shape[1] > 1:
            mask = _columns_of(mask, heads, query.shape[1] // self.roles.count)
        if mask.shape[0] > 1:
            mask = _take(mask.reshape(self.samples, -1, *mask.shape[1:]), index).flatten(0, 1)
        return mask

    def _whole(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, None]:
        """torch's own MultiheadAttention, without attention weights; token first: `(T, N, C)`."""
        query, key, value, _, heads, weight, bias, *_, out_weight, out_bias = args
        size = weight.shape[0] // 3
        self.given = {
            part: (x.transpose(0, 1), weight, bias) for part, x in zip(PARTS, (query, key, value), strict=True)
        }
        if query is key and key is value:
            self.given = dict.fromkeys(PARTS, self.given["query"])
        shape = (query.shape[1], heads, query.shape[0], size // heads)
        like = query.new_empty(1).expand(shape)
        self._attend(like, like, like, _merged(kwargs, shape))
        return self._gather_up(query.shape[1::-1], out_weight, out_bias).transpose(0, 1), None


def computes_plainly(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `multi_head_attention_forward` is one that `ActiveHeads` computes."""
    return (
        len(args) == 13
        and args[5] is not None
        and args[7] is None
        and args[8] is None
        and not args[9]
        and not kwargs.get("need_weights", True)
    )


def _merged(kwargs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Both masks of a call of `multi_head_attention_forward` as one, added to the scores."""
    padding, mask = kwargs.get("key_padding_mask"), kwargs.get("attn_mask")
    parts = []
    if padding is not None:
        parts.append(_additive(padding)[:, None, None, :])  # N 1 1 S
    if mask is not None:
        mask = _additive(mask)
        parts.append(mask.view(shape[0], shape[1], *mask.shape[1:]) if mask.dim() == 3 else mask[None, None])
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _additive(mask: Tensor) -> Tensor:
    """torch's MultiheadAttention takes True for what is left out."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, float("-inf"))


def _groups(decisions: Tensor) -> list[tuple[Rows, list[int]]]:
    """Samples with equal decisions, and the heads that are active for them; None stands for all samples."""
    found: dict[tuple[int, ...], list[int]] = {}
    for sample, row in enumerate(decisions.tolist()):
        found.setdefault(tuple(head for head, active in enumerate(row) if active), []).append(sample)
    groups: list[tuple[Rows, list[int]]] = []
    for heads, samples in found.items():
        index: Rows
        if len(samples) == len(decisions):
            index = None
        elif samples[-1] - samples[0] == len(samples) - 1:
            index = slice(samples[0], samples[-1] + 1)
        else:
            index = torch.tensor(samples, device=decisions.device)
        groups.append((index, list(heads)))
    return groups


def _blocks(parts: Sequence[HeadRows], heads: Sequence[int]) -> list[tuple[int, int]]:
    """First row and row after the last of every block of rows that makes `heads`; neighbours are joined."""
    blocks: list[tuple[int, int]] = []
    for part in parts:
        for head in heads:
            first, last = part.starts[head], part.starts[head] + part.size
            if blocks and blocks[-1][1] == first:
                first = blocks.pop()[0]
            blocks.append((first, last))
    return blocks


def _between(blocks: Sequence[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """The rows of a weight that are in none of the blocks."""
    edges = [0, *(edge for block in sorted(blocks) for edge in block), rows]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]


def _index_of(blocks: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, last, device=device) for first, last in blocks])


def _rows_taken(weight: Tensor, bias: Tensor | None, blocks: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
    """Rows of a linear map: a view where they follow each other, else one copy."""
    if len(blocks) == 1:
        rows = slice(*blocks[0])
        return weight[rows], None if bias is None else bias[rows]
    own = torch.cat([weight[first:last] for first, last in blocks])
    return own, None if bias is None else torch.cat([bias[first:last] for first, last in blocks])


def _columns_of(value: Tensor, heads: Sequence[int], each: int) -> Tensor:
    """Entries along axis 1, `each` per head: a view where the heads follow each other, else one copy."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1][1] = head + 1
        else:
            runs.append([head, head + 1])
    views = [value[:, first * each : last * each] for first, last in runs]
    return views[0] if len(views) == 1 else torch.cat(views, 1)


def _take(value: Tensor, index: Rows) -> Tensor:
    if index is None:
        return value
    return value[index] if isinstance(index, slice) else value.index_select(0, index)


def _put(full: Tensor, index: Rows, columns: Tensor, made: Tensor) -> None:
    """Write `made` `(N', R, K)` to samples and columns of `full` `(N, R, C)`."""
    if isinstance(index, Tensor):
        full[index[:, None, None], torch.arange(full.shape[1], device=full.device)[None, :, None], columns] = made
    else:
        _take(full, index).index_copy_(-1, columns, made)


def _dtype(outputs: Sequence[Tensor | None], weight: Tensor) -> torch.dtype:
    return next((made.dtype for made in outputs if made is not None), weight.dtype)


def zeroed(decisions: Tensor) -> Callable[[Tensor], Tensor]:
    """For `WeighedHeads`: inactive heads, by bool `(N, H)`, are read as zeros; a NaN in them does not leak."""
    chosen = decisions[:, None, :, None]
    return lambda x: torch.where(chosen, x, torch.zeros_like(x))


def check_ran(mode: WeighedHeads | ActiveHeads, site: str) -> None:
    """Refuse a branch whose output projection was never seen: its heads would all have counted as active.

    Raises:
        PlanMismatch: If so.
    """
    if not mode.done:
        raise PlanMismatch(
            f"{site}: its output projection did not run as a plain linear map, so heads cannot be left out; expected the "
            f"parameter {mode.roles.output} in torch.nn.functional.linear (was the module wrapped or quantised?); "
            "convert the model as it is now"
        )
