"""Which pictures a report has, of which numbers, with which words.

Axis letters: `S` sites, `K` clusters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.audits import Audit, Observed
from surgery.budgets import passes_at
from surgery.context import state_of
from surgery.gates import iter_gates
from surgery.logs import Log, Row
from surgery.reports import Report
from surgery.scoring import entropy
from surgery.scripts import report_figures as figures
from surgery.scripts.report_measuring import Subject
from surgery.state import GatedState
from surgery.tables import SHARES

SLICES = 24
CLUSTERS = 6


def gallery(
    subject: Subject,
    found: Audit,
    seen: Observed,
    sweep: Mapping[float, Report],
    timed: Mapping[float, Mapping[str, float]],
    speed: int,
    log: Log | None,
) -> list[tuple[str, str, str, figures.Draw, float, float]]:
    """Key, title, text, what draws it, width and height of every picture that there are numbers for."""
    state, names = state_of(subject.gated), list(seen.names)
    height = max(3.0, 1.4 + 0.24 * len(names))
    per_token = any(gate.per_token for _, gate in iter_gates(subject.gated))
    short = "; a short input counts as much as a long one here, while the budget counts tokens" if per_token else ""
    drawn: list[tuple[str, str, str, figures.Draw, float, float]] = []
    if sweep:
        metric, unit, dense = _metric(next(iter(sweep.values())))
        points = _points(sweep, timed, unit)
        drawn.append(
            (
                "tradeoff",
                f"{metric.capitalize()} against cost{' and time' if timed else ''}",
                "One checkpoint at several budgets. Static: a fixed set of sites with the same skip paths. Random: each "
                "site at its active rate, whatever the input."
                f"{' Times are medians of pairs of calls, side by side with dense.' if timed else ''}",
                figures.tradeoff(points, {"metric": dense * unit}, f"{metric}{' (%)' if unit == 100 else ''}", speed),
                9,
                4,
            )
        )
    if seen.labels is not None:
        classes = seen.labels.unique().tolist()[:60]
        known = subject.loaded.label_names
        columns = [known[one] if 0 <= one < len(known) else str(one) for one in classes]
        values = [[_rate(seen, index, seen.labels == one) for one in classes] for index in range(len(names))]
        drawn.append(
            (
                "classes",
                "What runs for which class",
                "Active rate of every site by class, in per cent of the class's inputs (or tokens).",
                figures.heat(values, names, columns, "active rate (%)", xlabel="class"),
                9,
                height,
            )
        )
    drawn.append(
        (
            "costs",
            "Cost of single inputs",
            f"Every input has a cost of its own, routers and skip paths included{short}.",
            figures.histogram(seen.costs.tolist(), state.budget),
            9,
            3.2,
        )
    )
    clusters = _clusters(seen)
    if clusters is not None:
        centres, sizes = clusters
        columns = [f"{size:,}" for size in sizes]
        drawn.append(
            (
                "policies",
                "Policies, clustered",
                "Inputs whose sites ran alike (k-means on active rates); the number below is how many inputs each cluster has.",
                figures.heat(centres.T.tolist(), names, columns, "active rate (%)", xlabel="inputs in the cluster"),
                9,
                height,
            )
        )
    if log is not None:
        drawn.append(
            (
                "drift",
                "Drift over time",
                "From the log: mean cost, and the Jensen-Shannon divergence of active rates from the first rows' budget "
                "as calibrated, for the four sites that moved most.",
                figures.drift(*_drift(log, state)),
                9,
                4.4,
            )
        )
    return drawn


def _metric(report: Report) -> tuple[str, int, float]:
    """Name, factor (100 for shares) and the dense model's value."""
    if not report.metric:
        return f"agreement with dense ({report.agreement_of})", 100 if report.agreement_of == "argmax" else 1, 1.0
    name = next(iter(report.metric))
    return name.replace("_", " "), 100 if name in SHARES else 1, report.dense_metric[name]


def _points(
    sweep: Mapping[float, Report], timed: Mapping[float, Mapping[str, float]], unit: int
) -> dict[str, list[dict[str, float]]]:
    points: dict[str, list[dict[str, float]]] = {"gated": [], "static": [], "random": []}
    for budget, report in sweep.items():
        value = next(iter(report.metric.values()), report.agreement)
        times = timed.get(budget, {})
        rows = {"gated": (report.cost, value), **{p.name: (p.cost, p.metric) for p in report.peers}}
        for name, own in points.items():
            if name in rows:
                cost, metric = rows[name]
                own.append({"cost": cost, "metric": unit * metric, **({"time": times[name]} if name in times else {})})
    return points


def _rate(seen: Observed, site: int, chosen: Tensor) -> float:
    weights = seen.weights[chosen]
    return float((seen.rates[chosen, site] * weights).sum() / weights.sum().clamp_min(1e-12))


def _clusters(seen: Observed) -> tuple[Tensor, list[int]] | None:
    """Centres `(K, S)` and sizes, largest first; None where scikit-learn is missing or all inputs are treated alike."""
    distinct = len(seen.rates.unique(dim=0))
    if distinct < 2:
        return None
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return None
    fitted = KMeans(min(CLUSTERS, distinct), n_init=4, random_state=0).fit(seen.rates.numpy())
    labels = torch.from_numpy(fitted.labels_).long()
    sizes = labels.bincount()
    order = sizes.argsort(descending=True)
    centres = torch.stack([seen.rates[labels == one].mean(0) for one in order])
    return centres, sizes[order].tolist()


def _drift(log: Log, state: GatedState) -> tuple[list[float], list[float], dict[str, list[float]]]:
    rows = sorted(log, key=lambda row: row.time)
    parts = _slices(rows, min(SLICES, max(1, len(rows) // 8)))
    budget = next((row.budget for row in rows if row.budget is not None), None)
    expected = passes_at(state, budget)[0].active_rate if budget is not None and budget < 1 else {}
    start, times, costs = rows[0].time, [], []
    divergence: dict[str, list[float]] = {name: [] for name in log.sites if name in expected}
    for part in parts:
        times.append((part[len(part) // 2].time - start).total_seconds())
        weights = [max((total for _, total in _decided(row).values()), default=1) for row in part]
        costs.append(sum(row.cost * weight for row, weight in zip(part, weights, strict=True)) / max(sum(weights), 1))
        rates = first_rates(part)
        for name, values in divergence.items():
            values.append(jensen_shannon(rates.get(name, 1.0), expected[name]))
    return times, costs, divergence


def first_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the decisions of some rows that were open, per site: of all real tokens alike, and of first passes."""
    opened: Counter[str] = Counter()
    made: Counter[str] = Counter()
    for row in rows:
        for site, (count, total) in _decided(row).items():
            opened[site] += count
            made[site] += total
    return {site: opened[site] / total for site, total in made.items() if total}


def _decided(row: Row) -> dict[str, tuple[int, int]]:
    """How many of a row's decisions were open, and how many there were, per site; padding does not count."""
    found: dict[str, tuple[int, int]] = {}
    for decision in (one for taken in row.passes for one in taken):
        values = decision.values if decision.real is None else decision.values[decision.real]
        count, total = found.get(decision.site, (0, 0))
        found[decision.site] = count + int(values.sum()), total + values.numel()
    return found


def _slices(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """About `count` slices of rows in the order of time; the rows of one call have one time and stay together."""
    size, parts = len(rows) / count, [[rows[0]]]
    for row in rows[1:]:
        if len(parts[-1]) >= size and row.time != parts[-1][-1].time:
            parts.append([])
        parts[-1].append(row)
    return parts


def jensen_shannon(p: float, q: float) -> float:
    """Divergence of two shares, in bits; in [0, 1]."""
    mean = (p + q) / 2
    return max(0.0, entropy((mean, 1 - mean)) - (entropy((p, 1 - p)) + entropy((q, 1 - q))) / 2)
