"""What a report is about, and what is measured for it: scores and times at every budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery import policies
from surgery.adapters import Loaded
from surgery.adapters.data import Loader
from surgery.budgets import budget_range, point_at, set_budget
from surgery.calling import call, device_of
from surgery.context import state_of
from surgery.costs import place
from surgery.measurement import measure
from surgery.model_timing import groups_of
from surgery.policies import decided
from surgery.reports import Report
from surgery.scripts.bars import Report as Progress
from surgery.timing import compare

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


def sweep_of(
    subject: Subject, budgets: Sequence[float], seed: int, progress: Progress, measured: Mapping[float, Report]
) -> dict[float, Report]:
    """Reports at the budgets of the curves, at the model's own and at those measured before; leaves another budget set."""
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


def times_by_budget(
    subject: Subject, budgets: Sequence[float], size: int, progress: Progress
) -> dict[float, dict[str, float]]:
    """Time of gated, static and random by the dense model's, median over pairs of calls on the same inputs; none if size is 0."""
    state, rows = state_of(subject.gated), _groups(subject, size) if size else []
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
    return [place(one, subject.gated) for one in itertools.islice(groups_of(subject.rows, size), 8)]
