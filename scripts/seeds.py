"""Several conversions of one network, scored together: `python -m surgery.scripts.seeds DIR DIR … --data … --budget …`.

The dense model runs once. Every conversion runs at every budget, beside the static cut with its skip paths at the cost that it
had (the two neighbouring cuts interpolated) and its own decisions given to other inputs. Scores are means over the
conversions with their smallest and largest one; intervals are paired bootstraps over inputs of these means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from surgery.calling import Batch
    from surgery.peers import Parts
    from surgery.scoring import Scores

RESAMPLES = 2000


@dataclass
class Point:
    """All conversions at one budget.

    Args:
        budget: What was asked for.
        costs: Realised, one per conversion.
        submodules: Active share of the submodules, likewise.
        scores: Of the gated models, likewise.
        agreements: With the dense model, likewise.
        gap: Gated minus dense, mean and ends of the interval.
        peers: Name -> scores of the peer, one per conversion.
        ahead: Name -> gated minus the peer, mean and ends of the interval.
    """

    budget: float
    costs: list[float] = field(default_factory=list)
    submodules: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    gap: tuple[float, float, float] = (0.0, 0.0, 0.0)
    peers: dict[str, list[float]] = field(default_factory=dict)
    ahead: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def main(
    directories: Annotated[list[Path], typer.Argument(help="What `surgery convert` wrote, one directory per seed.")],
    data: Annotated[str, typer.Option(help="Labelled data that nothing was fitted on.")],
    budget: Annotated[list[float], typer.Option(help="Repeatable.")],
    model: Annotated[
        str | None, typer.Option(help="MODEL that they were made from; by default the one they name.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data.")] = "test",
    peers: Annotated[bool, typer.Option(help="Also score static cuts and shuffled decisions.")] = True,
    batch_size: Annotated[int, typer.Option(help="Inputs per call.")] = 50,
    limit: Annotated[int | None, typer.Option(help="Use so many inputs, drawn with seed 0.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Score several conversions of one network."""
    from surgery.adapters import load_data
    from surgery.calling import batches
    from surgery.scripts.loading import Machine

    machine = Machine(threads=threads)
    pairs = [machine.load_converted(directory, model) for directory in directories]
    loaded = pairs[0][1]
    read = load_data(data, loaded, split=split, batch_size=batch_size, limit=limit, seed=0, shuffle=limit is not None)
    inputs = list(batches(read))
    dense, outputs, metric = dense_score(loaded.model, inputs)
    typer.echo(f"dense: {metric} {dense.mean:.4f} on {len(dense.values):,} inputs")
    points = []
    for wanted in budget:
        points.append(
            score_all(wanted, [gated for gated, _ in pairs], loaded.model, inputs, dense, outputs, peers=peers)
        )
        typer.echo(f"budget {wanted:g}: costs {points[-1].costs}, scores {points[-1].scores}")
    if out is not None:
        out.write_text(json.dumps([asdict(point) for point in points], indent=1), encoding="utf-8")
    typer.echo(markdown(points, dense.mean))


def dense_score(model: nn.Module, inputs: Sequence[Batch]) -> tuple[Scores, list[Any], str | None]:
    """Scores of the dense model, its outputs, and the name of the metric."""
    import torch

    from surgery.calling import call_dense
    from surgery.peers import Judge, Parts

    judge, parts, outputs = Judge(model, ()), Parts(), []
    with torch.no_grad():
        for batch in inputs:
            outputs.append(call_dense(model, batch))
            judge.add(parts, batch, outputs[-1], outputs[-1], None)
    return parts.score, outputs, judge.metric


@dataclass(frozen=True, slots=True)
class Scored:
    """One gated model at one budget.

    Args:
        cost: Realised, as a fraction of dense.
        submodules: Active share of the submodules.
        agreement: With the dense model.
        scores: Of the gated model.
        peers: Name -> scores of the peer.
    """

    cost: float
    submodules: float
    agreement: float
    scores: Scores
    peers: Mapping[str, Scores]


def score_at(
    gated: nn.Module,
    budget: float,
    dense: nn.Module,
    inputs: Sequence[Batch],
    outputs: Sequence[Any],
    *,
    peers: bool = False,
) -> Scored:
    """Run a gated model at a budget on inputs of which the dense model's outputs are known, and its peers."""
    from surgery.budgets import set_budget

    set_budget(gated, budget)
    parts, cost = _run(gated, dense, inputs, outputs, peers=peers)
    active = parts["gated"].decided.active_rate
    others = {name: parts[name].score for name in ("shuffled",) if name in parts}
    if peers:
        others["static"] = _static(gated, parts, cost)
    return Scored(cost, sum(active.values()) / len(active), parts["gated"].agreement.mean, parts["gated"].score, others)


def score_all(
    budget: float,
    models: Sequence[nn.Module],
    dense: nn.Module,
    inputs: Sequence[Batch],
    dense_score: Scores,
    outputs: Sequence[Any],
    *,
    peers: bool,
) -> Point:
    """All conversions at one budget."""
    found = [score_at(gated, budget, dense, inputs, outputs, peers=peers) for gated in models]
    ours = _mean([one.scores for one in found])
    others = {name: [one.peers[name] for one in found] for name in found[0].peers}
    return Point(
        budget,
        costs=[one.cost for one in found],
        submodules=[one.submodules for one in found],
        scores=[one.scores.mean for one in found],
        agreements=[one.agreement for one in found],
        gap=against(ours, dense_score),
        peers={name: [one.mean for one in scores] for name, scores in others.items()},
        ahead={name: against(ours, _mean(scores)) for name, scores in others.items()},
    )


def _run(
    gated: nn.Module, dense: nn.Module, inputs: Sequence[Batch], outputs: Sequence[Any], *, peers: bool
) -> tuple[dict[Any, Parts], float]:
    """The gated model's answers and its shuffled ones by name, those of the static cuts around its cost by the sites kept;
    and its cost."""
    import torch

    from surgery import policies
    from surgery.calling import call
    from surgery.context import state_of, tape
    from surgery.peers import Judge, Parts
    from surgery.policies import decided
    from surgery.second_look import given_to_others

    state = state_of(gated)
    judge = Judge(dense, state.units, state.outputs)
    parts: dict[Any, Parts] = {"gated": Parts()}
    with torch.no_grad():
        for index, (batch, reference) in enumerate(zip(inputs, outputs, strict=True)):
            with tape(gated) as events:
                output = call(gated, batch)
            judge.add(parts["gated"], batch, output, reference, events)
            if not (peers and events):  # dense: there are no decisions to give to others
                continue
            with decided(gated, policies.shuffled(events, index)) as others:
                output = call(gated, batch)
            if events.looked:
                output, rows = given_to_others(output, reference, events.looked[-1], index)
                others.looked.append(rows)
            judge.add(parts.setdefault("shuffled", Parts()), batch, output, reference, others)
        cost = parts["gated"].decided.cost(state.costs)
        for kept in _cuts(gated, parts["gated"], cost) if peers else ():
            for batch, reference in zip(inputs, outputs, strict=True):
                with decided(gated, policies.constant(kept)) as others:
                    output = call(gated, batch)
                judge.add(parts.setdefault(kept, Parts()), batch, output, reference, others)
    return parts, cost


def _cut(gated: nn.Module, parts: Parts, cost: float) -> Any:
    from surgery import policies
    from surgery.context import state_of

    state = state_of(gated)
    return policies.cut(state.costs, state.ranks(parts.decided.first_rate), cost)


def _cuts(gated: nn.Module, parts: Parts, cost: float) -> set[tuple[str, ...]]:
    one = _cut(gated, parts, cost)
    return {one.lower, one.upper}


def _static(gated: nn.Module, parts: Mapping[Any, Parts], cost: float) -> Scores:
    one = _cut(gated, parts["gated"], cost)
    return parts[one.lower].score.mixed(parts[one.upper].score, one.share)


def _mean(scores: Sequence[Scores]) -> Scores:
    import torch

    from surgery.scoring import Scores

    return Scores(torch.stack([one.values for one in scores]).mean(0), scores[0].weights)


def against(ours: Scores, other: Scores) -> tuple[float, float, float]:
    """Ours minus the other's, and the ends of its paired bootstrap interval."""
    from surgery.peers import interval

    return ours.mean - other.mean, *interval(ours, other, RESAMPLES, 0)


def markdown(points: Sequence[Point], dense: float) -> str:
    """The table of docs/lab/images.md."""
    names = sorted({name for point in points for name in point.peers}, reverse=True)
    head = ["budget", "cost", "submodules", "gated", "share of dense", "agreement", "minus dense (95 %)"]
    head += [f"minus {name} (95 %)" for name in names]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for point in points:
        mean = sum(point.scores) / len(point.scores)
        cells = [
            f"{point.budget:.2f}",
            range_text(point.costs, 3),
            range_text(point.submodules, 3),
            range_text(point.scores, 4),
            f"{mean / dense:.1%}".replace("%", " %"),
            range_text(point.agreements, 3),
            gap_text(point.gap),
            *(gap_text(point.ahead[name]) for name in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def range_text(values: Sequence[float], digits: int) -> str:
    """The mean, and the smallest and the largest where there are several."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def gap_text(found: Sequence[float]) -> str:
    """A difference and the ends of its interval, in points."""
    mean, low, high = (100 * value for value in found)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    typer.run(main)
