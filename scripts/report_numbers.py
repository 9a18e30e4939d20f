"""The numbers of a report: those at its head, and its tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.audits import Audit, Observed
from surgery.reports import Report
from surgery.tables import percent


def numbers_of(
    found: Audit, seen: Observed, budget: float | None, sweep: Mapping[float, Report]
) -> list[tuple[str, str]]:
    """What stands at the head of the page: names and values."""
    rows = [("mean cost, share of dense", percent(found.cost))]
    if budget is not None:
        rows.append(("budget", percent(budget, 0)))
    if seen.labels is not None and seen.predicted is not None and seen.dense is not None:
        rows.append(("accuracy", percent(float((seen.predicted == seen.labels).float().mean()))))
        rows.append(("accuracy, dense", percent(float((seen.dense == seen.labels).float().mean()))))
        rows.append(("errors introduced, repaired", f"{len(found.errors):,}, {found.repaired:,}"))
    if seen.predicted is not None and seen.dense is not None:
        rows.append(("agreement with dense", percent(float((seen.predicted == seen.dense).float().mean()))))
    rows.append((f"policies for {found.decided}", f"{found.policies:,}"))
    if budget is not None and budget in sweep:
        for phase in sweep[budget].phases:
            rows.append((f"{phase.name}, FLOPs per token at {phase.context:.0f} tokens", percent(phase.cost)))
    return rows


def tables_of(found: Audit) -> list[dict[str, Any]]:
    """Classes, errors introduced and sites, as the page lays them out."""

    def share(value: float | None) -> str:
        return "" if value is None else percent(value)

    def bits(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    tables: list[dict[str, Any]] = []
    if found.classes:
        rows = [
            [
                row.group,
                f"{row.inputs:,}",
                percent(row.cost),
                f"{percent(row.low)} to {percent(row.high)}",
                *map(share, (row.accuracy, row.dense_accuracy, row.agreement)),
            ]
            for row in found.classes[:60]
        ]
        columns = ["class", "inputs", "cost", "95 % interval", "accuracy", "dense accuracy", "agreement"]
        tables.append({"title": "Classes", "text": "", "columns": columns, "rows": rows, "texts": ()})
    if found.errors:
        rows = [[str(one.index), one.label, one.predicted, percent(one.cost), one.shown] for one in found.errors[:20]]
        text = f"The dense model gets these right, the gated one does not (first {len(rows)} of {len(found.errors)})."
        columns = ["input", "is", "gated says", "cost", "text"]
        tables.append({"title": "Errors introduced", "text": text, "columns": columns, "rows": rows, "texts": (4,)})
        if not any(one.shown for one in found.errors):
            tables[-1]["columns"] = columns[:4]
            tables[-1]["rows"] = [row[:4] for row in rows]
    rows = [
        [
            row.site,
            percent(row.active_rate),
            bits(row.entropy),
            bits(row.class_information),
            share(row.near_rate),
            share(row.noise_rate),
        ]
        for row in found.sites
    ]
    columns = [
        "site",
        "active rate",
        "entropy (bits)",
        "about the class (bits)",
        "near the threshold",
        "moved by noise",
    ]
    text = "Near: within 0.1 of the threshold. Noise: 5 % of the inputs' own spread; none on texts."
    tables.append({"title": "Sites", "text": text, "columns": columns, "rows": rows, "texts": ()})
    return tables
