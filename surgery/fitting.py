"""`fit_skip_paths`: skip paths in closed form, before (and again after) routing.

One *twin pass* fits all sites in order: the first half of the batch runs dense, the second half runs gated. At each
site the map is solved from the gated half's residual stream to what the dense half has after the add, and then used at
once, so that every later map also repairs the error that reaches it.

Axis letters: `N` samples, `T` tokens, `C` channels, `M` rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import least_squares, narrowing
from surgery.branches import Branch, take_samples
from surgery.calling import Batch, batches
from surgery.chain_reading import read_chain
from surgery.chains import Weights
from surgery.context import handled, scope, state_of
from surgery.costs import place, run
from surgery.errors import DataError, SurgeryError
from surgery.gates import Gate, iter_gates
from surgery.head_gates import HeadGate
from surgery.lockstep import Lockstep
from surgery.progress import Progress, silent
from surgery.rows import gathered, neighbours, positions_shape, to_rows
from surgery.sites import Layout
from surgery.skip_paths import AffineSkip, DepthwiseSkip, LinearSkip, LowRankSkip, NarrowSkip, SkipPath, chain_features

_ELEMENTS = 2**26  # largest residual stream of the twin pass; bounds memory
_PART = 32  # samples that run from one site to the next at once; bounds that of what branches make
_ROWS = 2**16  # rows per least-squares problem; more change the maps by less than their noise
_NEIGHBOURS = 2**23  # numbers in the rows of a depthwise problem
_HIDDEN = 2**26  # likewise of a narrow one
_EACH, _FEW = 32, 2**14  # its rows per number in a row, and rows that are few enough in any case
_PRODUCTS = 2**36  # multiply-adds of one covariance, as long as there are twice as many rows as numbers in one


def fit_skip_paths(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    decisions: Literal["random", "routed", "nested"] = "random",
    samples: int = 512,
    ridge: float = least_squares.RIDGE,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Fit every skip path in closed form; nothing else changes.

    Args:
        gated: A gated model.
        data: Batches; the first `samples` samples are used (fewer where memory asks for it).
        decisions: What the gated half of the twin pass skips: `random` draws a rate in [0.2, 1] per sample, `routed`
            asks the routers at the current threshold and fits on what they skip, `nested` skips the first sites of the
            cut order (`surgery.cutting`), another number of them for each sample.
        samples: Number of samples.
        ridge: Ridge relative to the mean variance of the residual stream.
        seed: Seed of the random decisions.
        progress: Called with the number of sites done.

    Returns:
        Per site, the error that is left in the stream as a share of the error of skipping without a skip path, measured
        on held-out rows (1 where the fitted map was worse and has been reset to contribute nothing, and where too few
        rows were skipped for a fit, which leaves the map as it was).

    Raises:
        DataError: If the data yields nothing.
    """
    state = state_of(gated)
    if all(gate.skip_path.is_identity for _, gate in iter_gates(gated)):
        return {}
    widest = max(p.site.channels * p.site.positions for p in state.plan.sites)
    batch = gather(data, max(8, min(samples, _ELEMENTS // (2 * widest))))
    batch = place(batch, gated)
    parts = torch.arange(batch.size, device=batch.device).split(_PART)
    twins = _Twins(
        decisions,
        ridge,
        torch.Generator().manual_seed(seed),
        len(state.names),
        progress or silent,
        state.order,
        batch.size,
        Lockstep(len(parts)),
    )

    def job(number: int, rows: Tensor) -> None:
        with handled(gated, _TwinPass(twins, number, rows)):
            run(gated, batch.rows(torch.cat((rows, rows))))

    with torch.no_grad():
        twins.steps.run([partial(job, *one) for one in enumerate(parts)], batch.device)
    return twins.left


@dataclass(slots=True)
class _Twins:
    """What the parts of a twin pass share."""

    decisions: str
    ridge: float
    generator: torch.Generator
    total: int
    progress: Progress
    order: tuple[str, ...]
    count: int
    """Samples of all parts."""
    steps: Lockstep
    left: dict[str, float] = field(default_factory=dict)
    levels: Tensor | None = None
    drawn: list[Tensor] = field(default_factory=list)
    """Decisions for all samples, one tensor for every gate so far."""

    def draw(self, number: int, site: str, shape: Sequence[int]) -> Tensor:
        """Decisions `(N, *positions)` of all samples at the gate with this number; `shape` is that of a part."""
        if number == len(self.drawn):
            if self.decisions == "nested":
                # sites that are cut late see streams where nearly everything before is cut, the first ones all kinds
                levels = torch.rand(self.count, generator=torch.Generator().manual_seed(0)) * len(self.order)
                self.drawn.append(levels <= self.order.index(site))
            else:
                if self.levels is None:
                    self.levels = 0.2 + 0.8 * torch.rand(self.count, generator=self.generator)
                levels = self.levels.view(-1, *(1,) * (len(shape) - 1))
                self.drawn.append(torch.rand(self.count, *shape[1:], generator=self.generator) < levels)
        return self.drawn[number]


@dataclass(slots=True)
class _TwinPass:
    """Gate handler of one part: dense rows first, gated rows second.

    Args:
        twins: What is common to all parts.
        number: Of this one.
        rows: Numbers of its samples.
    """

    twins: _Twins
    number: int
    rows: Tensor
    gates: int = 0

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        n = len(self.rows)
        if isinstance(gate, HeadGate):  # an inactive head leaves nothing to fit
            active = torch.cat((torch.ones_like(first := self._decide(gate, residual)), first))
            return gate.mask(branch, left, residual, inputs, active)
        output = branch(*inputs)
        value, *escaped = output if branch.escapes else (output,)
        base = torch.zeros_like(value) if left is None else left
        target = base[:n] + value[:n]  # the dense stream after the add
        active = self._decide(gate, residual)
        if not gate.skip_path.is_identity:
            chosen = ~active if self.twins.decisions == "routed" else torch.ones_like(active)
            wanted = target - base[n:]
            brought = (residual[n:], wanted, base[n:], self._chosen(gate, residual, chosen))
            self.twins.steps.meet(self.number, brought, partial(self._fit, gate, branch, residual, inputs))
        kept, skipped = value[n:], gate.skip_path(residual[n:])
        result = torch.cat((target, base[n:] + torch.where(gate.expand(active, kept), kept, skipped)))
        return (result, *escaped) if branch.escapes else result

    def _fit(
        self, gate: Gate, branch: Branch, residual: Tensor, inputs: Sequence[Any], brought: list[tuple[Tensor, ...]]
    ) -> list[None]:
        twins = self.twins
        weights = _weights(gate, branch, residual, inputs)
        streams, wanted, base, rows = (torch.cat(parts) for parts in zip(*brought, strict=True))
        twins.left[gate.site.name] = fit_one(gate.skip_path, streams, wanted, base, rows, twins.ridge, weights)
        twins.progress("fitting skip paths", len(twins.left), twins.total)
        return [None] * len(brought)

    def _decide(self, gate: Gate, residual: Tensor) -> Tensor:
        shape = gate.shape_of(residual[: len(self.rows)])
        if gate.always_on:
            return torch.ones(shape, dtype=torch.bool, device=residual.device)
        if self.twins.decisions == "routed":
            return gate.decide(residual)[0][len(self.rows) :]
        self.gates += 1
        drawn = self.twins.draw(self.gates - 1, gate.site.name, shape)
        return drawn[self.rows.to(drawn.device)].to(residual.device)

    def _chosen(self, gate: Gate, residual: Tensor, chosen: Tensor) -> Tensor:
        """Bool mask of the positions `(N, *positions)` to fit on: chosen ones that are not padding."""
        n = len(self.rows)
        shape = positions_shape(residual[n:], gate.site.layout)
        rows = chosen if chosen.shape == shape else chosen.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
        running = scope()
        if running is not None and running.mask is not None and running.mask.shape[1:] == shape[1:]:
            rows = rows & running.mask[n:]
        return rows


def fit_one(
    path: SkipPath,
    residual: Tensor,
    wanted: Tensor,
    base: Tensor,
    rows: Tensor,
    ridge: float,
    weights: Weights | None = None,
) -> float:
    """Fit one skip path on every fifth-excluded row and judge it on the fifth ones.

    The judgement compares streams after LayerNorm where the last axis holds channels, since a next layer reads them so
    (plain squared error in a post-norm network prefers maps that are worse after the norm). `weights` are the branch's own,
    for a narrow path that holds no channels of it yet.

    Returns:
        Error left, as a share of the error without a skip path; 1 if the path was reset, or kept for want of rows.
    """
    layout = path.layout
    index = rows.flatten().nonzero().squeeze(1)
    if len(index) < 32:
        return 1.0
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[: _most_rows(path, weights)]
    index = index[order.to(index.device)]
    y, b = (to_rows(t, layout)[index] for t in (wanted, base))
    x = _read(path, residual, index, weights)
    held, used = slice(0, len(index) // 5), slice(len(index) // 5, None)
    if weights is not None and isinstance(path, NarrowSkip):
        kept = narrowing.narrowest(x[used], y[used], path.width, ridge)
        narrowing.adopt(path, weights, kept)
        x = x[:, kept]
        if path.inner:
            numbers = path.chain.inner * path.chain.middle**2
            most = max(_FEW // 4, 2 * numbers, _HIDDEN // numbers)
            narrowing.fit_middle(path, weights, kept, residual, index[used][:most], ridge)
            x = _read(path, residual, index, None)
    _solve(path, x[used], y[used], ridge)
    plain = _Rows(path)
    after = _judge(b[held] + plain(x[held]), b[held] + y[held], layout)
    without = _judge(b[held], b[held] + y[held], layout)
    if not math.isfinite(after) or after >= without:
        for parameter in path.parameters():
            parameter.zero_()
        return 1.0
    return after / max(without, 1e-30)


def gather(data: Iterable[Any], samples: int) -> Batch:
    """The first `samples` samples of `data` as one batch; token sequences are padded with zeros at the end.

    Raises:
        DataError: If the data yields nothing.
    """
    found: list[Batch] = []
    count = 0
    for batch in batches(data):
        if found and not _compatible(found[0], batch):
            break  # without an attention mask, sequences of another length cannot be padded
        found.append(batch)
        count += batch.size
        if count >= samples:
            break
    if not found:
        raise DataError("the data yields no batch")
    joined = Batch(
        tuple(_join([b.args[i] for b in found]) for i in range(len(found[0].args))),
        {k: _join([b.kwargs[k] for b in found]) for k in found[0].kwargs},
        None,
    )
    return joined.rows(torch.arange(min(samples, joined.size), device=joined.device))


def _solve(path: SkipPath, x: Tensor, y: Tensor, ridge: float) -> None:
    if isinstance(path, AffineSkip):
        scale, shift = least_squares.affine(x, y, ridge)
        path.scale.copy_(scale)
        path.shift.copy_(shift)
    elif isinstance(path, LinearSkip):
        weight, bias = least_squares.linear(x, y, ridge)
        path.weight.copy_(weight)
        path.bias.copy_(bias)
    elif isinstance(path, DepthwiseSkip):
        kernel, weight, bias = least_squares.depthwise(x.flatten(2), y, ridge=ridge)
        path.kernel.copy_(kernel.view_as(path.kernel))
        path.weight.copy_(weight)
        path.bias.copy_(bias)
    elif isinstance(path, NarrowSkip):
        weight, bias = least_squares.linear(x.flatten(1), y, ridge)
        path.last.copy_(weight.view_as(path.last))
        path.bias.copy_(bias)
    elif isinstance(path, LowRankSkip):
        down, up, bias = least_squares.low_rank(x, y, path.rank, ridge)
        path.down.copy_(down)
        path.up.copy_(up)
        path.bias.copy_(bias)


class _Rows:
    """A skip path applied to rows `(M, C)`, to neighbourhoods `(M, C, 3, 3)`, or to hidden channels `(M, H, K)`."""

    def __init__(self, path: SkipPath) -> None:
        self.path = path

    def __call__(self, rows: Tensor) -> Tensor:
        if isinstance(self.path, NarrowSkip):
            last, bias = self.path.last.to(rows.dtype), self.path.bias.to(rows.dtype)
            return F.linear(rows.flatten(1), last.flatten(1), bias)
        if rows.dim() == 4:
            return self.path(rows)[:, :, 1, 1]
        if self.path.layout == "NCHW":
            return self.path(rows[:, :, None, None])[:, :, 0, 0]
        return self.path(rows)


def _judge(stream: Tensor, target: Tensor, layout: Layout) -> float:
    if layout != "NCHW":
        stream, target = (F.layer_norm(t.float(), t.shape[-1:]) for t in (stream, target))
    return float((stream.double() - target.double()).square().mean())


def _weights(gate: Gate, branch: Branch, residual: Tensor, inputs: Sequence[Any]) -> Weights | None:
    """The branch's own weights, where a narrow path does not hold its channels yet."""
    path = gate.skip_path
    if not isinstance(path, NarrowSkip) or bool(path.first.any()):
        return None
    axes = branch.axes or ()
    cut = [take_samples(v, a, slice(0, 1), len(residual)) for v, a in zip(inputs, axes, strict=False)]
    stream = next((v for v, whole in zip(cut, inputs, strict=False) if whole is residual), None)
    found = None if stream is None else read_chain(lambda: branch(*cut), stream)
    if found is None or found.chain != path.chain:
        raise SurgeryError(
            f"{gate.site.name}: its branch no longer has the layers that were found with it, of which a narrow skip path keeps a "
            "part; find sites again"
        )
    return found


def _most_rows(path: SkipPath, weights: Weights | None) -> int:
    """Rows of one problem, by the numbers that one row has."""
    if isinstance(path, NarrowSkip):
        numbers = (path.width if weights is None else path.chain.width) * max(1, path.chain.last**2)
        quick = max(2 * numbers, _PRODUCTS // numbers**2)
        return min(_ROWS, _HIDDEN // numbers, max(_FEW, _EACH * numbers), quick)
    return min(_ROWS, _NEIGHBOURS // (9 * path.channels)) if isinstance(path, DepthwiseSkip) else _ROWS


def _read(path: SkipPath, residual: Tensor, index: Tensor, weights: Weights | None) -> Tensor:
    """What the map that is solved reads at the positions that `index` numbers, one row each."""
    if isinstance(path, DepthwiseSkip):
        return neighbours(residual, index)
    if not isinstance(path, NarrowSkip):
        return to_rows(residual, path.layout)[index]
    make = path.features if weights is None else partial(chain_features, weights, layout=path.layout)
    return gathered(make, path.chain.last, residual, index, path.layout)


def _compatible(first: Batch, other: Batch) -> bool:
    pairs = [
        *zip(first.args, other.args, strict=False),
        *((first.kwargs[k], other.kwargs.get(k)) for k in first.kwargs),
    ]
    same = all(not isinstance(a, Tensor) or (isinstance(b, Tensor) and a.shape[1:] == b.shape[1:]) for a, b in pairs)
    return same or (
        "attention_mask" in first.kwargs
        and all(not isinstance(a, Tensor) or (isinstance(b, Tensor) and a.dim() == b.dim() == 2) for a, b in pairs)
    )


def _join(values: list[Any]) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    length = max(v.shape[1] if v.dim() > 1 else 0 for v in values)
    return torch.cat([F.pad(v, (0, length - v.shape[1])) if v.dim() == 2 else v for v in values])
