"""What decisions cost: FLOPs (or seconds) of the sites that they keep, of skip paths where they skip, and of routers.

Axis letters: `N` samples, `S` sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calling import (
    REFUSALS,
    Batch,
    batches,
    call,
    device_of,
    dtype_of,
    kind_of,
    length_of,
    read_output,
    refusal,
)
from surgery.context import Event, Tape, override, state_of, tape
from surgery.errors import SurgeryError
from surgery.progress import Progress, silent
from surgery.state import CostModel


@dataclass(frozen=True, slots=True)
class Decided:
    """What gates did on some inputs.

    Args:
        names: Names of sites, and of heads where they are decided one by one.
        rates: Active share per input and name, `(N, S)`; 1 where a gate made no decision.
        weights: How much each input counts (its real tokens where gates decide per token, else 1), `(N,)`.
        routed: Whether the name's router ran, `(S,)`.
        looked: Which inputs were run a second time in full, bool `(N,)`.
    """

    names: tuple[str, ...]
    rates: Tensor
    weights: Tensor
    routed: Tensor
    looked: Tensor

    @classmethod
    def of(cls, events: Sequence[Event], names: Sequence[str], size: int) -> Decided:
        """What one call of `size` inputs led to."""
        places = {name: index for index, name in enumerate(names)}
        rates, calls = torch.zeros(size, len(names)), torch.zeros(len(names))
        routed = torch.zeros(len(names), dtype=torch.bool)
        for event in events:
            leader = event.gate.planned.leader
            if leader and event.scores is not None:
                routed[places[leader]] = True  # its router ran for this one, whatever it decides itself
            for name, active in event.by_unit().items():
                rates[:, places[name]] += active.cpu()
                calls[places[name]] += 1  # a module that is used several times has one gate
                routed[places[name]] |= event.scores is not None
        rates = torch.where(calls > 0, rates / calls.clamp_min(1), torch.ones(()))
        return cls(tuple(names), rates, weights_of(events, size), routed, looked_at(events, size))

    @classmethod
    def joined(cls, parts: Sequence[Decided]) -> Decided:
        """Those of several calls, one after the other."""
        routed = torch.stack([part.routed for part in parts]).any(0)
        rates, weights, looked = (torch.cat([getattr(p, n) for p in parts]) for n in ("rates", "weights", "looked"))
        return cls(parts[0].names, rates, weights, routed, looked)

    @property
    def again(self) -> float:
        """Share of the weight that was run a second time in full."""
        return self._mean(self.looked)

    @property
    def active_rate(self) -> dict[str, float]:
        """Share of inputs (or tokens) for which each gate ran its branch; second looks count once more."""
        again = self.again
        return {name: rate + again for name, rate in self.first_rate.items()}

    @property
    def first_rate(self) -> dict[str, float]:
        """The same of the first pass alone: the mean of what each gate decided, in [0, 1]."""
        weights = self.weights.double()
        means = (self.rates.double() * weights[:, None]).sum(0) / weights.sum().clamp_min(1e-12)
        return dict(zip(self.names, means.tolist(), strict=True))

    def costs(self, model: CostModel) -> Tensor:
        """Cost of each input as a fraction of dense, float64 `(N,)`; a router counts where it ran, a second look costs 1."""
        sites = [model.sites[name] for name in self.names]
        branch, skip, router = torch.tensor([[s.branch, s.skip, s.router] for s in sites], dtype=torch.float64).T
        constant = model.fixed + float((skip + self.routed * router).sum())
        return (constant + self.rates.double() @ (branch - skip)) / model.dense + self.looked.double()

    def cost(self, model: CostModel) -> float:
        """Mean cost as a fraction of dense."""
        return self._mean(self.costs(model))

    def _mean(self, values: Tensor) -> float:
        weights = self.weights.double()
        return float((values.double() * weights).sum() / weights.sum().clamp_min(1e-12))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a gated model did on some data.

    Args:
        decided: What its gates did.
        outputs: The model's logits or embeddings, one tensor per batch, on the CPU in fp32.
        labels: Labels, one tensor per batch, or None.
    """

    decided: Decided
    outputs: list[Tensor]
    labels: list[Tensor | None]

    @property
    def submodules(self) -> float:
        """Unweighted mean active rate over sites."""
        rates = self.decided.active_rate
        return sum(rates.values()) / len(rates)


def observe(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    progress: Progress = silent,
    stage: str = "running",
    outputs: bool = True,
    inspect: Callable[[list[Event]], None] | None = None,
) -> Usage:
    """Run `gated` over `data` as it is set now and collect decisions and outputs.

    Sites that are not asked (execution `dense`) count as open. `inspect` gets the events of every batch.

    Raises:
        DataError: If the data yields nothing.
    """
    names = state_of(gated).units
    decisions, kept, labels = [], [], []
    total = length_of(data)
    with torch.no_grad():
        for index, batch in enumerate(batches(data)):
            batch = place(batch, gated)
            with tape(gated) as events:
                output = read_output(run(gated, batch))
            if inspect is not None:
                inspect(events)
            decisions.append(Decided.of(events, names, batch.size))
            if outputs:
                kept.append(output.float().cpu())
                labels.append(None if batch.labels is None else batch.labels.cpu())
            progress(stage, index + 1, total)
    return Usage(Decided.joined(decisions), kept, labels)


def run(gated: nn.Module, batch: Batch) -> Any:
    """Call a gated model on the user's data; the first output tells what all are (`GatedState.gives_values`).

    Raises:
        DataError: If the dense model refuses the batch as well; other errors are passed on.
    """
    state = state_of(gated)
    try:
        output = call(gated, batch)
    except (SurgeryError, torch.OutOfMemoryError):
        raise
    except REFUSALS as error:
        dense: dict[str, Any] = {"execution": "dense", "forced": None, "tape": None, "handler": None}
        try:
            with torch.no_grad(), override(state, **dense):
                call(gated, batch)
        except REFUSALS:
            raise refusal(gated, batch, error) from error
        raise
    if state.saw_values is None:
        state.saw_values = kind_of(gated, batch, output) == "values"
    return output


def looked_at(events: Sequence[Event], size: int) -> Tensor:
    """Which samples of one call were run a second time in full, bool `(N,)`."""
    looked = events.looked if isinstance(events, Tape) else []
    return looked[-1].cpu() if looked else torch.zeros(size, dtype=torch.bool)


def weights_of(events: Sequence[Event], size: int) -> Tensor:
    """Real tokens (or positions) per sample where gates decide per token, else 1; `(N,)`."""
    for event in events:
        if event.weights is not None:
            return event.weights.float().sum(1).cpu()
    return torch.full((size,), float(next((e.decisions[0].numel() for e in events if e.gate.per_token), 1)))


def place(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device and in its dtype."""
    return batch.to(device_of(model), dtype_of(model))


def costs_of(events: Sequence[Event], costs: CostModel, size: int) -> Tensor:
    """Cost of each sample of one call as a fraction of dense, float64 `(N,)`."""
    return Decided.of(events, tuple(costs.sites), size).costs(costs)
