"""How results look to people: rich tables, and `render` for plain text.

Nothing here computes: every number is read from the value that is shown.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from surgery.reports import Report
    from surgery.sites import Sites
    from surgery.timing import Ratio

PLAIN_WIDTH = 120
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float) -> str:
    """Three significant digits with an SI prefix: `1.82 G`, `340 k`, `12`."""
    for scale, prefix in _UNITS:
        if abs(value) >= 0.9995 * scale:
            number = value / scale
            return f"{number:.{_decimals(number)}f} {prefix}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.{_decimals(value)}f}"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as `12.3 %`."""
    return f"{100 * fraction:.{digits}f} %"


def render(renderable: RenderableType, *, width: int | None = None) -> str:
    """Plain text without colours, as wide as the terminal, or 120 columns where there is none.

    Args:
        renderable: Anything that rich can print.
        width: Columns; None to choose.
    """
    if width is None:
        width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if sys.stdout.isatty() else PLAIN_WIDTH
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False, highlight=False).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def sites_table(sites: Sites) -> RenderableType:
    """Found sites, a line of totals, then what was left alone, and why."""
    table = _table(("site", "kind", "granularity", ">FLOPs", ">share", ">parameters"))
    for site in sites:
        numbers = (quantity(site.flops), percent(site.share), quantity(site.parameters))
        _row(table, site.name, site.kind, ", ".join(site.granularities), *numbers)
    title = f"Sites of {sites.model_name}" if sites.model_name else "Sites"
    parts: list[RenderableType] = [_titled(title, table), Text(_totals(sites))]
    offered = [site for site in sites.heads if site.name not in sites.names]
    if offered:
        heads = sum(len(site.units) for site in offered)
        parts.append(Text(f"Heads: {len(offered)} sites with {heads} heads can be had instead, with --sites heads"))
    if sites.heads_rejections:
        parts.append(_reasons("No heads to decide", [(r.where, r.reason) for r in sites.heads_rejections]))
    if not len(sites) and not offered:
        parts.append(Text("Nothing here can be skipped: docs/limits.md says in which networks that is so"))
    if sites.rejections:
        parts.append(_reasons("Left alone", [(r.where or "(the model itself)", r.reason) for r in sites.rejections]))
    return Group(*parts)


def rows_table(title: str, rows: Iterable[Any]) -> RenderableType:
    """One line per row; rows are mappings or dataclasses with the same fields, numbers are right-aligned."""
    values = [_fields(row) for row in rows]
    if not values:
        return Text(f"{title}: nothing to show")
    names = list(values[0])
    numeric = {name for name in names if all(_is_number(value[name]) for value in values)}
    table = _table([f"{'>' if name in numeric else ''}{_words(name)}" for name in names])
    for value in values:
        _row(table, *(_cell(name, value[name]) for name in names))
    return _titled(title, table)


def report_table(report: Report) -> RenderableType:
    """Quality and cost against dense, peers at the same cost, speed, active rates, notes."""
    parts = [_quality(report), _phases(report), _peers(report), _speed(report), _active(report)]
    notes = [Text(f"note: {note}") for note in report.notes]
    return Group(*(part for part in parts if part is not None), *notes)


def _quality(report: Report) -> RenderableType:
    gated = f">gated, healed ({report.healed})" if report.healed else ">gated"
    table = _table(("", gated, ">dense", ">difference"))
    for name, value in report.metric.items():
        dense = report.dense_metric[name]
        _row(table, _words(name), _metric(name, value), _metric(name, dense), _metric(name, value - dense, signed=True))
    agreement = percent(report.agreement) if report.agreement_of == "argmax" else f"{report.agreement:.4f}"
    _row(table, f"agreement with dense ({report.agreement_of})", agreement)
    _row(table, f"mean cost ({report.cost_unit}, share of dense)", percent(report.cost), percent(1.0))
    _row(table, "submodules run (mean over sites)", percent(report.submodules), percent(1.0))
    _row(table, f"distinct policies for {report.deciding}", f"{report.policies:,}", "1")
    return _titled(f"Quality and cost on {report.data}", table)


def _phases(report: Report) -> RenderableType | None:
    if not report.phases:
        return None
    table = _table(("phase", ">mean context", ">gated", ">dense", ">share", ">tokens"))
    for phase in report.phases:
        numbers = (quantity(round(phase.flops)), quantity(round(phase.dense)), percent(phase.cost), f"{phase.tokens:,}")
        _row(table, phase.name, f"{phase.context:.0f}", *numbers)
    return _titled(
        "FLOPs per token with a key/value cache, one text at a time (counted, keys and values included)", table
    )


def _peers(report: Report) -> RenderableType | None:
    if not report.peers:
        return None
    metric = report.compared
    table = _table(("policy", ">cost", f">{_words(metric)}", ">gated minus policy", ">95 % interval"))
    for peer in report.peers:
        difference, low, high = (
            _metric(metric, value, signed=True) for value in (peer.difference, peer.low, peer.high)
        )
        _row(table, peer.name, percent(peer.cost), _metric(metric, peer.metric), difference, f"{low} … {high}")
    return _titled("Other policies at the same cost, with the same skip paths", table)


def _speed(report: Report) -> RenderableType | None:
    if not report.speed:
        return None
    return Group(
        speed_table(report.speed),
        Text(", ".join(f"{name} {value}" for name, value in report.conditions.items())),
        Text(""),
    )


def speed_table(speed: Mapping[int, Ratio]) -> RenderableType:
    """Times of gated and dense by batch size."""
    table = _table((">batch", ">gated ms", ">dense ms", ">ratio", ">middle half", ">all calls", ">pairs"))
    for size, ratio in speed.items():
        half = f"{ratio.q1:.2f} … {ratio.q3:.2f}"
        times = (f"{ratio.a_ms:.3g}", f"{ratio.b_ms:.3g}", f"{ratio.median:.2f}", half, f"{ratio.total:.2f}")
        _row(table, str(size), *times, str(ratio.repeats))
    return _titled("Time (ratio: gated / dense in the same process, median; below 1 is faster)", table)


def _active(report: Report) -> RenderableType | None:
    if not report.active_rate:
        return None
    table = _table(("site", ">active", ">bits", ""))
    for name, rate in report.active_rate.items():
        _row(table, name, percent(rate), f"{report.entropy[name]:.2f}", "█" * round(20 * rate))
    return _titled("Active rate (share of inputs or tokens for which the branch ran), and its entropy", table)


def _totals(sites: Sites) -> str:
    """E.g. `16 sites hold 85.2 % of 4.11 GFLOPs per sample`, and the model's size."""
    held = sum(site.share for site in sites if not any(_inside(site.name, other.name) for other in sites))
    total = quantity(sites.model_flops)
    return (
        f"{len(sites)} {'site holds' if len(sites) == 1 else 'sites hold'} {percent(min(held, 1.0))} of "
        f"{total}{'' if total[-1].isalpha() else ' '}FLOPs per sample (one multiply-add = 2); "
        f"{quantity(sites.model_parameters)} parameters in the model"
    )


def _inside(name: str, other: str) -> bool:
    """Whether site `name` lies in site `other`, whose share then counts it already."""
    return name != other and name.startswith(f"{other}.")


def _merged(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Places with the same reason on one line."""
    places: dict[str, list[str]] = {}
    for where, reason in pairs:
        places.setdefault(reason, []).append(where)
    return [(_shortened(names), reason) for reason, names in places.items()]


def _shortened(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _reasons(title: str, pairs: Iterable[tuple[str, str]]) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(overflow="fold", ratio=2)
    lines.add_column(overflow="fold", ratio=3)
    for places, reason in _merged(pairs):
        _row(lines, places, reason)
    return Group(Text(""), Text(title, style="bold"), Padding(lines, (0, 0, 0, 1)))


def _table(columns: Iterable[str]) -> Table:
    """A table whose columns are right-aligned where the name starts with `>`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table


def _titled(title: str, table: Table) -> RenderableType:
    """The title on a line of its own: rich wraps a table's title to the table's width."""
    return Group(Text(title, style="bold"), table)


def _row(table: Table, *cells: str) -> None:
    """Cells are taken literally: `layers[0]` in a name is no markup."""
    table.add_row(*map(Text, cells))


def _fields(row: Any) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    if dataclasses.is_dataclass(row):
        return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return dict(vars(row))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return quantity(value)
    if isinstance(value, float):
        shown_as_share = name in SHARES or name.endswith(("rate", "share", "cost", "active", "budget"))
        return percent(value) if shown_as_share else f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _metric(name: str, value: float, *, signed: bool = False) -> str:
    """Shares as percent, their differences as points; anything else with four digits."""
    sign = "+" if signed else ""
    if name in SHARES:
        return f"{100 * value:{sign}.2f} {'pt' if signed else '%'}"
    return f"{value:{sign}.4g}"


def _decimals(number: float) -> int:
    return 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0


SHARES = frozenset({"accuracy", "top1", "top5", "agreement", "token_accuracy"})
