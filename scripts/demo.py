"""`surgery demo`: train a small vision transformer on digits, convert it, and draw what that cost and saved."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.errors import MissingDependency
from surgery.scripts import options, outputs
from surgery.scripts.bars import Report as Progress
from surgery.scripts.bars import progress_bars
from surgery.scripts.running import command, note, program, show, show_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.reports import Report

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BATCH = 64
TIMED = (1, 8, 256)
PICTURES = tuple(f"report-{name}.png" for name in ("tradeoff", "classes", "costs", "policies"))
OURS = ("dense.safetensors", "demo.json", "demo.png", "gated", "report.html", *PICTURES)
"""Everything that is written into --out."""

Batches = list[tuple["Tensor", "Tensor"]]


@dataclass(frozen=True)
class Outcome:
    """What the demo found.

    Args:
        headline: The report at the budget asked for, with times.
        sweep: Budget -> report, one checkpoint throughout.
        kinds: Site -> kind.
        seconds: Time for training, conversion, the report, and all of it.
    """

    headline: Report
    sweep: Mapping[float, Report]
    kinds: Mapping[str, str]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {
            "headline": self.headline.to_dict(),
            "sweep": [
                {"budget": budget, "cost": report.cost, "accuracy": report.metric["accuracy"], "peers": _peers(report)}
                for budget, report in self.sweep.items()
            ],
            "seconds": dict(self.seconds),
        }


@command
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write: checkpoint, picture, numbers.")] = Path(
        "demo-out"
    ),
    budget: options.Budget = 0.5,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """See it work: scikit-learn's digits, a small timm network, no download, a few minutes on two cores."""
    from surgery.checkpoints import save
    from surgery.errors import check_budget
    from surgery.scripts import digits_model

    check_budget(budget)
    outputs.check_directory("--out", out, OURS, "a demo's output")
    options.set_up(threads, seed)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with progress_bars() as progress:
        dense, trained = _train(out, seed, progress)
        gated = _convert(dense, budget, seed, progress)
        converted = time.monotonic()
        weights = (out / "dense.safetensors").resolve()
        save(gated, out / "gated", overwrite=True, spec=f"python:{digits_model.__name__}:trained?weights={weights}")
        headline, sweep = _measure(gated, dense, budget, seed, progress)
        scored = time.monotonic()
        page = _report(out / "report.html", gated, dense, sweep, seed, progress)
    end = time.monotonic()
    seconds = {
        "training": trained - start,
        "conversion": converted - trained,
        "report": end - scored,
        "all": end - start,
    }
    outcome = Outcome(headline, sweep, _kinds(gated), seconds)
    (out / "demo.json").write_text(json.dumps(outcome.to_dict(), indent=1) + "\n", encoding="utf-8")
    picture = _draw(out / "demo.png", outcome)
    if as_json:
        show_json({"out": str(out), "picture": None if picture is None else str(picture), **outcome.to_dict()})
    else:
        show(headline)
        show(_sweep_table(outcome))
        note(_next(out, [path for path in (picture, page) if path is not None], seconds))


def _train(out: Path, seed: int, progress: Progress) -> tuple[nn.Module, float]:
    """The dense network, and when it was ready."""
    from surgery.adapters import digits
    from surgery.scripts import digits_model

    model = digits_model.train(*digits("train", size=digits_model.SIZE), seed=seed, progress=progress)
    digits_model.save(model, out / "dense.safetensors")
    return model, time.monotonic()


def _convert(dense: nn.Module, budget: float, seed: int, progress: Progress) -> nn.Module:
    from surgery.conversion import convert

    return convert(dense, budget, data=_batches("train"), seed=seed, progress=progress)


def _measure(
    gated: nn.Module, dense: nn.Module, budget: float, seed: int, progress: Progress
) -> tuple[Report, dict[float, Report]]:
    """The report at `budget`, and reports at every budget that the checkpoint can be set to."""
    from surgery.budgets import budget_range, set_budget
    from surgery.measurement import measure

    test = _batches("test")
    low, high = budget_range(gated)
    sweep = {}
    for index, one in enumerate(budgets := [b for b in sorted({*BUDGETS, budget}) if low <= b <= high]):
        progress("scoring budgets", index, len(budgets))
        set_budget(gated, one)
        sweep[one] = measure(gated, test, dense=dense, speed=(), seed=seed)
    progress("scoring budgets", len(budgets), len(budgets))
    set_budget(gated, budget)
    return measure(gated, test, dense=dense, speed=TIMED, seed=seed, progress=progress), sweep


def _batches(split: str) -> Batches:
    from surgery.adapters import digits
    from surgery.scripts import digits_model

    images, labels = digits(split, size=digits_model.SIZE)
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def _kinds(gated: nn.Module) -> dict[str, str]:
    from surgery.overview import status

    return {row.site: f"{row.kind}, decided per {row.granularity}" for row in status(gated).sites}


def _draw(path: Path, outcome: Outcome) -> Path | None:
    """The picture, or None where matplotlib is missing."""
    from surgery.scripts.figures import Curve, draw_tradeoff

    sweep = outcome.sweep.values()
    policies = (("static", "static cut, same skip paths"), ("random", "random decisions, same rates"))
    curves = [Curve("gated: decides per input", [(report.cost, report.metric["accuracy"]) for report in sweep])]
    for name, label in policies:
        curves.append(
            Curve(label, [(report.peer(name).cost, report.peer(name).metric) for report in sweep if report.peers])
        )
    headline = outcome.headline
    try:
        draw_tradeoff(
            path,
            curves,
            dense=headline.dense_metric["accuracy"],
            samples=headline.samples,
            rates=headline.active_rate,
            kinds=outcome.kinds,
            title="Digits, vision transformer of 6 blocks: one checkpoint, many budgets",
            rates_title=f"What runs at {100 * headline.cost:.0f} % of the dense FLOPs",
        )
    except MissingDependency as error:
        note(f"no picture: {error}")
        return None
    return path


def _report(
    path: Path, gated: nn.Module, dense: nn.Module, sweep: Mapping[float, Report], seed: int, progress: Progress
) -> Path | None:
    """The page, or None where a library for it is missing."""
    from surgery.adapters import load_data, load_model
    from surgery.scripts import digits_model
    from surgery.scripts.report_content import write
    from surgery.scripts.report_measuring import Subject

    spec = f"python:{digits_model.__name__}:trained?weights={path.with_name('dense.safetensors').resolve()}"
    loaded = load_model(spec)
    rows = load_data(f"digits:{digits_model.SIZE}", loaded, split="test", batch_size=BATCH)
    try:
        write(path, Subject(gated, dense, rows, loaded, "digits", "digits"), (), BATCH, None, seed, progress, sweep)
    except MissingDependency as error:
        note(f"no report: {error}")
        return None
    return path


def _peers(report: Report) -> dict[str, dict[str, float]]:
    return {peer.name: {"cost": peer.cost, "accuracy": peer.metric} for peer in report.peers}


def _sweep_table(outcome: Outcome) -> Any:
    from surgery.tables import percent, rows_table

    rows = []
    for budget, report in outcome.sweep.items():
        others = {peer.name: percent(peer.metric) for peer in report.peers}
        rows.append(
            {
                "budget": percent(budget, 0),
                "cost": percent(report.cost),
                "gated": percent(report.metric["accuracy"]),
                "static": others.get("static", ""),
                "random": others.get("random", ""),
            }
        )
    return rows_table(
        "Accuracy of one checkpoint at other budgets (500 test images: standard error about 0.6 points)", rows
    )


def _next(out: Path, written: Sequence[Path], seconds: Mapping[str, float]) -> str:
    lines = [
        f"took {seconds['all']:.0f} s: training {seconds['training']:.0f} s, conversion {seconds['conversion']:.0f} s, "
        f"report {seconds['report']:.0f} s",
        "times: overhead dominates in a network this small unless batches are large; see docs/limits.md",
        *(f"look at: {path}" for path in written),
        "next:",
        f"  {program()} show {out / 'gated'} blocks.0",
        f"  {program()} score {out / 'gated'} --data digits:16 --budget 0.4",
        f"  {program()} benchmark {out / 'gated'} --data digits:16",
    ]
    return "\n".join(lines)
