"""`Report`: what a measurement found, as a value that prints as a table and turns into JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.phases import Phase
from surgery.timing import Ratio

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn


@dataclass(frozen=True, slots=True)
class Other:
    """Another network that answers the same inputs, such as a pruned one.

    Args:
        name: What it is called in the report; none of the peers' own names.
        model: Called like the dense model.
        cost: Its mean cost as a fraction of the dense model's.
    """

    name: str
    model: nn.Module
    cost: float


@dataclass(frozen=True, slots=True)
class Peer:
    """Another policy at the same cost, with the same skip paths, or another network.

    Args:
        name: As in `measure`, or another network's.
        cost: Its mean cost as a fraction of dense.
        metric: Its metric, or its agreement with dense where there is no metric.
        difference: The gated model's minus its.
        low: Lower end of the paired bootstrap's 95 % interval of the difference.
        high: Upper end of the same.
        speed: Time by the dense model's, for each batch size, where peers were timed.
    """

    name: str
    cost: float
    metric: float
    difference: float
    low: float
    high: float
    speed: Mapping[int, Ratio] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {**asdict(self), "speed": {str(size): ratio.to_dict() for size, ratio in self.speed.items()}}


@dataclass(frozen=True, slots=True)
class Report:
    """Quality, cost and speed of a gated model against dense and against other policies at the same cost.

    Args:
        data: What it was measured on: `872 labelled inputs`.
        samples: Number of inputs.
        metric: The gated model's, by name; empty where nothing tells right from wrong.
        dense_metric: The dense model's.
        agreement: With the dense model: share of equal predictions, or mean cosine of embeddings.
        agreement_of: `argmax` or `cosine`.
        cost: Realised mean cost as a fraction of dense, routers and skip paths included.
        cost_unit: flops or seconds.
        budget: What was asked for.
        submodules: Unweighted mean active rate over sites.
        active_rate: Share of inputs (or tokens) for which each gate ran its branch.
        entropy: Of each gate's mean decision, in bits: the most that its decisions can tell about the input.
        policies: Number of distinct sets of decisions.
        deciding: What these were made for, and how many there were: `872 inputs`, `14,203 tokens`.
        speed: Time by the dense model's, for each batch size.
        conditions: Device, dtype, threads, processor, torch.
        peers: Other policies at the same cost.
        absent: Peers that do not apply to this model, and why.
        notes: What to know before believing the numbers.
        phases: What one token costs a causal language model that reads (prefill) and writes (decode).
        healed: `norms` or `lora` where the backbone is healed; the peer `unhealed` is the model without that.
    """

    data: str
    samples: int
    metric: Mapping[str, float]
    dense_metric: Mapping[str, float]
    agreement: float
    agreement_of: str
    cost: float
    cost_unit: str
    budget: float | None
    submodules: float
    active_rate: Mapping[str, float]
    entropy: Mapping[str, float]
    policies: int
    deciding: str
    speed: Mapping[int, Ratio] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    healed: str = ""

    @property
    def compared(self) -> str:
        """What policies are compared by: the first metric; without labels the agreement with dense, as the share of equal
        predictions (`agreement`) or as the mean `cosine` of values.
        """
        agreement = "agreement" if self.agreement_of == "argmax" else self.agreement_of
        return next(iter(self.metric), agreement)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {
            **asdict(self),
            "speed": {str(size): ratio.to_dict() for size, ratio in self.speed.items()},
            "peers": [peer.to_dict() for peer in self.peers],
            "absent": dict(self.absent),
            "notes": list(self.notes),
            "phases": [phase.to_dict() for phase in self.phases],
        }

    def peer(self, name: str) -> Peer:
        """The row of that name.

        Raises:
            KeyError: If it was not measured.
        """
        for peer in self.peers:
            if peer.name == name:
                return peer
        raise KeyError(f"no peer {name!r}; measured: {', '.join(peer.name for peer in self.peers) or 'none'}")

    def __rich__(self) -> RenderableType:
        from surgery.tables import report_table

        return report_table(self)

    def __str__(self) -> str:
        from surgery.tables import render

        return render(self.__rich__())
