"""The pictures of a report, each drawn for light and for dark pages.

Rates are drawn in viridis, lines in Okabe and Ito's colours: colour-blind readers can tell both apart.

Axis letters: `N` inputs, `S` sites.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import MissingDependency

if TYPE_CHECKING:
    from surgery.audits import GroupAudit

DPI = 110
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_INK = {False: "#1b1f24", True: "#e6e8ea"}
_LINES = {
    "gated": ("#0072B2", "o", "-"),
    "gated, healed": ("#0072B2", "*", "-"),
    "unhealed": ("#0072B2", "o", ":"),
    "static": ("#E69F00", "s", "--"),
    "random": ("#D55E00", "^", ":"),
    "static+look": ("#882255", "P", "-"),
    "one pass": ("#56B4E9", "o", "--"),
    "frozen": ("#CC79A7", "v", "--"),
    "importance": ("#009E73", "D", "-."),
    "shuffled": ("#999933", "x", "-."),
}
_FURTHER = (("#7f7f7f", "p", "-"), ("#8c6d31", "h", "-"), ("#bcbd22", "<", "-"), ("#17becf", ">", "-"))
_OURS = ("gated", "gated, healed")  # on top of what has the same points, as static cuts of a static conversion
_DARK_BLUE = "#56B4E9"  # Okabe and Ito's lighter blue: the dark one is hard to see on black
Draw = Callable[[Any, bool], None]


def drawn(draw: Draw, width: float, height: float, *, dark: bool, transparent: bool = True) -> bytes:
    """A PNG.

    Args:
        draw: `draw(figure, dark)`.
        width: Inches.
        height: Inches.
        dark: Whether the page is.
        transparent: Whether the page shows through.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency('matplotlib is needed to draw: pip install "bypass-surgery[report]"') from error
    with _coloured(dark):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, dark)
        stream = io.BytesIO()
        figure.savefig(stream, dpi=DPI, transparent=transparent, format="png")
    return stream.getvalue()


@contextmanager
def _coloured(dark: bool) -> Iterator[None]:
    from matplotlib import rc_context

    ink = _INK[dark]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    settings: Any = {**dict.fromkeys(names, ink), "font.size": 9}
    with rc_context(settings):
        yield


def tradeoff(
    points: Mapping[str, Sequence[Mapping[str, float]]], dense: Mapping[str, float], metric: str, batch: int
) -> Draw:
    """Metric against cost, and against measured time where there is any.

    Args:
        points: Policy -> points with `cost`, `metric` and `time` (by the dense model's).
        dense: The dense model's `metric`.
        metric: What the metric is, with its unit.
        batch: Inputs per timed call.
    """

    def draw(figure: Any, dark: bool) -> None:
        labels = {"cost": "mean cost (% of dense FLOPs)", "time": f"measured time, batch {batch} (% of dense)"}
        if not any(value.get("time") for values in points.values() for value in values):
            del labels["time"]
        panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
        for axes, (key, label) in zip(panels, labels.items(), strict=True):
            axes.axhline(dense["metric"], color=_INK[dark], linewidth=0.8, alpha=0.5)
            further = itertools.cycle(_FURTHER)
            for name, values in points.items():
                color, marker, line = _LINES[name] if name in _LINES else next(further)
                own = sorted((100 * v[key], v["metric"]) for v in values if v.get(key) is not None)
                axes.plot(
                    *zip(*own, strict=True) if own else ([], []),
                    color=_DARK_BLUE if dark and name.startswith("gated") else color,
                    marker=marker,
                    markersize=4.5 if name == "gated" else 7,
                    zorder=3 if name in _OURS else 2,
                    linestyle=line if key == "cost" else "none",
                    label=name,
                )
            axes.plot([100], [dense["metric"]], "*", color=_INK[dark], markersize=13, label="dense")
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
        panels[0].set_ylabel(metric)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    return draw


def heat(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], label: str, *, xlabel: str
) -> Draw:
    """Shares in [0, 1] as colours, with numbers where there is room."""

    def draw(figure: Any, dark: bool) -> None:
        axes = figure.subplots()
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        slanted = max(map(len, columns), default=0) > 4
        step = max(1, -(-len(columns) // 40))
        ticks = range(0, len(columns), step)
        axes.set_xticks(
            ticks, [columns[i] for i in ticks], rotation=40 if slanted else 0, ha="right" if slanted else "center"
        )
        axes.set_xlabel(xlabel)
        axes.set_ylabel("site")
        if len(columns) <= 14:
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    color = "black" if value > 0.6 else "white"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
        bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
        bar.set_label(label)

    return draw


def histogram(costs: Sequence[float], budget: float | None) -> Draw:
    """How the cost spreads over inputs."""

    def draw(figure: Any, dark: bool) -> None:
        axes = figure.subplots()
        axes.hist([100 * cost for cost in costs], bins=40, color=_DARK_BLUE if dark else "#0072B2")
        mean = 100 * sum(costs) / len(costs)
        axes.axvline(mean, color=_INK[dark], linewidth=1.2, label=f"mean over inputs {mean:.1f} %")
        if budget is not None and budget < 1:
            axes.axvline(100 * budget, color="#E69F00", linestyle="--", label=f"budget {100 * budget:g} %")
        axes.set_xlabel("cost of an input (% of dense FLOPs)")
        axes.set_ylabel("inputs")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)

    return draw


def drift(times: Sequence[float], costs: Sequence[float], divergence: Mapping[str, Sequence[float]]) -> Draw:
    """Cost and distance from calibration over a log's time.

    Args:
        times: Middle of every slice, seconds since the log began.
        costs: Mean cost of every slice.
        divergence: Site -> Jensen-Shannon divergence of every slice from calibration, in bits.
    """

    unit, long = next(one for one in _UNITS if max(times) >= 2 * one[1] or one[1] == 1)
    passed = [time / long for time in times]

    def draw(figure: Any, dark: bool) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.plot(passed, [100 * cost for cost in costs], color=_DARK_BLUE if dark else "#0072B2", marker="o")
        top.set_ylabel("mean cost\n(% of dense)")
        worst = sorted(divergence, key=lambda name: -max(divergence[name]))
        styles = (("#E69F00", "s", "--"), ("#D55E00", "^", ":"), ("#009E73", "D", "-."), ("#CC79A7", "v", "-"))
        for name, (color, marker, line) in zip(worst, styles, strict=False):
            bottom.plot(passed, divergence[name], color=color, marker=marker, linestyle=line, label=name)
        bottom.set_ylabel("divergence from\ncalibration (bits)")
        bottom.set_xlabel(f"time since the log began ({unit})")
        for axes in (top, bottom):
            axes.grid(alpha=0.25)
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        figure.legend(loc="outside lower center", ncols=2, frameon=False)

    return draw


def groups(parts: Sequence[GroupAudit]) -> Draw:
    """Cost with its interval, and accuracy beside the dense model's, of every class or group; else agreement."""
    keys = ("accuracy", "agreement")
    known = next((key for key in keys if any(getattr(part, key) is not None for part in parts)), None)

    def draw(figure: Any, dark: bool) -> None:
        blue, ink = _DARK_BLUE if dark else "#0072B2", _INK[dark]
        left, *rest = figure.subplots(1, 1 if known is None else 2, sharey=True, squeeze=False)[0]
        places, names = range(len(parts)), [f"{part.group} ({part.inputs})" for part in parts]
        spans = [[100 * (part.cost - part.low) for part in parts], [100 * (part.high - part.cost) for part in parts]]
        left.errorbar([100 * part.cost for part in parts], places, xerr=spans, fmt="o", color=blue, capsize=4)
        left.set_yticks(places, names)
        left.set_ylim(len(parts) - 0.5, -0.5)
        left.set_ylabel("group (inputs)")
        left.set_xlabel("mean cost, 95 % interval (% of dense)")
        left.grid(alpha=0.25)
        lines = [("gated", known or "", blue, "o", 7), ("dense", "dense_accuracy", ink, "*", 13)]
        for axes in rest:
            for name, key, color, marker, size in lines if known == "accuracy" else lines[:1]:
                values = [getattr(part, key) for part in parts]
                axes.plot(
                    [float("nan") if value is None else 100 * value for value in values],
                    places,
                    marker=marker,
                    color=color,
                    linestyle="none",
                    markersize=size,
                    label=name,
                    zorder=3 if name == "gated" else 2,  # the star is seen around the dot
                )
            axes.set_xlim(right=min(axes.get_xlim()[1], 101.5))
            axes.set_xlabel(
                f"{'accuracy' if known == 'accuracy' else 'agreement with dense'} (% of the group's inputs)"
            )
            axes.grid(alpha=0.25)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

    return draw
