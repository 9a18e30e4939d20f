"""`audit`: what the routing does to whom. Which inputs get less compute, which sites decide, what skipping broke.

Axis letters: `N` samples, `S` sites, `K` classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.audits import Audit, GroupAudit, Mistake, Observed, SiteAudit
from surgery.calling import Batch, batches, call, call_dense, evaluating, is_logits, length_of, read_output
from surgery.context import Event, runs_dense, state_of, tape
from surgery.costs import Decided, place
from surgery.errors import DataError
from surgery.log_rows import input_hashes
from surgery.progress import Progress, silent
from surgery.rewriting import remove
from surgery.scoring import entropy, predicted

NEAR = 0.1
"""Scores this close to the threshold are near it: they are logs, so 0.1 is a tenth of harm per cost saved."""
NOISE = 0.05
"""Standard deviation of the noise, as a share of the inputs' own."""


def audit(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    dense: nn.Module | None = None,
    groups: Sequence[Any] | None = None,
    label_names: Sequence[str] = (),
    shown: Sequence[str] = (),
    noise: float = NOISE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Run `gated` and the dense model on data and say what the routing does to whom.

    Args:
        gated: A gated model, as it is set now.
        data: Batches, read once.
        dense: The original model; None takes the gates out of a copy of `gated`.
        groups: For every input the group that it belongs to, such as a language or a camera.
        label_names: Names of the classes.
        shown: For every input how people see it (its text), to show beside errors.
        noise: Standard deviation of noise on the inputs as a share of their own; 0 tries none. Inputs of integers (texts)
            get none.
        seed: Of the noise.
        progress: Called after every batch.

    Returns:
        What every gate does, who is given less compute, what skipping broke, and how near to thresholds decisions are.

    Raises:
        DataError: If the data yields nothing, or `groups` has another length than the data.
        NotConverted: If the model has no gates.
    """
    return audited(gated, data, dense, groups, label_names, shown, noise, seed, progress or silent)[0]


def audited(
    gated: nn.Module,
    data: Iterable[Any],
    dense: nn.Module | None,
    groups: Sequence[Any] | None,
    label_names: Sequence[str],
    shown: Sequence[str],
    noise: float,
    seed: int,
    progress: Progress,
) -> tuple[Audit, Observed]:
    """The audit, and what it was made from."""
    state = state_of(gated)
    reference = remove(gated).eval() if dense is None else dense
    run = _Run(gated, reference, noise, seed)
    total = length_of(data)
    with evaluating(gated), evaluating(reference):
        for index, batch in enumerate(batches(data)):
            run.add(place(batch, gated))
            progress("auditing", index + 1, total)
    seen = run.observed()
    if groups is not None and len(groups) != len(seen.costs):
        raise DataError(f"{len(groups)} groups were given for {len(seen.costs)} inputs; give one for each, in order")
    notes = ["every call ran dense: set a budget below 1"] if run.dense_calls else []
    if noise and not run.noised and not run.dense_calls:
        notes.append("inputs are integers, so no noise was tried on them")
    policies = seen.policies
    count = sum(policies.values())
    classes = _grouped(seen, _named(seen.labels.tolist(), label_names)) if seen.labels is not None else ()
    wrong = _mistakes(seen, label_names, shown)
    both = seen.labels is not None and seen.predicted is not None and seen.dense is not None
    repaired = 0
    if both:
        assert seen.labels is not None and seen.predicted is not None and seen.dense is not None
        repaired = int(((seen.predicted == seen.labels) & (seen.dense != seen.labels)).sum())
    per_token = any(len(values) > 1 for one in seen.decisions[:8] for values in one.values())
    return Audit(
        inputs=len(seen.costs),
        policies=len(policies),
        decided=f"{count:,} {'tokens' if per_token else 'inputs'}",
        input_information=entropy([number / count for number in policies.values()]),
        cost=float((seen.costs * seen.weights).sum() / seen.weights.sum()),
        sites=tuple(run.site(index, name, seen) for index, name in enumerate(state.units)),
        classes=classes,
        groups=() if groups is None else _grouped(seen, [str(one) for one in groups]),
        errors=tuple(wrong),
        repaired=repaired,
        noise=noise,
        flipped=run.flipped / run.noised if run.noised else None,
        dense_flipped=run.dense_flipped / run.noised if run.noised else None,
        notes=tuple(notes),
    ), seen


class _Run:
    """One pass over the data."""

    def __init__(self, gated: nn.Module, reference: nn.Module, noise: float, seed: int) -> None:
        self.gated, self.reference, self.noise = gated, reference, noise
        self.state = state_of(gated)
        self.generator = torch.Generator().manual_seed(seed)
        self.parts: dict[str, list[Any]] = {
            name: [] for name in ("rates", "costs", "weights", "hashes", "labels", "predicted", "dense", "decisions")
        }
        self.near: Counter[str] = Counter()
        self.scored: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.tried: Counter[str] = Counter()
        self.noised = self.flipped = self.dense_flipped = 0
        self.dense_calls = False

    def add(self, batch: Batch) -> None:
        """Run one batch, and once more with noise."""
        size = batch.size
        if runs_dense(self.state):
            self.dense_calls = True
        reference = call_dense(self.reference, batch)
        with tape(self.gated) as events:
            output = call(self.gated, batch)
        classes = is_logits(self.reference, batch, reference, self.state.outputs) and read_output(reference).dim() == 2
        labels = batch.labels if batch.labels is not None and batch.labels.dim() == 1 else None
        did = Decided.of(events, self.state.units, size)
        found = {
            "rates": did.rates,
            "costs": did.costs(self.state.costs),
            "weights": did.weights,
            "labels": None if labels is None or labels.is_floating_point() else labels.cpu(),
            "predicted": predicted(read_output(output)).cpu() if classes else None,
            "dense": predicted(read_output(reference)).cpu() if classes else None,
        }
        for name, value in found.items():
            self.parts[name].append(value)
        self.parts["hashes"] += input_hashes(batch)
        self.parts["decisions"] += _decisions(events, size)
        for event in events:
            if event.scores is None:
                continue
            near = (event.scores - self.state.threshold).abs() < NEAR
            for unit, part, real in _by_unit(event, near):
                self.near[unit] += int((part & real).sum())
                self.scored[unit] += int(real.sum())
        if self.noise and events:
            self._disturb(batch, events, found["predicted"], found["dense"])

    def _disturb(self, batch: Batch, events: Sequence[Event], mine: Tensor | None, dense: Tensor | None) -> None:
        masks = [value for name, value in batch.kwargs.items() if "mask" in name]
        floats = [t for t in batch.tensors if t.is_floating_point() and t.dim() > 1 and bool(t.isfinite().all())]
        floats = [t for t in floats if not any(t is mask for mask in masks)]
        if not floats:
            return
        noisy = batch.filled([self._noisy(t) if any(t is f for f in floats) else t for t in batch.tensors])
        with tape(self.gated) as others:
            output = call(self.gated, noisy)
        for event, other in zip(events, others, strict=True):
            for unit, part, real in _by_unit(event, event.decisions != other.decisions):
                self.moved[unit] += int((part & real).sum())
                self.tried[unit] += int(real.sum())
        if mine is not None and dense is not None:
            self.noised += batch.size
            self.flipped += int((predicted(read_output(output)).cpu() != mine).sum())
            self.dense_flipped += int((predicted(read_output(call(self.reference, noisy))).cpu() != dense).sum())

    def _noisy(self, value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=self.generator).to(value.device, value.dtype)
        return value + self.noise * value.std().nan_to_num() * drawn

    def observed(self) -> Observed:
        """All batches, one after the other."""

        def joined(name: str) -> Tensor | None:
            return None if any(one is None for one in self.parts[name]) else torch.cat(self.parts[name])

        return Observed(
            self.state.units,
            torch.cat(self.parts["rates"]),
            torch.cat(self.parts["costs"]),
            torch.cat(self.parts["weights"]),
            self.parts["hashes"],
            joined("labels"),
            joined("predicted"),
            joined("dense"),
            self.parts["decisions"],
        )

    def site(self, index: int, name: str, seen: Observed) -> SiteAudit:
        """The row of one gate."""
        weights = seen.weights / seen.weights.sum()
        rate = float((seen.rates[:, index] * weights).sum())
        return SiteAudit(
            name,
            rate,
            entropy([rate, 1 - rate]),
            None if seen.labels is None else _information(seen.rates[:, index], seen.weights, seen.labels),
            self.near[name] / self.scored[name] if self.scored[name] else None,
            self.moved[name] / self.tried[name] if self.tried[name] else None,
        )


def _decisions(events: Sequence[Event], size: int) -> list[dict[str, Tensor]]:
    rows: list[dict[str, Tensor]] = [{} for _ in range(size)]
    for event in events:
        for unit, values, real in _by_unit(event, event.decisions):
            for index, row in enumerate(rows):
                row[unit] = values[index][real[index]]
    return rows


def _by_unit(event: Event, values: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """For the site, or each of its heads: `values` `(N, positions)`, and which of these are no padding."""
    units = event.gate.site.units
    flat = values.reshape(len(values), -1).cpu()
    if len(units) > 1:
        return [(unit, flat[:, i : i + 1], torch.ones(len(flat), 1).bool()) for i, unit in enumerate(units)]
    real = (
        torch.ones_like(flat).bool() if event.weights is None else event.weights.reshape(len(values), -1).bool().cpu()
    )
    return [(event.site, flat, real)]


def _information(rates: Tensor, weights: Tensor, labels: Tensor) -> float:
    """Of a decision and the class, in bits, less the bias that few samples bring (Miller and Madow)."""
    total = float(weights.sum())
    overall = float((rates * weights).sum()) / total
    known, classes = 0.0, labels.unique()
    for one in classes:
        chosen = labels == one
        share = float(weights[chosen].sum()) / total
        rate = float((rates[chosen] * weights[chosen]).sum() / weights[chosen].sum().clamp_min(1e-12))
        known += share * entropy([rate, 1 - rate])
    # inputs are the independent samples, however many tokens each holds
    bias = (len(classes) - 1) / (2 * len(labels) * math.log(2)) if 0 < overall < 1 else 0.0
    return max(0.0, entropy([overall, 1 - overall]) - known - bias)


def _named(values: Iterable[int], names: Sequence[str]) -> list[str]:
    return [names[value] if 0 <= value < len(names) else str(value) for value in values]


def _grouped(seen: Observed, groups: Sequence[str]) -> tuple[GroupAudit, ...]:
    rows = []
    members: dict[str, list[int]] = {}
    for index, name in enumerate(groups):
        members.setdefault(name, []).append(index)
    for name in sorted(members):
        chosen = torch.tensor(members[name])
        costs, weights = seen.costs[chosen], seen.weights[chosen].double()
        parts = weights / weights.sum().clamp_min(1e-12)
        mean = float((parts * costs).sum())
        spread = float((parts * (costs - mean)).square().sum())  # of a ratio of sums, by linearisation
        half = 1.96 * math.sqrt(spread * len(costs) / (len(costs) - 1)) if len(costs) > 1 else math.nan

        def share(a: Tensor | None, b: Tensor | None, chosen: Tensor = chosen) -> float | None:
            return None if a is None or b is None else float((a[chosen] == b[chosen]).float().mean())

        rows.append(
            GroupAudit(
                name,
                len(costs),
                mean,
                mean - half if math.isfinite(half) else 0.0,
                mean + half if math.isfinite(half) else 1.0,
                share(seen.predicted, seen.labels),
                share(seen.dense, seen.labels),
                share(seen.predicted, seen.dense),
            )
        )
    return tuple(rows)


def _mistakes(seen: Observed, names: Sequence[str], shown: Sequence[str]) -> list[Mistake]:
    if seen.labels is None or seen.predicted is None or seen.dense is None:
        return []
    wrong = ((seen.dense == seen.labels) & (seen.predicted != seen.labels)).nonzero().flatten().tolist()
    labels, predicted = _named(seen.labels.tolist(), names), _named(seen.predicted.tolist(), names)
    return [
        Mistake(i, seen.hashes[i], labels[i], predicted[i], float(seen.costs[i]), shown[i] if i < len(shown) else "")
        for i in wrong
    ]
