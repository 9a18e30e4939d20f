"""`fit_skip_paths`: skip paths in closed form, before (and again after) routing.

One *twin pass* fits all sites in order: the first half of the batch runs dense, the second half runs gated. At each
site the map is solved from the gated half's residual stream to what the dense half has after the add, and then used at
once, so that every later map also repairs the error that reaches it.

Axis letters: `N` samples, `T` tokens, `C` channels, `M` rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import least_squares
from surgery.branches import Branch, Turned, take_samples, turn, turns
from surgery.calling import Batch, batches
from surgery.chain_reading import read_chain
from surgery.chains import Weights
from surgery.context import handled, scope, state_of
from surgery.costs import place, run
from surgery.errors import DataError, SurgeryError, check_choice, check_count
from surgery.gates import Gate, iter_gates
from surgery.head_gates import HeadGate
from surgery.lockstep import Lockstep
from surgery.progress import Progress, silent
from surgery.rows import positions_shape
from surgery.skip_paths import NarrowSkip
from surgery.solving import Around, fit_one

_ELEMENTS = 2**26  # largest residual stream of the twin pass; bounds memory
_PART = 32  # samples that run from one site to the next at once; bounds that of what branches make


@torch.inference_mode(False)
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
        SurgeryError: If `decisions` is none of these, or `nested` where no cut order of its sites was measured.
    """
    check_choice("decisions", decisions, ("random", "routed", "nested"))
    check_count("samples", samples, 1)
    state = state_of(gated)
    if decisions == "nested" and not set(state.names) <= {*state.order, *state.plan.always_on}:
        raise SurgeryError(
            "decisions 'nested' go by a cut order of whole sites; measure one first (surgery.cut_order), and convert "
            "without heads, which are cut one by one"
        )
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
                if self.levels is None:
                    self.levels = torch.rand(self.count, generator=self.generator) * len(self.order)
                kept = (self.levels <= self.order.index(site)).view(-1, *(1,) * (len(shape) - 1))
                self.drawn.append(kept.expand(self.count, *shape[1:]))
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
        del output
        if left is None:
            target, base, kept = value[:n], None, value[n:]
        else:  # a copy, so that the dense half of the branch's output is not held while other parts run
            target, base, kept = left[:n] + value[:n], left[n:], value[n:].clone()
        del value
        active = self._decide(gate, residual)
        if not gate.skip_path.is_identity:
            chosen = ~active if self.twins.decisions == "routed" else torch.ones_like(active)
            around = Around(residual[n:], target, base, self._chosen(gate, residual, chosen))
            self.twins.steps.meet(self.number, around, partial(self._fit, gate, branch, residual, inputs))
        merged = torch.where(gate.expand(active, kept), kept, gate.skip_path(residual[n:]))
        result = torch.cat((target, merged if base is None else base + merged))
        return (result, *escaped) if branch.escapes else result

    def _fit(
        self, gate: Gate, branch: Branch, residual: Tensor, inputs: Sequence[Any], parts: list[Around]
    ) -> list[None]:
        twins = self.twins
        weights = _weights(gate, branch, residual, inputs)
        twins.left[gate.site.name] = fit_one(gate.skip_path, parts, twins.ridge, weights)
        twins.progress("fitting skip paths", len(twins.left), twins.total)
        return [None] * len(parts)

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
    sizes = [batch.size for batch in found]
    columns = zip(*(batch.tensors for batch in found), strict=True)
    joined = found[0].filled([_join(column, sizes) for column in columns])
    return joined.rows(torch.arange(min(samples, joined.size), device=joined.device))


def _weights(gate: Gate, branch: Branch, residual: Tensor, inputs: Sequence[Any]) -> Weights | None:
    """The branch's own weights, where a narrow path does not hold its channels yet."""
    path = gate.skip_path
    if not isinstance(path, NarrowSkip) or path.holds_channels:
        return None
    axes = branch.axes or ()
    cut = [take_samples(v, a, slice(0, 1), len(residual)) for v, a in zip(inputs, axes, strict=False)]
    plain = branch
    if isinstance(branch, Turned):  # read as it is: a stream that is turned first is no chain
        cut, plain = turn(cut, turns(branch.axes, cut)), branch.branch
    stream = next((v for v, whole in zip(cut, inputs, strict=False) if whole is residual), None)
    found = None if stream is None else read_chain(lambda: plain(*cut), stream)
    if found is None or found.chain != path.chain:
        raise SurgeryError(
            f"{gate.site.name}: its branch no longer has the layers that were found with it, of which a narrow skip path keeps a "
            "part; find sites again"
        )
    return found


def _compatible(first: Batch, other: Batch) -> bool:
    if list(first.kwargs) != list(other.kwargs) or len(first.tensors) != len(other.tensors):
        return False
    pairs = list(zip(first.tensors, other.tensors, strict=True))
    if all(a.shape[1:] == b.shape[1:] for a, b in pairs):
        return True
    return "attention_mask" in first.kwargs and all(a.dim() == b.dim() == 2 for a, b in pairs)


def _join(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The samples of all batches; what the samples of a batch share stays as it is in the first one."""
    if any(value.dim() == 0 or len(value) != size for value, size in zip(values, sizes, strict=True)):
        return values[0]
    length = max(v.shape[1] if v.dim() > 1 else 0 for v in values)
    return torch.cat([F.pad(v, (0, length - v.shape[1])) if v.dim() == 2 else v for v in values])
