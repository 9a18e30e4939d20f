"""How often `Guard` raises an alarm: `python -m surgery.scripts.guard_trial DIR --data … [--shifted …]`.

On traffic like the data that the model was calibrated for every alarm is a false one. The calls are run once, gated and
dense; many streams are then drawn from them with replacement, each watched by a guard of its own. With `--shifted`, one
guard also sees the data and then that other data, and a picture shows what it saw and did.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.loading import Machine

if TYPE_CHECKING:
    from torch import nn

    from surgery.guarding import Health


@dataclass(frozen=True, slots=True)
class Watched:
    """One call: what a guard needs to know of it."""

    size: int
    events: Sequence[Any]
    compared: list[bool]


def watched(gated: nn.Module, data: Any) -> Iterator[Watched]:
    """Run every batch at the model's budget, and dense."""
    import torch

    from surgery.calling import batches, call
    from surgery.context import execution, state_of
    from surgery.costs import place
    from surgery.guarding import disagreements, running

    budget = state_of(gated).budget or 1.0
    with torch.no_grad():
        for one in batches(data):
            batch = place(one, gated)
            with running(gated, budget) as events:
                output = call(gated, batch)
            with execution(gated, "dense"):
                dense = call(gated, batch)
            yield Watched(batch.size, events, disagreements(gated, batch, output, dense))


def alarms(
    gated: nn.Module, calls: Sequence[Watched], streams: int, inputs: int, settings: dict[str, Any]
) -> list[str]:
    """The reason of the first step of every stream of `inputs` inputs that has one: `drift` or `disagreement`."""
    from surgery.context import draw_unit
    from surgery.guarding import Guard

    found = []
    for stream in range(streams):
        guard, draw = Guard(gated, seed=stream, **settings), random.Random(stream)
        seen = number = 0
        while seen < inputs and not guard.steps:
            one = draw.choice(calls)
            chosen = draw_unit(stream, number) < guard.dense_fraction
            guard.note(one.size, guard.budget, one.events, one.compared if chosen else None)
            seen, number = seen + one.size, number + 1
        found += [guard.steps[0].reason.partition(" ")[0]] if guard.steps else []
    return found


def watch(guard: Any, *sources: Any) -> tuple[list[Health], list[int]]:
    """What a guard knows after every call, and after how many inputs each source ended."""
    import torch

    from surgery.calling import batches
    from surgery.costs import place

    seen, ends = [], []
    with torch.no_grad():
        for source in sources:
            for one in batches(source):
                batch = place(one, guard.gated)
                guard(*batch.args, **batch.kwargs)
                seen.append(guard.health())
            ends.append(seen[-1].inputs)
    return seen, ends


def draw(path: Path, seen: Sequence[Health], change: int, settings: dict[str, Any]) -> None:
    """Budget, disagreement and drift over the inputs."""
    from surgery.scripts.report_figures import drawn

    places = [health.inputs for health in seen]

    def picture(figure: Any, dark: bool) -> None:
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        top.step(places, [100 * health.budget for health in seen], where="post", color="#0072B2")
        top.set_ylabel("budget\n(% of dense)")
        top.set_ylim(0, 108)
        middle.plot(places, [100 * (health.disagreement or 0) for health in seen], color="#0072B2", label="seen")
        ends = [[100 * end for end in (health.low, health.high)] for health in seen]
        middle.fill_between(
            places, *zip(*ends, strict=True), color="#0072B2", alpha=0.2, linewidth=0, label="95 % interval"
        )
        middle.axhline(100 * settings["max_disagreement"], color="#D55E00", linestyle="--", label="bound")
        middle.set_ylabel("disagreement\n(% of inputs)")
        middle.set_ylim(0, max(4 * 100 * settings["max_disagreement"], 10))
        enough = [
            many and bool(health.drift) for health, many in zip(seen, _enough(seen, settings["least"]), strict=True)
        ]
        worst = [max(h.drift.values()) if there else float("nan") for h, there in zip(seen, enough, strict=True)]
        bottom.plot(places, worst, color="#0072B2")
        bottom.axhline(settings["max_drift"], color="#D55E00", linestyle="--")
        bottom.set_ylabel("largest drift of a\nsite (index)")
        bottom.set_ylim(0, 2 * settings["max_drift"])
        bottom.set_xlabel("inputs")
        for axes in (top, middle, bottom):
            axes.axvline(change, color="#7f7f7f", linewidth=1.2, linestyle=":")
            axes.grid(alpha=0.25)
        top.annotate("other data", (change, 4), xytext=(4, 2), textcoords="offset points", fontsize=8)
        figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)

    path.write_bytes(drawn(picture, 8, 5, dark=False, transparent=False))


def _enough(seen: Sequence[Health], least: int) -> Iterator[bool]:
    """Whether as many inputs were seen since the last step as a guard needs for a conclusion."""
    begun = steps = 0
    for health in seen:
        if len(health.steps) != steps:
            begun, steps = health.inputs, len(health.steps)
        yield health.inputs - begun >= least


def main(
    directory: options.DirectoryArgument,
    data: Annotated[str, typer.Option("--data", help=options.DATA_HELP)],
    split: Annotated[str, typer.Option("--split", help="Split of the data.")] = "test",
    shifted: Annotated[str | None, typer.Option("--shifted", help="Other data, for the picture.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Picture to write.")] = Path("guard.png"),
    streams: Annotated[int, typer.Option("--streams", min=1, help="Streams drawn.")] = 100,
    inputs: Annotated[int, typer.Option("--inputs", min=1, help="Inputs of a stream.")] = 4000,
    dense_fraction: Annotated[float, typer.Option("--dense-fraction", help="Share of calls also run dense.")] = 0.05,
    max_disagreement: Annotated[float, typer.Option("--max-disagreement", help="Bound on the disagreement.")] = 0.05,
    batch_size: options.BatchSize = 4,
    limit: options.Limit = None,
) -> None:
    """Count alarms on data like that of the calibration."""
    from surgery.adapters import load_data
    from surgery.guarding import Guard

    gated, loaded = Machine("cpu").load_converted(directory, None)
    rows = load_data(data, loaded, split=split, batch_size=batch_size, limit=limit)
    calls = list(watched(gated, rows))
    count = sum(call.size for call in calls)
    wrong = sum(sum(call.compared) for call in calls)
    settings: dict[str, Any] = {"dense_fraction": dense_fraction, "max_disagreement": max_disagreement}
    found = alarms(gated, calls, streams, inputs, settings)
    typer.echo(
        f"{count} inputs; disagreement with dense {100 * wrong / count:.1f} %, bound {100 * max_disagreement:g} %"
    )
    typer.echo(
        f"{streams} streams of {inputs} inputs, {100 * dense_fraction:g} % of the calls compared: {len(found)} with an alarm "
        f"({found.count('drift')} drift, {found.count('disagreement')} disagreement)"
    )
    if shifted is not None:
        watching = {**settings, "dense_fraction": 0.5, "least": 30, "max_drift": 0.25}
        others = load_data(shifted, loaded, split=split, batch_size=batch_size, limit=limit or count)
        guard = Guard(gated, **watching, window=500)
        seen, ends = watch(guard, rows, others)
        draw(out, seen, ends[0], watching)
        for step in guard.steps:
            typer.echo(f"after {step.calls} calls {step.old:.2f} to {step.new:.2f}: {step.reason}")


if __name__ == "__main__":
    typer.run(main)
