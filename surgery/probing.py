"""Checking every claim about a branch by running it.

A trial conversion of the model runs twice, with two batch sizes. At each gate the branch is run again on a part of its
inputs: on single samples, and on a few tokens as if they were a sequence of their own. What the results show becomes
the site; what fails is restricted or rejected with the reason.

Axis letters: `N` samples, `T` tokens, `C` channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.branches import Branch, Turned, Unfolded, added, parts, take_samples, take_tokens, turn, turns, unfold
from surgery.chain_reading import read_chain
from surgery.chains import Chain
from surgery.counting import flop_counter
from surgery.gates import Gate
from surgery.head_finding import find_heads
from surgery.heads import HeadRoles
from surgery.notes import unnoted
from surgery.queries import QueryRoles
from surgery.query_finding import find_roles
from surgery.sites import Kind, Layout, RegionInput
from surgery.tracing import CACHE_NAMES

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(slots=True)
class Claim:
    """What one probe run saw at one gate."""

    shapes: list[Any]
    residual: torch.Size
    names: tuple[str, ...]
    flops: int = 0
    samples: int = 0
    layout: Layout = "other"
    operations: frozenset[str] = frozenset()
    problem: str = ""
    per_sample: str = ""
    """Why samples cannot be left out one by one; "" when they can."""
    per_token: str = ""
    per_prompt: str = ""
    """Why whole sequences cannot be left out for good, with what a cache keeps of them; "" when they can."""
    cached: bool = False
    query: QueryRoles | None = None
    shared: bool = False
    """Whether a further output is read outside."""
    folded: bool = False
    sequence_first: bool = False
    """Whether the stream is `(T, N, C)`; `residual` and `shapes` are as the branch has them."""
    heads: HeadRoles | str = ""
    """Where its heads are, or why they cannot be decided; "" where nothing was looked for."""
    chain: Chain | None = None


@dataclass(slots=True)
class Probe:
    """A gate handler that runs every branch in full and notes what it sees."""

    input_names: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, Sequence[nn.Module]]
    parameters: Mapping[str, Mapping[str, Tensor]]
    """Per site, its modules' parameters by name (those of the trial conversion)."""
    size: int
    """Batch size of this run."""
    earlier: Mapping[str, Claim] | None = None
    """Claims of a run with another batch size, or None in the first run."""
    claims: dict[str, Claim] = field(default_factory=dict)
    axes: dict[str, tuple[RegionInput, ...] | str] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Run the branch; see `Claim`."""
        if residual.dim() == 2 and not branch.escapes and len(residual) > self.size and len(residual) % self.size == 0:
            left, residual, *inputs = unfold((left, residual, *inputs), self.size, len(residual))
            return self(gate, Unfolded(branch, branch.axes), left, residual, inputs).flatten(0, 1)
        name = gate.site.name
        if name in self.claims:
            self.claims[name].problem = "its layer runs several times per call, and a gate decides once"
            return gate.open(branch, left, inputs)
        names = self.input_names[name]
        claim = Claim([_shape(v) for v in inputs], residual.shape, names, samples=residual.shape[0])
        claim.cached = any(n in CACHE_NAMES and v is not None for n, v in zip(names, inputs, strict=True))
        again = _Again(names, inputs)
        versions = [v._version for v in _tensors((residual, *inputs))]
        if self.earlier is None:
            output = branch(*inputs)
        else:
            with flop_counter() as counter:
                output = branch(*inputs)
            claim.flops = counter.get_total_flops()
            claim.operations = frozenset(str(op) for op in counter.get_flop_counts().get("Global", {}))
        value, *escaped = output if branch.escapes else (output,)
        if versions != [v._version for v in _tensors((residual, *inputs))]:
            claim.problem = "it changes its input in place"
        elif (
            not isinstance(value, Tensor)
            or value.shape != residual.shape
            or (left is not None and left.shape != value.shape)
        ):
            claim.problem = "its output is broadcast when it is added"
        elif not value.is_floating_point():
            claim.problem = "it is no floating-point computation"
        elif self.earlier is not None and claim.flops == 0:
            claim.problem = "nothing worth skipping is in it (0 FLOPs: norms, pooling or shape changes only)"
        claim.sequence_first = residual.dim() == 3 and self._is_sequence_first(name, residual)
        if claim.sequence_first:
            claim.samples = residual.shape[1]
        if claim.samples != self.size:
            claim.problem = claim.problem or (
                f"the residual stream has {claim.samples} rows for {self.size} samples, so its rows are not samples"
            )
        claim.folded = isinstance(branch, Unfolded)
        claim.shared = any(item is not None and not _is_empty(item) for item in escaped)
        claim.layout = layout_of(residual, self.modules[name])
        if claim.sequence_first and claim.layout != "NTC":
            claim.problem = (
                claim.problem or "its samples lie along the second axis, and its channels not along the last"
            )
        if self.earlier is not None and name in self.earlier and not claim.problem:
            self._separate(claim, gate, branch, residual, value, escaped, inputs, again)
        self.claims[name] = claim
        result = added(branch, left, value)
        return (result, *escaped) if branch.escapes else result

    def _separate(
        self,
        claim: Claim,
        gate: Gate,
        branch: Branch,
        residual: Tensor,
        value: Tensor,
        escaped: Sequence[Any],
        inputs: Sequence[Any],
        again: _Again,
    ) -> None:
        """What can be left out of the branch: samples, tokens, queries, heads."""
        assert self.earlier is not None
        name = gate.site.name
        if not (claim.cached or branch.escapes):
            claim.chain = _chain(branch, residual, inputs, claim.layout)
        axes = self.axes[name] = batch_axes(claim, self.earlier[name])
        if claim.sequence_first:
            known = None if isinstance(axes, str) else axes
            which = turns(known, inputs)
            value, residual, *inputs = turn((value, residual, *inputs), (True, True, *which))
            again.inputs, branch = turn(again.inputs, which), Turned.of(branch, known)
        if isinstance(axes, str):
            claim.per_sample = claim.per_token = axes
        elif claim.cached:
            claim.per_sample = claim.per_token = "it writes a key/value cache, which skipping would leave incomplete"
            claim.per_prompt = _reason(lambda: _separable_by_sample(branch, value, again, axes))
        elif claim.shared:
            what = "the size of its result" if _is_size(escaped) else "a second output"
            claim.per_sample = claim.per_token = (
                f"its module also gives {what}, which is read outside the branch and would be missing"
            )
        else:
            claim.per_sample = _reason(lambda: _separable_by_sample(branch, value, lambda: inputs, axes))
            claim.per_token = _reason(lambda: _separable_by_token(branch, value, residual, inputs, axes, claim.layout))
        if claim.per_token and claim.layout == "NTC":
            claim.per_token = _reason(lambda: self._queries(claim, gate, branch, value, again, escaped))
        if not claim.problem and _attends(claim.operations):
            claim.heads = self._heads(gate, branch, value, again, claim)

    def _is_sequence_first(self, name: str, residual: Tensor) -> bool:
        """Whether samples lie along the second axis: with another batch size that one changes, and the first does not."""
        first, second, _ = residual.shape
        before = None if self.earlier is None or name not in self.earlier else self.earlier[name].residual
        if before is None:
            return first != self.size and second == self.size
        return len(before) == 3 and before[0] == first and before[1] != second == self.size

    def _queries(
        self,
        claim: Claim,
        gate: Gate,
        branch: Branch,
        value: Tensor,
        inputs: Callable[[], list[Any]],
        escaped: Sequence[Any],
    ) -> str:
        """Whether the branch can run for some query tokens only; sets `claim.query`."""
        parameters = self.parameters[gate.site.name]

        def run() -> tuple[Tensor, Sequence[Any]]:
            first, *further = branch(*inputs()) if branch.escapes else (branch(*inputs()),)
            return first, further

        roles = find_roles(run, value, parameters, escaped)
        if isinstance(roles, str):
            return f"{claim.per_token}, and {roles}"
        claim.query = roles
        return ""

    def _heads(
        self, gate: Gate, branch: Branch, value: Tensor, inputs: Callable[[], list[Any]], claim: Claim
    ) -> HeadRoles | str:
        """Where the heads of the branch are, or why they cannot be decided."""
        found: list[HeadRoles | str] = []

        def look() -> str:
            run = lambda: _first(branch, branch(*inputs()))  # noqa: E731  (it is passed on at once)
            found.append(find_heads(run, value, self.parameters[gate.site.name], keep_keys=claim.cached))
            return ""

        return _reason(look) or found[0]


def _chain(branch: Branch, residual: Tensor, inputs: Sequence[Any], layout: Layout) -> Chain | None:
    """The layers of a branch, where they are a chain over the channels of the stream."""
    if layout == "NCT":
        return None
    with unnoted():
        weights = read_chain(lambda: _first(branch, branch(*inputs)), residual)
    if weights is None:
        return None
    chain = weights.chain
    sides = (1, 3) if layout == "NCHW" else (0,)
    kernels = (chain.first, chain.last, *([chain.middle] if chain.inner else []))
    return chain if all(side in sides for side in kernels) else None


def _is_size(escaped: Sequence[Any]) -> bool:
    """Whether what a branch gives beside its result are numbers, as the rows and columns of a feature map."""
    return all(isinstance(n, int) for item in escaped for n in (item if isinstance(item, (list, tuple)) else (item,)))


def _attends(operations: frozenset[str]) -> bool:
    """Whether there is an attention product among the operations that the FLOP counter saw."""
    return any("attention" in op or "bmm" in op for op in operations)


class _Again:
    """The inputs of a branch for another run: caches as they were before the first one."""

    def __init__(self, names: Sequence[str], inputs: Sequence[Any]) -> None:
        self.inputs = [copy.deepcopy(v) if n in CACHE_NAMES else v for n, v in zip(names, inputs, strict=True)]
        self.names = names

    def __call__(self) -> list[Any]:
        return [copy.deepcopy(v) if n in CACHE_NAMES else v for n, v in zip(self.names, self.inputs, strict=True)]


def _is_empty(item: Any) -> bool:
    return isinstance(item, tuple) and not item


def batch_axes(small: Claim, large: Claim) -> tuple[RegionInput, ...] | str:
    """Which axis of each input carries the batch, from two runs with different batch sizes; or why that is unclear."""
    found = []
    for name, a, b in zip(small.names, small.shapes, large.shapes, strict=True):
        axis = _batch_axis(a, b, small.samples, large.samples)
        if isinstance(axis, str):
            return f"input {name}: {axis}"
        if small.sequence_first and axis == 1 and _carries_tokens(a, small.residual[:-1]):
            found.append(RegionInput(name, 0, 1, sequence_first=True))
            continue
        lead = small.residual[:2][::-1] if small.sequence_first else small.residual[:-1]
        found.append(RegionInput(name, axis, 1 if axis == 0 and _carries_tokens(a, lead) else None))
    return tuple(found)


def layout_of(residual: Tensor, modules: Sequence[nn.Module]) -> Layout:
    """Layout of the residual stream: feature maps are NCHW unless a module reads the last axis as channels, and three axes are
    NTC unless the first module that reads one of them as channels reads the second.
    """
    if residual.dim() == 2:
        return "NC"
    if residual.dim() == 3:
        parts = (part for module in modules for part in module.modules())
        return next((layout for part in parts if (layout := _read_as(part, residual))), "NTC")
    if residual.dim() == 4:
        for module in modules:
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    return "NCHW"
                if isinstance(part, nn.Linear) and part.in_features == residual.shape[-1]:
                    return "NHWC"
        return "NCHW"
    return "other"


def _read_as(part: nn.Module, residual: Tensor) -> Layout | None:
    """The layout that a layer takes `(N, ?, ?)` for, if it could read it."""
    _, second, last = residual.shape
    if isinstance(part, nn.Conv1d):
        return "NCT" if part.in_channels == second else None
    if isinstance(part, nn.BatchNorm1d):
        return "NCT" if part.num_features == second else None
    if isinstance(part, nn.GroupNorm):
        return "NCT" if part.num_channels == second else None
    if isinstance(part, nn.Linear):
        return "NTC" if part.in_features == last else None
    return "NTC" if isinstance(part, nn.LayerNorm) and part.normalized_shape == (last,) else None


def kind_of_site(operations: frozenset[str], modules: Sequence[tuple[str, nn.Module]], token: bool) -> Kind:
    """attention, mlp or block, by the modules' class names first and by the operations seen second."""
    for name, module in modules:
        words = f"{type(module).__name__} {name.rsplit('.', 1)[-1]}".lower()
        if "attention" in words or "attn" in words:
            return "attention"
        if any(word in words for word in ("mlp", "ffn", "feedforward", "feed_forward", "moe", "intermediate")):
            return "mlp"
    if any("scaled_dot_product" in op or "bmm" in op for op in operations):
        return "attention"
    if operations and not any("convolution" in op for op in operations) and token:
        return "mlp"
    return "block"


def _separable_by_sample(
    branch: Branch, value: Tensor, inputs: Callable[[], Sequence[Any]], axes: tuple[RegionInput, ...]
) -> str:
    size = len(value)
    for rows in ([size - 1], [size - 1, 0]):
        index = torch.tensor(rows, device=value.device)
        part = _first(branch, branch(*[take_samples(v, a, index, size) for v, a in zip(inputs(), axes, strict=True)]))
        if part.shape != value[index].shape or not _close(part, value[index], value):
            return "a sample's result depends on its batch mates"
    return ""


def _separable_by_token(
    branch: Branch,
    value: Tensor,
    residual: Tensor,
    inputs: Sequence[Any],
    axes: tuple[RegionInput, ...],
    layout: Layout,
) -> str:
    if layout not in ("NTC", "NHWC"):
        return "no token axis"
    if any(a.batch_axis is not None and a.token_axis is None for a in axes):
        return "an input has a batch axis but no token axis"
    lead = residual.dim() - 1
    rows = value.flatten(0, lead - 1)
    generator = torch.Generator().manual_seed(0)
    for count in {max(2, len(rows) // 2), 1}:  # two at least: tokens that mix are not seen in one
        index = torch.randperm(len(rows), generator=generator)[:count].sort().values.to(value.device)
        part = _first(branch, branch(*[take_tokens(v, a, index, lead) for v, a in zip(inputs, axes, strict=True)]))
        if part.numel() != rows[index].numel() or not _close(part.reshape(rows[index].shape), rows[index], value):
            return "a token's result depends on other tokens"
    return ""


def _reason(check: Callable[[], str]) -> str:
    try:
        with unnoted():
            return check()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        return f"the branch refuses a part of its input ({first[:80]})"


def _close(part: Tensor, whole: Tensor, scale: Tensor) -> bool:
    # padding may legitimately hold NaN (a softmax over nothing); it must then do so in both
    part, whole, scale = part.nan_to_num(), whole.nan_to_num(), scale.nan_to_num()
    limit = _TOLERANCE.get(whole.dtype, 2e-4) * float(scale.abs().max().clamp_min(1e-12))
    return float((part - whole).abs().max()) <= limit


def _first(branch: Branch, output: Any) -> Tensor:
    return output[0] if branch.escapes else output


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    held = parts(value)
    return None if held is None else [_shape(item) for item in held]


def _batch_axis(small: Any, large: Any, n: int, m: int) -> int | str | None:
    if isinstance(small, list) and isinstance(large, list):
        axes = {_batch_axis(a, b, n, m) for a, b in zip(small, large, strict=False)}
        return axes.pop() if len(axes) == 1 else None if not axes else "its parts carry the batch on different axes"
    if small is None or large is None:
        return None
    if len(small) != len(large):
        return "its rank depends on the batch size"
    changed = [axis for axis, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if not changed:
        return (
            0 if small and small[0] == 1 else None
        )  # length 1 is broadcast now and may carry the batch in another call
    if len(changed) > 1 or (small[changed[0]], large[changed[0]]) != (n, m):
        return "the batch is folded into another axis"
    return changed[0]


def _carries_tokens(shape: Any, lead: Sequence[int]) -> bool:
    return isinstance(shape, tuple) and len(shape) >= len(lead) and shape[: len(lead)] == tuple(lead)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        else:
            found += _tensors(parts(value) or ())
    return found
