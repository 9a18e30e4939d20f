"""`status`: what a gated model is set to do, site by site, from its calibration; nothing runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.budgets import first_pass
from surgery.context import state_of
from surgery.gates import iter_gates
from surgery.state import GatedState

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """One gate.

    Args:
        site: Name of the site.
        kind: block, attention, mlp or heads.
        granularity: sample, token or prefill.
        skip_path: identity, affine, low-rank, linear, depthwise or narrow.
        threshold: Scores above it keep the branch; None where no router runs.
        active_rate: Share of calibration inputs (or tokens, or heads) for which the branch ran, with second looks at most;
            None before calibration.
        cost_share: What branch, skip path and router cost at that rate, as a fraction of the dense model.
        router: `own`, or the name of the site whose router it shares; shown where one does.
    """

    site: str
    kind: str
    granularity: str
    skip_path: str
    threshold: float | None
    active_rate: float | None
    cost_share: float | None
    router: str = "own"


@dataclass(frozen=True, slots=True)
class Status:
    """A gated model's settings; prints as a table.

    Args:
        model: Class of the model.
        runs: `dense`, `routed` or `static`.
        budget: What was asked for; None before calibration.
        cost: Mean cost on calibration data as a fraction of dense, with second looks at most; None before calibration.
        cost_unit: flops or seconds.
        attainable: Smallest and largest budget of the table below 1.0; None before calibration.
        sites: One row per gate, in order of execution.
        notes: What the conversion found worth saying.
        again: Largest share of inputs that is to get a second look, which counts in rates and cost.
        always_on: Sites that run unless they are forced not to.
        first_tokens: For how many first tokens of every sequence all gates per token are open.
    """

    model: str
    runs: str
    budget: float | None
    cost: float | None
    cost_unit: str
    attainable: tuple[float, float] | None
    sites: tuple[SiteStatus, ...]
    notes: tuple[str, ...]
    again: float = 0.0
    always_on: tuple[str, ...] = ()
    first_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form; a threshold that is not finite is None."""
        result = asdict(self)
        for row in result["sites"]:
            if row["threshold"] is not None and not math.isfinite(row["threshold"]):
                row["threshold"] = None
        return {
            **result,
            "sites": list(result["sites"]),
            "notes": list(self.notes),
            "always_on": list(self.always_on),
            "attainable": _listed(self.attainable),
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from surgery.tables import rows_table

        lines = [Text(self._summary())]
        if self.always_on:
            lines.append(Text(f"always on: {', '.join(self.always_on)}"))
        if self.first_tokens:
            lines.append(Text(f"the first {self.first_tokens} tokens of every sequence run in full"))
        lines += [Text(f"note: {note}") for note in self.notes]
        rows = [asdict(row) for row in self.sites]
        if all(row["router"] == "own" for row in rows):
            for row in rows:
                del row["router"]
        return Group(rows_table(f"Gates of {self.model}", rows), *lines)

    def __str__(self) -> str:
        from surgery.tables import render

        return render(self.__rich__())

    def _summary(self) -> str:
        from surgery.tables import percent

        if self.attainable is None:
            return f"runs {self.runs}; not calibrated yet"
        low, high = (percent(value) for value in self.attainable)
        most = "at most " if self.again else ""
        cost = (
            ""
            if self.cost is None
            else f", cost {most}{percent(self.cost)} of dense on calibration data ({self.cost_unit})"
        )
        budget = "none" if self.budget is None else percent(self.budget)
        look = f"; second look at the least certain inputs, at most {percent(self.again)}" if self.again else ""
        return f"runs {self.runs}{look}; budget {budget}{cost}; attainable budgets {low} to {high}, and 100 % (dense)"


def status(gated: nn.Module) -> Status:
    """What every gate is set to do: granularity, skip path, threshold, active rate on calibration data, share of the
    cost.

    Args:
        gated: A gated model.

    Returns:
        One row per gate, and what the whole model is set to; prints as a table.

    Raises:
        NotConverted: If the model has no gates.
    """
    state = state_of(gated)
    runs = _runs(state)
    rates = _rates(state, runs)
    again = first_pass(state)[1]
    rows = []
    for name, gate in iter_gates(gated):
        planned, site = gate.planned, gate.site
        rows.append(
            SiteStatus(
                site=name,
                kind=site.kind,
                granularity=planned.granularity,
                skip_path=planned.skip,
                threshold=gate.threshold if runs == "routed" and not gate.always_on else None,
                active_rate=None
                if rates is None
                else sum(rates[unit] for unit in site.units) / len(site.units) + again,
                cost_share=None
                if rates is None
                else _cost_share(state, site.units, rates, routed=runs == "routed")
                + again * _branch_share(state, site.units),
                router=planned.leader or "own",
            )
        )
    costs = [point.cost for point in state.table]
    return Status(
        model=type(gated).__name__,
        runs=runs,
        budget=state.budget,
        cost=None if rates is None else state.costs.cost(rates, None if runs == "routed" else ()) + again,
        again=again,
        always_on=tuple(name for name, gate in iter_gates(gated) if gate.always_on),
        first_tokens=state.plan.first_tokens
        if any(planned.granularity == "token" for planned in state.plan.sites)
        else 0,
        cost_unit=state.costs.unit,
        attainable=(min(costs), max(costs)) if costs else None,
        sites=tuple(rows),
        notes=tuple(state.notes),
    )


def _runs(state: GatedState) -> str:
    if state.budget is None or state.budget >= 1:
        return "dense"
    return "static" if state.policy == "static" else "routed"


def _rates(state: GatedState, runs: str) -> Mapping[str, float] | None:
    """Active rates of the current setting on calibration data, or None where they are not known."""
    if runs == "dense":
        return dict.fromkeys(state.units, 1.0)
    if runs == "static":
        return {name: float(state.static.get(name, True)) for name in state.units}
    if not state.table:
        return None
    return first_pass(state)[0].active_rate


def _cost_share(state: GatedState, units: Sequence[str], rates: Mapping[str, float], *, routed: bool) -> float:
    return sum(state.costs.sites[unit].at(rates[unit], routed=routed) for unit in units) / state.costs.dense


def _branch_share(state: GatedState, units: Sequence[str]) -> float:
    return sum(state.costs.sites[unit].branch for unit in units) / state.costs.dense


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)
