"""`surgery compare DIR --data …`: a converted model beside its peers: same data, same cost accounting, one table, one picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.errors import MissingDependency, SurgeryError
from surgery.scripts import options, outputs
from surgery.scripts.bars import Report as Progress
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command, note, show, show_json

if TYPE_CHECKING:
    from torch import nn

    from surgery.reports import Other, Report

WRITTEN = ("comparison.json", "comparison.md", "comparison.png")
TUNE_STEPS = 300
_LABELS = {
    "static": "static cut, greedy order",
    "static+look": "static cut + second look",
    "frozen": "frozen policy (routers' mean rates)",
    "importance": "static cut, block importance",
    "random": "random gates, same rates",
    "shuffled": "decisions shuffled across inputs",
    "one pass": "gated, without its second look",
    "unhealed": "gated, backbone not healed",
}


@command
def compare(
    directory: options.DirectoryArgument,
    data: options.Data,
    split: options.Split = "test",
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="B,B,…", help="Budgets; those out of reach are left out.")
    ] = "0.75,0.6,0.5",
    tune_data: Annotated[
        str | None,
        typer.Option(
            "--tune-data",
            help="Training data on which pruned networks are tuned, by distillation; not at all without it.",
        ),
    ] = None,
    tune_steps: Annotated[
        int | None, typer.Option("--tune-steps", min=1, help="Steps of that; 300 by default.")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Also prune channels.")] = True,
    timed_batch: options.TimedBatch = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds per budget.")] = 15,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for comparison.json, .md and .png.", rich_help_panel="Output"),
    ] = None,
    base: options.Base = None,
    batch_size: options.BatchSize = 32,
    limit: options.Limit = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare a converted model with static cuts, random and shuffled decisions, token merging and pruning at equal cost."""
    from surgery.adapters import load_data

    wanted = options.budgets(budgets)
    if not wanted:
        raise typer.BadParameter("--budgets names none; write 0.4,0.6")
    if tune_steps is not None and tune_data is None:
        raise typer.BadParameter("--tune-steps counts steps on --tune-data, which is not given")
    if tune_data is not None and not prune:
        raise typer.BadParameter("--tune-data is for pruned networks, which --no-prune leaves out")
    steps = TUNE_STEPS if tune_steps is None else tune_steps
    if out is not None:
        outputs.check_directory("--out", out, WRITTEN, "a comparison")
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    common: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "seed": seed}
    rows = load_data(data, loaded, split=split, shuffle=limit is not None, **common)
    training = None
    if tune_data is not None:
        training = load_data(tune_data, loaded, split="train", shuffle=True, **{**common, "limit": steps * batch_size})
    networks = Networks(gated, loaded.model, rows, training, steps, prune)
    with progress_bars() as progress:
        networks.progress = progress
        found = sweep(
            gated,
            loaded.model,
            rows,
            wanted,
            networks,
            speed=timed_batch,
            repeats=repeats,
            seed=seed,
            progress=progress,
        )
    content = {"directory": str(directory), "data": data, **found.to_dict()}
    if out is not None:
        write(out, found, content, timed_batch)
    if as_json:
        show_json(content)
    else:
        show(table(found))
        for text in found.remarks():
            note(text)


@dataclass(slots=True)
class Comparison:
    """Reports by budget, and what could not be compared.

    Args:
        reports: Budget -> what `surgery.measure` found, with the reasons of other networks that could not be made.
        out_of_reach: Budgets that this checkpoint cannot be set to, and why.
    """

    reports: dict[float, Report] = field(default_factory=dict)
    out_of_reach: dict[float, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """What is compared."""
        first = next(iter(self.reports.values()), None)
        return "agreement" if first is None else first.compared

    @property
    def scale(self) -> int:
        """100 where the metric is a share, which people read in per cent and its differences in points; else 1."""
        from surgery.tables import SHARES

        return 100 if self.metric in SHARES else 1

    def rows(self) -> list[dict[str, Any]]:
        """One row per budget and answer: the gated model, then its peers; last those that do not apply, with the reason."""
        found = []
        metric, scale, digits = self.metric, self.scale, 4 if self.scale == 1 else 2
        for budget, report in self.reports.items():
            ours = report.metric.get(metric, report.agreement)
            mine = {
                "budget": budget,
                "policy": "gated, healed" if report.healed else "gated",
                "cost": report.cost,
                metric: ours,
            }
            found.append({**mine, "gated minus it": None, "95 % interval": "", "time": _time(report.speed)})
            for peer in report.peers:
                found.append(
                    {
                        "budget": budget,
                        "policy": peer.name,
                        "cost": peer.cost,
                        metric: peer.metric,
                        "gated minus it": scale * peer.difference,
                        "95 % interval": f"{scale * peer.low:+.{digits}f} … {scale * peer.high:+.{digits}f}",
                        "time": _time(peer.speed),
                    }
                )
        reasons: dict[tuple[str, str], list[float]] = {}
        for budget, report in self.reports.items():
            for name, why in report.absent.items():
                reasons.setdefault((name, why), []).append(budget)
        for (name, why), where in reasons.items():
            for one in (None,) if len(where) == len(self.reports) else where:
                row = {"budget": one, "policy": name, "cost": None, metric: None, "gated minus it": None}
                found.append({**row, "95 % interval": f"none: {why}", "time": None})
        return found

    def remarks(self) -> list[str]:
        """What to know before believing the numbers."""
        first = next(iter(self.reports.values()), None)
        lines = [f"budget {budget:g}: {why}" for budget, why in self.out_of_reach.items()]
        if first is None:
            return lines
        dense = first.dense_metric.get(self.metric)
        where = ", ".join(f"{name} {value}" for name, value in first.conditions.items())
        value = 1.0 if dense is None else dense
        said = f"{100 * value:.2f} %" if self.scale == 100 else f"{value:.4f}"
        lines.append(f"{first.data}; dense {self.metric} {said}; {where}")
        lines.append(
            "cost: share of the dense FLOPs, skip paths and routers included; time: all calls by all dense calls"
        )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {
            "budgets": {f"{budget:g}": report.to_dict() for budget, report in self.reports.items()},
            "out_of_reach": {f"{budget:g}": why for budget, why in self.out_of_reach.items()},
        }


@dataclass(slots=True)
class Networks:
    """Makes the other networks for a cost; why one cannot be made is kept in `absent`."""

    gated: nn.Module
    dense: nn.Module
    data: Iterable[Any]
    training: Iterable[Any] | None
    steps: int
    prune: bool = True
    progress: Progress | None = None
    absent: dict[str, str] = field(default_factory=dict)

    def __call__(self, cost: float) -> list[Other]:
        """Those that can be made."""
        from surgery.context import state_of
        from surgery.progress import silent
        from surgery.reports import Other
        from surgery.scripts import pruning, token_merging

        self.absent = {}
        costs = state_of(self.gated).costs
        one = pruning.one_input(self.data, self.dense)

        def merging() -> tuple[nn.Module, float]:
            token_merging.check(self.dense)
            return token_merging.merged_to(self.dense, one.args[0], costs.dense, cost)

        def pruned() -> tuple[nn.Module, float]:
            model, reached = pruning.pruned_to(self.dense, one, costs.dense, cost)
            if self.training is not None:
                pruning.distil(model, self.dense, self.training, self.steps, self.progress or silent, "tuning pruned")
            return model, reached

        makers = {token_merging.NAME: merging, **({pruning.NAME: pruned} if self.prune else {})}
        found = []
        for name, make in makers.items():
            if costs.unit != "flops":
                self.absent[name] = "the budget counts seconds, for which no network can be made"
                continue
            try:
                model, reached = make()
            except SurgeryError as error:
                self.absent[name] = str(error)
                continue
            found.append(Other(name, model, reached))
        return found


def sweep(
    gated: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    budgets: Sequence[float],
    networks: Networks,
    *,
    speed: int,
    repeats: int,
    seed: int,
    progress: Progress,
) -> Comparison:
    """Measure `gated` and its peers at every budget.

    Raises:
        BudgetError: If it can be set to none of them.
    """
    from surgery.budgets import set_budget
    from surgery.errors import BudgetError
    from surgery.measurement import measure

    found = Comparison()
    for budget in budgets:
        try:
            set_budget(gated, budget)
        except BudgetError as error:
            found.out_of_reach[budget] = str(error)
            continue
        report = measure(
            gated,
            data,
            dense=dense,
            speed=(speed,) if speed else (),
            others=networks,
            time_peers=True,
            seed=seed,
            repeats=repeats,
            progress=progress,
        )
        found.reports[budget] = _with_absent(report, networks.absent)
    if not found.reports:
        raise BudgetError(f"none of these budgets can be set: {'; '.join(found.out_of_reach.values())}")
    return found


def table(found: Comparison) -> Any:
    """For people."""
    from surgery.tables import rows_table

    points = ", points" if found.scale == 100 else ""
    rows = [
        {f"{name}{points}" if name == "gated minus it" else name: one for name, one in row.items()}
        for row in found.rows()
    ]
    return rows_table("Peers at equal cost", rows)


def markdown(found: Comparison) -> str:
    """For pages such as docs/lab/peers.md."""
    metric, scale, digits = found.metric, found.scale, 4 if found.scale == 1 else 2
    unit, points = (" (%)", ", points") if scale == 100 else ("", "")
    lines = [
        f"| budget | policy | cost | {metric}{unit} | gated minus it (95 %){points} | time |",
        "|---|---|---|---|---|---|",
    ]
    for row in found.rows():
        gap = "" if row["gated minus it"] is None else f"{row['gated minus it']:+.{digits}f} "
        span = row["95 % interval"].replace("none: ", "")
        cost, value, time = (
            "" if row[key] is None else f"{times * row[key]:.{places}f}"
            for key, times, places in (("cost", 1, 3), (metric, scale, digits), ("time", 1, 2))
        )
        name = _LABELS.get(row["policy"], row["policy"])
        where = "all" if row["budget"] is None else f"{row['budget']:g}"
        lines.append(f"| {where} | {name} | {cost} | {value} | {gap}{f'({span})' if gap else span} | {time} |")
    return "\n".join([*lines, "", *(f"- {text}" for text in found.remarks()), ""])


def write(out: Path, found: Comparison, content: Mapping[str, Any], batch: int) -> None:
    """`comparison.json`, `comparison.md`, and `comparison.png` where matplotlib is there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    (out / "comparison.md").write_text(markdown(found), encoding="utf-8")
    try:
        (out / "comparison.png").write_bytes(picture(found, batch))
    except MissingDependency as error:
        note(f"no picture: {error}")


def picture(found: Comparison, batch: int) -> bytes:
    """Metric against realised cost, and against measured time.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    from surgery.scripts import report_figures as figures

    metric, unit = found.metric, found.scale
    points: dict[str, list[dict[str, float]]] = {}
    for row in found.rows():
        if row["cost"] is not None:
            point = {"cost": row["cost"], "metric": unit * row[metric], "time": row["time"]}
            points.setdefault(row["policy"], []).append(point)
    dense = next(iter(found.reports.values())).dense_metric.get(metric, 1.0)
    label = f"{metric}{' (%)' if unit == 100 else ''}"
    draw = figures.tradeoff(points, {"metric": unit * dense}, label, batch)
    return figures.drawn(draw, 10, 5, dark=False, transparent=False)


def _with_absent(report: Report, more: Mapping[str, str]) -> Report:
    from dataclasses import replace

    return replace(report, absent={**report.absent, **more})


def _time(speed: Mapping[int, Any]) -> float | None:
    return next((ratio.total for ratio in speed.values()), None)
