"""What a report shows: measured, audited, and drawn.

Axis letters: `N` inputs, `S` sites.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery import policies
from surgery.adapters import Loaded
from surgery.adapters.data import Loader
from surgery.adapters.images import to_pil
from surgery.auditing import Audit, Observed, audited
from surgery.calibration import budget_range, point_at, set_budget
from surgery.calling import batches, call, device_of
from surgery.context import state_of
from surgery.costs import place
from surgery.gates import iter_gates
from surgery.logs import Log, Row
from surgery.measurement import measure
from surgery.policies import decided
from surgery.reports import Report
from surgery.scripts import report_figures as figures
from surgery.scripts.bars import Report as Progress
from surgery.scripts.report_page import data_uri, page
from surgery.state import GatedState
from surgery.tables import SHARES, percent
from surgery.timing import compare

SHOWN = 12
TEXTS = 8
SLICES = 24
CLUSTERS = 6
REPEATS = 15


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Args:
        gated: A gated model, at its budget.
        dense: The original.
        rows: The data.
        loaded: The model's preprocessing and names of classes.
        name: Of the conversion.
        data: What the data is called.
    """

    gated: nn.Module
    dense: nn.Module
    rows: Loader
    loaded: Loaded
    name: str
    data: str


def write(
    out: Path,
    subject: Subject,
    budgets: Sequence[float],
    speed: int,
    log: Log | None,
    seed: int,
    progress: Progress,
    measured: Mapping[float, Report] | None = None,
) -> list[Path]:
    """Write the page and its pictures.

    Args:
        out: HTML file.
        subject: What it is about.
        budgets: Of the curves.
        speed: Inputs per timed call.
        log: For drift over time.
        seed: Of random decisions and noise.
        progress: Called while at work.
        measured: Reports at budgets that were measured before.

    Returns:
        The pictures' paths.
    """
    gated, state = subject.gated, state_of(subject.gated)
    budget = state.budget
    texts = subject.rows.column(subject.rows.columns["text"]) if "text" in subject.rows.columns else []
    found, seen = audited(
        gated, subject.rows, subject.dense, None, subject.loaded.label_names, texts, 0.05, seed, progress
    )
    sweep = _sweep(subject, budgets, seed, progress, measured or {})
    timed = _timed(subject, list(sweep), speed, progress)
    if budget is not None:
        set_budget(gated, budget)
    drawn = _figures(subject, found, seen, sweep, timed, speed, log)
    pictures, shown = [], []
    for key, title, text, draw, width, height in drawn:
        light, dark = (figures.drawn(draw, width, height, dark=dark) for dark in (False, True))
        path = out.with_name(f"{out.stem}-{key}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_on_white(light))
        pictures.append(path)
        shown.append({"title": title, "text": text, "light": data_uri(light), "dark": data_uri(dark)})
    content = page(
        {
            "title": f"{subject.name}: what is skipped, and what that costs",
            "subtitle": f"{type(subject.dense).__name__} on {len(seen.costs):,} inputs of {Path(subject.data).name}",
            "numbers": _numbers(found, seen, budget, sweep),
            "notes": [*state.notes, *found.notes],
            "figures": shown,
            "shown": _inputs(subject, seen, texts),
            "tables": _tables(found),
            "scale": ", ".join(_viridis(i / 8)[0] for i in range(9)),
            "footer": f"Made by surgery report. {_conditions(subject)}",
        }
    )
    out.write_text(content, encoding="utf-8")
    return pictures


# -- measuring --------------------------------------------------------------------------------------------------------


def _sweep(
    subject: Subject, budgets: Sequence[float], seed: int, progress: Progress, measured: Mapping[float, Report]
) -> dict[float, Report]:
    low, high = budget_range(subject.gated)
    own = state_of(subject.gated).budget or 1.0
    wanted = sorted({b for b in (*budgets, own, *measured) if low <= b <= high})
    result = {}
    for index, budget in enumerate(wanted):
        progress("scoring budgets", index, len(wanted))
        set_budget(subject.gated, budget)
        result[budget] = measured.get(budget) or measure(
            subject.gated, subject.rows, dense=subject.dense, speed=(), seed=seed
        )
    return result


def _timed(subject: Subject, budgets: Sequence[float], size: int, progress: Progress) -> dict[float, dict[str, float]]:
    """Time of gated, static and random by the dense model's, median over pairs of calls on the same inputs."""
    state, rows = state_of(subject.gated), _groups(subject, size)
    if not rows:
        return {}
    result: dict[float, dict[str, float]] = {}
    for index, budget in enumerate(budgets):
        progress("timing", index, len(budgets))
        set_budget(subject.gated, budget)
        point = point_at(state, budget)
        chosen = {
            "gated": None,
            "static": policies.constant(point.static),
            "random": policies.random(point.active_rate, 0, 0),
        }
        result[budget] = {}
        for name, choose in chosen.items():
            mine, theirs = itertools.cycle(rows), itertools.cycle(rows)

            def run(choose: policies.Choose | None = choose, mine: Iterator[Any] = mine) -> None:
                with _decided(subject.gated, choose):
                    call(subject.gated, next(mine))

            def dense(theirs: Iterator[Any] = theirs) -> None:
                call(subject.dense, next(theirs))

            ratio = compare(run, dense, repeats=REPEATS, warmup=2, device=device_of(subject.gated))
            result[budget][name] = ratio.median
    return result


@contextmanager
def _decided(gated: nn.Module, choose: policies.Choose | None) -> Iterator[None]:
    if choose is None:
        yield
    else:
        with decided(gated, choose):
            yield


def _groups(subject: Subject, size: int) -> list[Any]:
    """Up to eight batches of exactly `size` inputs."""
    found = []
    for batch in itertools.islice(batches(subject.rows), 8):
        for start in range(0, batch.size - size + 1, size):
            found.append(place(batch.rows(torch.arange(start, start + size)), subject.gated))
            if len(found) == 8:
                return found
    return found


# -- pictures ---------------------------------------------------------------------------------------------------------


def _figures(
    subject: Subject,
    found: Audit,
    seen: Observed,
    sweep: Mapping[float, Report],
    timed: Mapping[float, Mapping[str, float]],
    speed: int,
    log: Log | None,
) -> list[tuple[str, str, str, figures.Draw, float, float]]:
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
                f"{metric.capitalize()} against cost and time",
                "One checkpoint at several budgets. Static: a fixed set of sites with the same skip paths. Random: each "
                "site at its active rate, whatever the input. Times are medians of pairs of calls, side by side with dense.",
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
    expected = point_at(state, budget).active_rate if budget is not None and budget < 1 else {}
    start, times, costs = rows[0].time, [], []
    divergence: dict[str, list[float]] = {name: [] for name in log.sites if name in expected}
    for part in parts:
        times.append((part[len(part) // 2].time - start).total_seconds() / 60)
        costs.append(sum(row.cost for row in part) / len(part))
        rates = [row.rates() for row in part]
        for name, values in divergence.items():
            values.append(jensen_shannon(sum(one.get(name, 1.0) for one in rates) / len(rates), expected[name]))
    return times, costs, divergence


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

    def entropy(share: float) -> float:
        return -sum(one * math.log2(one) for one in (share, 1 - share) if one > 0)

    return max(0.0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def _on_white(content: bytes) -> bytes:
    """The picture as a file of its own: transparency would be black on black in some viewers."""
    from PIL import Image

    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    stream = io.BytesIO()
    Image.alpha_composite(paper, picture).convert("RGB").save(stream, "PNG", optimize=True)
    return stream.getvalue()


# -- inputs -----------------------------------------------------------------------------------------------------------


def _inputs(subject: Subject, seen: Observed, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Easiest and hardest inputs: images, or texts with a colour per token."""
    order = seen.costs.argsort().tolist()
    known = subject.loaded.label_names
    image = subject.rows.columns.get("image")
    if not texts and image is None:
        return []
    count = TEXTS if texts else SHOWN
    result = []
    for title, chosen in (("Easiest inputs", order[:count]), ("Hardest inputs", order[::-1][:count])):
        cells = subject.rows.cells(image, chosen) if image is not None else [None] * len(chosen)
        inputs = []
        for index, cell in zip(chosen, cells, strict=True):
            caption = f"cost {percent(float(seen.costs[index]))}"
            for what, values in (("is", seen.labels), ("gated", seen.predicted), ("dense", seen.dense)):
                if values is not None:
                    value = int(values[index])
                    caption += f", {what}: {known[value] if 0 <= value < len(known) else value}"
            one: dict[str, Any] = {"index": index, "caption": caption, "image": "", "map": "", "tokens": []}
            shares = _shares(seen.decisions[index])
            if cell is not None:
                one["image"] = data_uri(_png(to_pil(cell)))
                one["map"] = _patch_map(shares)
            if texts:
                one["tokens"] = _tokens(subject.loaded, texts[index], shares)
            inputs.append(one)
        text = "Those that were given the " + ("least" if title.startswith("E") else "most") + " compute. "
        if texts:
            text += "Each token is coloured by the share of sites that ran for it."
        elif any(one["map"] for one in inputs):
            text += "Below each picture: the share of sites that ran for every patch."
        scale = bool(texts) or any(one["map"] for one in inputs)
        kind = "texts" if texts else "cards"
        result.append({"title": title, "text": text, "kind": kind, "scale": scale, "inputs": inputs})
    return result


def _shares(decisions: Mapping[str, Tensor]) -> list[float]:
    """Share of the sites that ran, for every position of one input (one number where whole inputs are decided)."""
    if not decisions:
        return [1.0]
    longest = max(len(one) for one in decisions.values())
    wide = [one.float() if len(one) == longest else one.float().mean().expand(longest) for one in decisions.values()]
    shares: list[float] = torch.stack(wide).mean(0).tolist()
    return shares


def _patch_map(shares: Sequence[float]) -> str:
    """A picture with one pixel a patch, or "" where positions are no square of patches (with or without a class token)."""
    from PIL import Image

    for lead in (0, 1):
        side = math.isqrt(max(len(shares) - lead, 0))
        if side > 1 and side * side == len(shares) - lead:
            picture = Image.new("RGB", (side, side))
            picture.putdata([_colour(share) for share in shares[lead:]])
            return data_uri(_png(picture.resize((16 * side, 16 * side), Image.Resampling.NEAREST)))
    return ""


def _tokens(loaded: Loaded, text: str, shares: Sequence[float]) -> list[dict[str, str]]:
    ids = loaded.preprocess({"text": text})["input_ids"]
    words = loaded.tokenizer.convert_ids_to_tokens(list(ids))
    if len(shares) != len(words):
        shares = [sum(shares) / len(shares)] * len(words)
    found = []
    for word, share in zip(words, shares, strict=True):
        colour, ink = _viridis(share)
        shown = word.replace("Ġ", "").replace("▁", "") or word
        found.append({"text": shown, "colour": colour, "ink": ink, "title": f"{percent(share, 0)} of sites ran"})
    return found


def _colour(share: float) -> tuple[int, int, int]:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](share)
    return round(255 * red), round(255 * green), round(255 * blue)


def _viridis(share: float) -> tuple[str, str]:
    """Background and a text colour that can be read on it."""
    red, green, blue = _colour(share)
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 120
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if dark else "#000000"


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.thumbnail((224, 224))
    picture.save(stream, "PNG")
    return stream.getvalue()


# -- numbers ----------------------------------------------------------------------------------------------------------


def _numbers(
    found: Audit, seen: Observed, budget: float | None, sweep: Mapping[float, Report]
) -> list[tuple[str, str]]:
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


def _tables(found: Audit) -> list[dict[str, Any]]:
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


def _conditions(subject: Subject) -> str:
    from surgery.calling import dtype_of
    from surgery.timing import conditions

    found = conditions(device_of(subject.gated), dtype_of(subject.gated))
    return ", ".join(f"{name} {value}" for name, value in found.items())
