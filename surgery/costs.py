"""What decisions cost: FLOPs (or seconds) of the sites that they keep, of skip paths where they skip, and of routers.

Axis letters: `N` samples, `S` sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calling import REFUSALS, Batch, batches, call, device_of, dtype_of, length_of, read_output, refusal
from surgery.context import Event, Tape, override, state_of, tape
from surgery.errors import SurgeryError
from surgery.progress import Progress, silent
from surgery.state import CostModel


@dataclass(frozen=True, slots=True)
class Usage:
    """What a gated model did on some data.

    Args:
        names: Names of sites, and of heads where they are decided one by one.
        rates: Active share per sample and name, `(N, S)`.
        weights: How much each sample counts (its real tokens where gates decide per token, else 1), `(N,)`.
        outputs: The model's logits or embeddings, one tensor per batch, on the CPU in fp32.
        labels: Labels, one tensor per batch, or None.
        looked: Which samples were run a second time in full, bool `(N,)`.
    """

    names: tuple[str, ...]
    rates: Tensor
    weights: Tensor
    outputs: list[Tensor]
    labels: list[Tensor | None]
    looked: Tensor

    @property
    def active_rate(self) -> dict[str, float]:
        """Share of inputs (or tokens) for which each gate ran its branch; second looks count once more."""
        weights = (self.weights / self.weights.sum())[:, None]
        runs = self.rates + self.looked.to(self.rates)[:, None]
        return dict(zip(self.names, (runs * weights).sum(0).tolist(), strict=True))

    @property
    def submodules(self) -> float:
        """Unweighted mean active rate over sites."""
        rates = self.active_rate
        return sum(rates.values()) / len(rates)

    def costs(self, model: CostModel) -> Tensor:
        """Cost of each sample as a fraction of dense, `(N,)`."""
        branch = torch.tensor([model.sites[n].branch - model.sites[n].skip for n in self.names], dtype=torch.float64)
        constant = model.fixed + sum(model.sites[n].router + model.sites[n].skip for n in self.names)
        return (constant + self.rates.double() @ branch) / model.dense + self.looked.double()


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

    Sites that run no router (execution `dense`) count as open. `inspect` gets the events of every batch.

    Raises:
        DataError: If the data yields nothing.
    """
    names = state_of(gated).units
    rates, weights, kept, labels, looked = [], [], [], [], []
    total = length_of(data)
    with torch.no_grad():
        for index, batch in enumerate(batches(data)):
            batch = place(batch, gated)
            with tape(gated) as events:
                output = read_output(run(gated, batch))
            if inspect is not None:
                inspect(events)
            rates.append(rates_of(events, names, batch.size))
            weights.append(weights_of(events, batch.size))
            looked.append(looked_at(events, batch.size))
            if outputs:
                kept.append(output.float().cpu())
                labels.append(None if batch.labels is None else batch.labels.cpu())
            progress(stage, index + 1, total)
    return Usage(names, torch.cat(rates), torch.cat(weights), kept, labels, torch.cat(looked))


def run(gated: nn.Module, batch: Batch) -> Any:
    """Call a gated model on the user's data.

    Raises:
        DataError: If the dense model refuses the batch as well; other errors are passed on.
    """
    try:
        return call(gated, batch)
    except (SurgeryError, torch.OutOfMemoryError):
        raise
    except REFUSALS as error:
        dense: dict[str, Any] = {"execution": "dense", "forced": None, "tape": None, "handler": None}
        try:
            with torch.no_grad(), override(state_of(gated), **dense):
                call(gated, batch)
        except REFUSALS:
            raise refusal(gated, batch, error) from error
        raise


def rates_of(events: Sequence[Event], names: Sequence[str], size: int) -> Tensor:
    """Active share per sample and site, `(N, S)`; 1 where a gate made no decision."""
    result = torch.ones(size, len(names))
    for event in events:
        for name, active in event.by_unit().items():
            result[:, names.index(name)] = active.cpu()
    return result


def looked_at(events: Sequence[Event], size: int) -> Tensor:
    """Which samples of one call were run a second time in full, bool `(N,)`."""
    looked = events.looked if isinstance(events, Tape) else []
    return looked[-1].cpu() if looked else torch.zeros(size, dtype=torch.bool)


def weights_of(events: Sequence[Event], size: int) -> Tensor:
    """Real tokens per sample where gates decide per token on padded input, else 1; `(N,)`."""
    for event in events:
        if event.weights is not None:
            return event.weights.float().sum(1).cpu()
    return torch.ones(size)


def place(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device and in its dtype."""
    return batch.to(device_of(model), dtype_of(model))


def costs_of(events: Sequence[Event], costs: CostModel, size: int) -> Tensor:
    """Cost of each sample of one call as a fraction of dense, float64 `(N,)`; a router counts where it ran, a second
    look costs 1."""
    total = torch.full((size,), costs.fixed, dtype=torch.float64)
    rates: dict[str, list[Tensor]] = {}
    routed = set()
    for event in events:
        for unit, active in event.by_unit().items():
            rates.setdefault(unit, []).append(active.double().cpu())
            if event.scores is not None:
                routed |= {unit, event.gate.planned.leader}
    for unit, site in costs.sites.items():
        rate = torch.stack(rates[unit]).mean(0) if unit in rates else torch.ones(size, dtype=torch.float64)
        total += rate * site.branch + (1 - rate) * site.skip + (unit in routed) * site.router
    looked = events.looked[-1].double().cpu() if isinstance(events, Tape) and events.looked else 0.0
    return total / costs.dense + looked
