"""`regress_routers`: routers learn to predict log harm, in seconds, without a gradient for the backbone's
parameters.

Axis letters: `N` samples, `T` tokens, `F` router features, `M` rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.calling import batches
from surgery.context import state_of
from surgery.costs import place
from surgery.errors import DataError, check_choice, check_count
from surgery.gates import Gate, iter_gates
from surgery.harm import HarmLabels, floor_of
from surgery.labelling import Labeller, Labels
from surgery.progress import Progress, silent
from surgery.routers import Router, SampleRouter

_ROWS_PER_BATCH = 2048
_ROWS = 60_000
_STEPS = 500
_FEWEST = 10  # with fewer rows nothing can be held out, and every input gets the same score
_TINY = 1e-12
_NOTHING_KNOWN = (
    "what skipping it changes is NaN or infinite for every input, or all is padding; look at what the dense model gives "
    "on this data"
)
_NEVER_RAN = (
    "it ran for the example, but for none of the data that routers are fitted on; give data in which it runs, or leave it out "
    "(`sites=`)"
)
_TIE_BREAK = 0.01  # what is left of a prediction that is worth nothing, so that thresholds between inputs exist


@dataclass(frozen=True, slots=True)
class Predictability:
    """How well one router predicts harm on rows that it was not fitted on.

    Args:
        correlation: Pearson correlation with log harm.
        shrinkage: Factor in [0, 1] that the prediction's deviation from its mean was multiplied by; 0 makes the site's
            decision the same for all inputs.
        rows: Rows fitted on.
    """

    correlation: float
    shrinkage: float
    rows: int


@torch.inference_mode(False)
def regress_routers(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    samples: int = 2048,
    seed: int = 0,
    labels: Labels = "auto",
    progress: Progress | None = None,
) -> dict[str, Predictability]:
    """Fit every router to harm labels and set every gate's offset to its log saving.

    Where sites share a router, it is fitted to the labels of all of them at once.

    Args:
        gated: A gated model; only its routers change.
        data: Batches; labels are not used.
        samples: Number of samples to label.
        seed: Seed of initialisation and row sampling.
        labels: `first_order` (`surgery.harm`: a forward and a backward pass), `leave_one_out` (`surgery.leaving_out`: a forward
            pass for every site), or `auto` for the second only where the model lets no gradient through, or a backward pass of
            the first batch does not fit into memory, with a note.
        progress: Called with batches labelled and routers fitted.

    Returns:
        Per site that is not always on, how predictable harm was on held-out rows.

    Raises:
        DataError: If the data yields nothing, or there is no row of a site to learn from.
        NotConverted: If the model has no gates.
        SurgeryError: If `labels` is none of the above.
    """
    check_count("samples", samples, 1)
    check_choice("labels", labels, get_args(Labels))
    report = progress or silent
    groups = {name: [name] for name, gate in iter_gates(gated) if not gate.leader}
    for name, gate in iter_gates(gated):
        if gate.leader:
            groups[gate.planned.leader].append(name)
    features: dict[str, list[Tensor]] = {}
    harms: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    labeller = Labeller(gated, labels, generator)
    unknown: Counter[str] = Counter()
    count = 0
    for batch in batches(data):
        batch = place(batch, gated)
        found = labeller.label(batch)
        for name in (name for name in found if name in groups):
            rows, harm = _rows_of([found[member] for member in groups[name]])
            known = rows.isfinite().all(1) & harm.isfinite().reshape(len(harm), -1).all(1)
            if not known.all():  # the model's own output is no number there
                unknown[name] += int((~known).sum())
                rows, harm = rows[known], harm[known]
            rows, harm = _some(rows, harm, _ROWS_PER_BATCH, generator)
            features.setdefault(name, []).append(rows)
            harms.setdefault(name, []).append(harm)
        count += batch.size
        report("labelling harm", min(count, samples), samples)
        if count >= samples:
            break
    if unknown:
        state_of(gated).note(
            f"{max(unknown.values())} rows were not learned from: what skipping changes there is NaN or infinite"
        )
    result: dict[str, Predictability] = {}
    gates = {name: gate for name, gate in iter_gates(gated) if not gate.always_on}
    for index, (name, gate) in enumerate(gates.items()):
        set_offset(gate)
        if not gate.leader:
            if name not in features:
                raise DataError(f"{name}: {_NEVER_RAN}")
            rows, harm = _some(torch.cat(features[name]), torch.cat(harms[name]), _ROWS, generator)
            if len(rows) == 0:
                raise DataError(f"{name}: {_NOTHING_KNOWN}")
            result |= _fit_group([gates[member] for member in groups[name]], rows, harm, seed + index)
        report("fitting routers", index + 1, len(gates))
    return {name: result[name] for name in gates}


def _some(rows: Tensor, harm: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most `count` of the rows, drawn at random."""
    if len(rows) <= count:
        return rows, harm
    chosen = torch.randperm(len(rows), generator=generator)[:count].to(rows.device)
    return rows[chosen], harm[chosen]


def set_offset(gate: Gate) -> None:
    """Make the gate's scores comparable across sites: subtract the log of the cost that one skipped decision saves."""
    costs = gate.state.costs
    saving = max(gate.saving(), _TINY * costs.dense) / costs.dense
    gate.offset = math.log(saving / (gate.site.positions if gate.per_token else len(gate.site.units)))


def _fit_group(gates: Sequence[Gate], rows: Tensor, harm: Tensor, seed: int) -> dict[str, Predictability]:
    """Fit the router of one gate, or together with it the rows of those that share it, to harm `(M,)` or `(M, H)`."""
    router = gates[0].router
    assert isinstance(router, Router)
    if isinstance(router, SampleRouter):
        router.standardise(rows)
        rows = (rows - router.mean) / router.std
    if len(gates) == 1:
        return {gates[0].site.name: _fit(router, rows, harm, seed).mean()}
    joint = Router(router.features, gates[0].planned.hidden, len(gates)).to(rows.device)
    found = _fit(joint, rows, harm, seed)
    with torch.no_grad():
        router.down.load_state_dict(joint.down.state_dict())
        for index, gate in enumerate(gates):
            gate.router.up.weight.copy_(joint.up.weight[index : index + 1])
            gate.router.up.bias.copy_(joint.up.bias[index : index + 1])
    return {gate.site.name: found.of(index) for index, gate in enumerate(gates)}


@dataclass(frozen=True, slots=True)
class _Fitted:
    """How predictable every column of the harm was."""

    correlation: Tensor
    shrinkage: Tensor
    rows: int

    def mean(self) -> Predictability:
        """Of one site: its heads' mean, where it has some."""
        return Predictability(float(self.correlation.mean()), float(self.shrinkage.mean()), self.rows)

    def of(self, column: int) -> Predictability:
        """Of the site whose harm is that column."""
        return Predictability(float(self.correlation[column]), float(self.shrinkage[column]), self.rows)


def _fit(router: Router, rows: Tensor, harm: Tensor, seed: int) -> _Fitted:
    target = torch.log(harm + floor_of(harm.mean(0)))
    generator = torch.Generator().manual_seed(seed)
    if len(rows) < _FEWEST:
        _initialise(router, generator)
        with torch.no_grad():
            router.up.weight.zero_()
            router.up.bias.copy_(target.mean(0))
        nothing = torch.zeros(target.shape[1:])
        return _Fitted(nothing, nothing, len(rows))
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    held, used = order[: len(order) // 5], order[len(order) // 5 :]
    centre, spread = target[used].mean(0), target[used].std(0).clamp_min(1e-6)  # of every head, where there are some
    x, y = rows[used], (target[used] - centre) / spread
    _initialise(router, generator)
    optimiser = torch.optim.AdamW(router.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=_STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            chosen = torch.randint(len(x), (min(1024, len(x)),), generator=generator).to(x.device)
            loss = F.mse_loss(router.score(x[chosen]), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        predicted, actual = router.score(rows[held]), (target[held] - centre) / spread
        correlation, slope = _correlation(predicted, actual)
        shrinkage = slope.clamp(_TIE_BREAK, 1.0)
        middle = predicted.mean(0)
        # score = centre + spread * (middle + shrinkage * (prediction - middle))
        router.up.weight.mul_((shrinkage * spread).view(-1, 1))
        router.up.bias.sub_(middle).mul_(shrinkage * spread).add_(middle * spread + centre)
    return _Fitted(correlation, shrinkage, len(used))


def _initialise(router: nn.Module, generator: torch.Generator) -> None:
    for module in router.modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            weight = (torch.rand(module.weight.shape, generator=generator) * 2 - 1) * bound
            module.weight.data.copy_(weight)
            module.bias.data.zero_()


def _correlation(predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson correlation, and slope of truth on prediction; 0 where the prediction is constant. Of every column."""
    a, b = predicted - predicted.mean(0), actual - actual.mean(0)
    covariance, variance = (a * b).mean(0), a.square().mean(0)
    known = variance >= 1e-12
    correlation = covariance / (variance * b.square().mean(0)).sqrt().clamp_min(1e-12)
    slope = covariance / variance.clamp_min(1e-12)
    return torch.where(known, correlation, 0.0), torch.where(known, slope, 0.0)


def _rows_of(labels: Sequence[HarmLabels]) -> tuple[Tensor, Tensor]:
    """Features `(M, F)` and harm of one site, `(M,)` or `(M, H)`, or of several that share a router, a column each."""
    rows, harm = labels[0].features.float(), labels[0].harm.float()  # N F, N H
    if len(labels) == 1 and rows.dim() == 2 and harm.dim() == 2:
        return rows, harm
    pairs = [_flatten(label.features, label.harm, label.weights) for label in labels]
    return pairs[0][0], pairs[0][1] if len(pairs) == 1 else torch.stack([harm for _, harm in pairs], 1)


def _flatten(features: Tensor, harm: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, flat = features.flatten(0, harm.dim() - 1).float(), harm.flatten().float()
    if weights is None:
        return rows, flat
    kept = weights.flatten()
    return rows[kept], flat[kept]
