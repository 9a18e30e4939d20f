"""What a gated model knows about itself: its plan, gates' names, costs, and the table of budgets."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from surgery.calling import Outputs
from surgery.sites import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SiteCost:
    """Costs of one site (or of one head) per sample, in the unit of the model's `CostModel`."""

    branch: float
    skip: float
    router: float

    def at(self, rate: float, *, routed: bool) -> float:
        """What it costs at an active rate, with its router where that runs."""
        return rate * self.branch + (1 - rate) * self.skip + routed * self.router


@dataclass(frozen=True, slots=True)
class CostModel:
    """Whole-model cost as a function of active rates; `unit` is `flops` or `seconds`.

    `cost(rates) = (fixed + sum_s router_s + rate_s * branch_s + (1 - rate_s) * skip_s) / dense`.
    """

    unit: str
    dense: float
    sites: dict[str, SiteCost]

    @property
    def fixed(self) -> float:
        """What runs whatever is decided."""
        return self.dense - sum(site.branch for site in self.sites.values())

    def cost(self, rates: Mapping[str, float], routed: Collection[str] | None = None) -> float:
        """Fraction of the dense model's cost at the given active rates (sites that are missing count as open), where the
        routers of the sites in `routed` run; by default all do.
        """
        asked = self.sites if routed is None else routed
        each = (site.at(rates.get(name, 1.0), routed=name in asked) for name, site in self.sites.items())
        return (self.fixed + sum(each)) / self.dense


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """One row of the budget table: a threshold, the mean cost it gave on calibration data, and what was active."""

    threshold: float
    cost: float
    active_rate: dict[str, float]
    static: tuple[str, ...] = ()
    """Sites that the static policy of this cost keeps open."""


@dataclass(frozen=True, slots=True)
class LookPoint:
    """How one budget is shared between a first pass and a second look.

    Args:
        budget: Mean cost of both, as a fraction of dense.
        base: Budget of the first pass.
        cost: What the first pass cost on calibration data, as a fraction of dense; equal to `budget` where no input is
            looked at again.
        margins: The margin for a share of 0, 1, …, 100 % of inputs after that first pass: the true share below it is no
            larger, with about 95 % confidence for inputs like those that it was calibrated on.
    """

    budget: float
    base: float
    cost: float
    margins: tuple[float, ...]


IN_MEMORY = ("trainable", "saw_values")
"""Fields of `GatedState` that belong to a model in memory and are not saved."""


@dataclass(frozen=True, slots=True)
class Healing:
    """Small own changes to backbone parameters, in force wherever the model does not run dense.

    Args:
        kind: `norms`: scales and shifts of normalisation layers; `lora`: low-rank changes of linear maps.
        shapes: Shape of every changed parameter, by its name in the state dict.
        rank: Of low-rank changes.
    """

    kind: Literal["norms", "lora"]
    shapes: Mapping[str, tuple[int, ...]]
    rank: int = 0


@dataclass(slots=True)
class GatedState:
    """Everything about a gated model that is not a tensor."""

    plan: Plan
    costs: CostModel
    table: list[BudgetPoint] = field(default_factory=list)
    budget: float | None = None
    threshold: float = 0.0
    static: dict[str, bool] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    """Sites as static policies cut them, the least harmful first; empty where it was never measured."""
    base: dict[str, Any] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    """Names of the backbone's parameters that required gradients before gates were inserted."""
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    looks: list[LookPoint] = field(default_factory=list)
    """The table of second looks, budgets rising; empty where there is none."""
    margin: float | None = None
    """Inputs whose margin is below it are looked at again, or None."""
    policy: str = "routed"
    """`routed`, or `static` where input-dependence did not pay and the static policy runs."""
    healing: Healing | None = None
    outputs: Outputs = "auto"
    saw_values: bool | None = None
    """Whether the first output over data told that it holds values; None before."""
    padding_is_unread: bool = False
    """Whether nothing reads what becomes of padding, so that gates per token are closed there."""

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Every field as it was, if the block fails: nothing is left half done."""
        before = {one.name: getattr(self, one.name) for one in fields(self)}
        try:
            yield
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def note(self, text: str) -> None:
        """Say something about the conversion that every report repeats."""
        self.notes.append(text)
        logger.info(text)

    @property
    def names(self) -> tuple[str, ...]:
        """Site names in order of execution."""
        return self.plan.names

    @property
    def gives_values(self) -> bool:
        """Whether its outputs are values, which differ by their distance, and not logits, which differ by what they say."""
        return self.outputs == "values" or (self.outputs == "auto" and bool(self.saw_values))

    @property
    def units(self) -> tuple[str, ...]:
        """Names of what is decided, in order of execution: sites, and heads one by one. Costs and rates go by them."""
        return self.plan.units

    def ranks(self, rates: Mapping[str, float]) -> dict[str, float]:
        """What static policies open first: what is cut last, or is most active where no cut order was measured."""
        return self.above({name: float(place) for place, name in enumerate(self.order)} or rates)

    def above(self, ranks: Mapping[str, float]) -> dict[str, float]:
        """The ranks with what is always on above everything else."""
        return {**ranks, **dict.fromkeys(self.plan.always_on, math.inf)}

    def constant_rates(self, rate: float) -> dict[str, float]:
        """Active rates where every router gives the same decision."""
        return {**dict.fromkeys(self.units, rate), **dict.fromkeys(self.plan.always_on, 1.0)}
