"""Pictures of results.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and dashes differ too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from surgery.errors import MissingDependency

BLUE, ORANGE, VERMILION, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#666666"
_STYLES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (VERMILION, "^", ":"), (GREEN, "D", "-."))
_Z = 1.96
_ACROSS = 4


@dataclass(frozen=True)
class Curve:
    """One policy at several costs.

    Args:
        label: For the legend.
        points: `(cost as a fraction of dense, accuracy)`, in any order.
    """

    label: str
    points: Sequence[tuple[float, float]]


def draw_tradeoff(
    path: Path,
    curves: Sequence[Curve],
    *,
    dense: float,
    samples: int,
    rates: Mapping[str, float],
    kinds: Mapping[str, str],
    title: str,
    rates_title: str,
) -> None:
    """Accuracy against cost on the left, active rate per site on the right, in one PNG.

    Args:
        path: File to write.
        curves: The first one is drawn with a 95 % band (binomial, `samples` test inputs).
        dense: Accuracy of the dense model.
        samples: Number of test inputs.
        rates: Site -> active rate, in order of execution.
        kinds: Site -> kind; each has a colour.
        title: Above the left panel.
        rates_title: Above the right panel.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    left, right = _figure(len(rates))
    _curves(left, curves, dense, samples)
    left.set_title(title, loc="left", fontsize=10)
    _bars(right, rates, kinds)
    right.set_title(rates_title, loc="left", fontsize=10)
    left.figure.savefig(path, dpi=150)


def draw_networks(path: Path, panels: Sequence[tuple[str, float, Sequence[Curve], Sequence[Curve]]]) -> None:
    """Accuracy of several networks against cost and, below, against measured time, in one PNG, four networks side by side.

    Args:
        path: File to write.
        panels: Title, the dense accuracy, curves by cost and curves by time, both as fractions of dense.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    across = min(len(panels), _ACROSS)
    bands = -(-len(panels) // _ACROSS)
    figure = _canvas((3.6 * across, 6.2 * bands + 0.9))
    rows = figure.subplots(2 * bands, across, squeeze=False)
    kinds: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for index, (title, dense, by_cost, by_time) in enumerate(panels):
        band, column = divmod(index, across)
        upper, lower = rows[2 * band][column], rows[2 * band + 1][column]
        for axes, curves, label in ((upper, by_cost, "cost"), (lower, by_time, "time")):
            axes.axhline(100 * dense, color=GREY, linewidth=1)
            axes.plot([100], [100 * dense], marker="*", markersize=12, color="black", linestyle="none")
            for curve in curves:
                color, marker, line = _style(curve.label, kinds[label == "time"])
                points = curve.points  # in the order of budgets
                axes.plot(
                    [100 * x for x, _ in points], [100 * y for _, y in points], color=color, marker=marker, linestyle=line,
                    markersize=5, label=curve.label,
                )  # fmt: skip
            axes.set_xlabel(f"{label}{' of the first seed' * (label == 'time')} (% of dense)")
            axes.grid(alpha=0.3)
        upper.set_title(title, fontsize=10)
        lower.axvline(100, color=GREY, linewidth=1)
    for axes in rows[:, 0]:
        axes.set_ylabel("accuracy (%)")
    for axes in rows[-2:, across - (bands * across - len(panels)) :].flat:
        axes.set_axis_off()
    found: dict[str, Any] = {}
    for axes in rows.flat:
        found |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found, loc="outside lower center", ncols=across + 1, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _style(label: str, named: dict[str, Any]) -> Any:
    """The same colour, marker and line for a label in every panel."""
    kinds = (*_STYLES, (GREY, "v", "-"))
    return named.setdefault(label, kinds[len(named) % len(kinds)])


def _canvas(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency('matplotlib is needed to draw: pip install "bypass-surgery[plot]"') from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(sites: int) -> tuple[Any, Any]:
    left, right = _canvas((11, max(4.6, 1.4 + 0.24 * sites))).subplots(1, 2, width_ratios=(3, 2))
    return left, right


def _curves(axes: Any, curves: Sequence[Curve], dense: float, samples: int) -> None:
    axes.axhline(100 * dense, color=GREY, linewidth=1, zorder=1)
    axes.plot([100], [100 * dense], marker="*", markersize=14, color="black", linestyle="none", label="dense", zorder=4)
    for index, (curve, (color, marker, line)) in enumerate(zip(curves, _STYLES, strict=False)):
        points = sorted(curve.points)
        cost, accuracy = [100 * c for c, _ in points], [100 * a for _, a in points]
        axes.plot(cost, accuracy, color=color, marker=marker, linestyle=line, label=curve.label, zorder=3)
        if index == 0:
            error = [100 * _Z * sqrt(a * (1 - a) / samples) for _, a in points]
            low = [a - e for a, e in zip(accuracy, error, strict=True)]
            high = [min(100.0, a + e) for a, e in zip(accuracy, error, strict=True)]
            axes.fill_between(cost, low, high, color=color, alpha=0.15, linewidth=0, zorder=2, label="95 % interval")
    axes.set_xlabel("mean cost (% of dense FLOPs)")
    axes.set_ylabel(f"accuracy (% of {samples} test images)")
    axes.set_xlim(right=103)
    axes.grid(alpha=0.3)
    _legend(axes, 2)


def _bars(axes: Any, rates: Mapping[str, float], kinds: Mapping[str, str]) -> None:
    names, values = list(rates), [100 * rate for rate in rates.values()]
    for kind, color in zip(dict.fromkeys(kinds.values()), (ORANGE, BLUE, GREEN, GREY), strict=False):
        chosen = [index for index, name in enumerate(names) if kinds[name] == kind]
        bars = axes.barh(chosen, [values[index] for index in chosen], color=color, height=0.7, label=kind)
        axes.bar_label(bars, [f"{values[index]:.0f} %" for index in chosen], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("active rate (% of inputs or tokens)")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, len(set(kinds.values())))


def _legend(axes: Any, columns: int) -> None:
    """Below the axes, where it can hide nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, frameon=False, fontsize=9)
