"""What an audit found: sites, classes, groups, errors; and how it prints.

Axis letters: `N` samples, `S` sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class SiteAudit:
    """One gate.

    Args:
        site: Its name.
        active_rate: Share of inputs (or tokens) for which the branch ran.
        entropy: Of the mean decision, in bits; 0 for a gate that treats everything alike.
        class_information: Mutual information of decision and class in bits, corrected for the sample size; None without
            classes.
        near_rate: Share of decisions whose score is near the threshold; None where no router ran.
        noise_rate: Share of decisions that small noise on the input flips; None where it was not tried.
    """

    site: str
    active_rate: float
    entropy: float
    class_information: float | None
    near_rate: float | None
    noise_rate: float | None


@dataclass(frozen=True, slots=True)
class GroupAudit:
    """The inputs of one class or group.

    Args:
        group: Its name.
        inputs: How many.
        cost: Mean cost as a fraction of dense.
        low: Lower end of the cost's 95 % interval.
        high: Upper end of the same.
        accuracy: Of the gated model; None without labels.
        dense_accuracy: Of the dense model; None without labels.
        agreement: Share of inputs for which both predict the same; None without classes.
    """

    group: str
    inputs: int
    cost: float
    low: float
    high: float
    accuracy: float | None
    dense_accuracy: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Mistake:
    """An input that the dense model gets right and the gated one wrong.

    Args:
        index: Its place in the data.
        input: Hash of its content, as in a log.
        label: What it is.
        predicted: What the gated model says.
        cost: What it was given, as a fraction of dense.
        shown: The input as people see it (a text), or "".
    """

    index: int
    input: str
    label: str
    predicted: str
    cost: float
    shown: str = ""


@dataclass(frozen=True)
class Observed:
    """Everything kept by input; what the report draws.

    Args:
        names: Site names.
        rates: Active share per input and site, `(N, S)`.
        costs: As a fraction of dense, `(N,)`.
        weights: How much each input counts for a rate, `(N,)`.
        hashes: Of every input's content.
        labels: `(N,)`, or None.
        predicted: Of the gated model, `(N,)`, or None where the output is an embedding.
        dense: Of the dense model, likewise.
        decisions: Per input the decisions of every site: `(positions,)` bool, padding left out.
    """

    names: tuple[str, ...]
    rates: Tensor
    costs: Tensor
    weights: Tensor
    hashes: list[str]
    labels: Tensor | None
    predicted: Tensor | None
    dense: Tensor | None
    decisions: list[dict[str, Tensor]] = field(repr=False, default_factory=list)

    @property
    def policies(self) -> Counter[bytes]:
        """How many inputs (or tokens) each distinct set of decisions was made for."""
        found: Counter[bytes] = Counter()
        for one in self.decisions:
            if not one:
                found[b""] += 1
                continue
            longest = max(len(values) for values in one.values())
            # of a text of padding alone, gates per token decided nothing
            known = [values if len(values) else torch.zeros(1, dtype=torch.bool) for values in one.values()]
            alike = [values if len(values) == longest else values[:1].expand(longest) for values in known]
            for row in torch.stack(alike, 1).numpy():
                found[row.tobytes()] += 1
        return found


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found; prints as tables.

    Args:
        inputs: How many were run.
        policies: Distinct sets of decisions.
        decided: What these were made for: inputs, or tokens.
        input_information: Mutual information of policy and input in bits: decisions are deterministic, so it is the
            entropy of the policies.
        cost: Mean cost as a fraction of dense.
        sites: One row a gate.
        classes: One row a class; empty without labels.
        groups: One row a value of the group column; empty without one.
        errors: Inputs that dense gets right and gated wrong.
        repaired: Number of inputs that gated gets right and dense wrong.
        noise: Standard deviation of the noise that was tried, as a share of the inputs' own.
        flipped: Share of predictions that this noise on the input changes; None where it was not tried.
        dense_flipped: The same for the dense model.
        notes: What to know before believing the numbers.
    """

    inputs: int
    policies: int
    decided: str
    input_information: float
    cost: float
    sites: tuple[SiteAudit, ...]
    classes: tuple[GroupAudit, ...]
    groups: tuple[GroupAudit, ...]
    errors: tuple[Mistake, ...]
    repaired: int
    noise: float
    flipped: float | None
    dense_flipped: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from surgery.tables import percent, rows_table

        lines = [
            f"{self.policies:,} policies for {self.decided}: {self.input_information:.2f} bits about the input; "
            f"mean cost {percent(self.cost)} of dense",
            f"errors introduced (dense right, gated wrong): {len(self.errors):,}; repaired: {self.repaired:,}",
        ]
        if self.flipped is not None and self.dense_flipped is not None:
            lines.append(
                f"noise of {percent(self.noise, 0)} of the inputs' own spread changes {percent(self.flipped)} of predictions "
                f"(dense: {percent(self.dense_flipped)})"
            )
        parts: list[Any] = [*map(Text, lines), rows_table("Sites (information in bits)", self.sites)]
        for title, rows in (("Classes", self.classes), ("Groups", self.groups)):
            if rows:
                parts.append(rows_table(f"{title} (cost with its 95 % interval)", [_shown(row) for row in rows]))
        if self.errors:
            shown = [{**asdict(one), "index": str(one.index), "input": one.input[:12]} for one in self.errors[:_SHOWN]]
            parts.append(rows_table(f"Errors introduced (first {len(shown)})", shown))
        return Group(*parts, *(Text(f"note: {note}") for note in self.notes))

    def __str__(self) -> str:
        from surgery.tables import render

        return render(self.__rich__())


def _shown(row: GroupAudit) -> Mapping[str, Any]:
    from surgery.tables import percent

    def share(value: float | None) -> str:
        return "" if value is None else percent(value)

    return {
        "group": row.group,
        "inputs": row.inputs,
        "cost": f"{percent(row.cost)} ({percent(row.low)} … {percent(row.high)})",
        "accuracy": share(row.accuracy),
        "dense accuracy": share(row.dense_accuracy),
        "agreement": share(row.agreement),
    }
