"""Policies to compare with: the same gates and skip paths, decided by something else than the routers.

Axis letters: `N` samples, `T` tokens, `S` sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import context
from surgery.branches import Branch, added
from surgery.context import Event, Tape, handled
from surgery.gates import Gate
from surgery.head_gates import HeadGate
from surgery.sites import CHANNELS_FIRST
from surgery.state import CostModel

Choose = Callable[[Gate, Tensor], Tensor]
"""`choose(gate, residual)` gives bool decisions, `(N,)` or `(N, *positions)`."""


@contextmanager
def decided(gated: nn.Module, choose: Choose) -> Iterator[Tape]:
    """Let `choose` decide every gate inside the block; yields what the gates do, in order."""
    events = Tape()

    def handler(gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        decisions = choose(gate, residual)
        padding = gate.padding(residual) if gate.per_token else None
        events.append(Event(gate.site.name, gate, decisions, None, padding))
        return gate.skip(branch, left, residual, inputs, decisions)

    with handled(gated, handler, healed=True):
        yield events


def constant(kept: Sequence[str]) -> Choose:
    """The sites in `kept` are open for everything, the others closed."""
    names = frozenset(kept)

    def choose(gate: Gate, residual: Tensor) -> Tensor:
        kept = torch.tensor([unit in names for unit in gate.site.units], device=residual.device)
        return kept.expand(gate.shape_of(residual))

    return choose


def random(rates: Mapping[str, float], seed: int, start: int) -> Choose:
    """Every site is open at its rate, drawn per input or token; `start` is the running number of the first input."""

    def choose(gate: Gate, residual: Tensor) -> Tensor:
        shape = gate.shape_of(residual)
        samples = torch.arange(start, start + shape[0])
        units = gate.site.units
        if len(units) > 1:
            drawn = [context.draw(rates[unit], seed, unit, samples, None) for unit in units]
            return torch.stack(drawn, 1).to(residual.device)
        first = gate.first_tokens(residual)
        count = shape[1:].numel()
        positions = torch.arange(count).expand(shape[0], count) if len(shape) > 1 else None
        drawn_once = context.draw(rates[gate.site.name], seed, gate.site.name, samples, positions).view(shape)
        decisions = drawn_once.to(residual.device)
        return decisions if first is None else decisions | first

    return choose


def shuffled(events: Sequence[Event], seed: int) -> Choose:
    """Decisions that were made before, given to other inputs of the batch (or to other real tokens).

    All sites are permuted alike, so that policies stay whole: only the link to the input is cut.
    """
    left: dict[str, list[Event]] = {}
    for event in events:
        left.setdefault(event.site, []).append(event)

    def choose(gate: Gate, residual: Tensor) -> Tensor:
        event = left[gate.site.name].pop(0)
        if len(gate.site.units) > 1:
            order = torch.randperm(len(event.decisions), generator=torch.Generator().manual_seed(seed))
            return event.decisions[order.to(event.decisions.device)]
        flat = event.decisions.flatten().clone()
        real = torch.arange(len(flat), device=flat.device)
        if event.weights is not None:
            real = real[event.weights.flatten().bool()]
        first = gate.first_tokens(residual)
        if first is not None:
            real = real[~first.flatten()[real]]
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed)).to(flat.device)
        flat[real] = flat[real[order]]
        return flat.view(event.decisions.shape)

    return choose


@dataclass(slots=True)
class Importance:
    """Gate handler that leaves all gates open and notes how far each branch turns the residual stream.

    The score is `1 - cosine(stream before, stream after)` (block influence, Men et al. 2024, ShortGPT), mean over
    inputs and positions; heads share their branch's score by the energy of what they contribute to its output.
    """

    total: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Execute one gate."""
        shares: list[Tensor] = []
        if isinstance(gate, HeadGate):
            output = gate.weighed(branch, inputs, len(residual), lambda x: _noted(x, gate, shares))
            value, *escaped = added(branch, left, output[0]), *output[1]
            result: Any = (value, *escaped) if branch.escapes else value
        else:
            result = gate.open(branch, left, inputs)
            value = result[0] if branch.escapes else result
        change = value if left is None else value - left
        axis = 1 if gate.site.layout in CHANNELS_FIRST else -1
        scores = 1 - F.cosine_similarity(residual.float(), (residual + change).float(), dim=axis)
        padding = gate.padding(residual)
        scores = scores if padding is None or padding.shape != scores.shape else scores[padding]
        total = float(scores.double().sum())
        for name, share in zip(gate.site.units, shares[0].tolist() if shares else [1.0], strict=True):
            self.total[name] = self.total.get(name, 0.0) + total * share
            self.count[name] = self.count.get(name, 0) + scores.numel()
        return result

    @property
    def scores(self) -> dict[str, float]:
        """Mean score per site."""
        return {name: total / max(self.count[name], 1) for name, total in self.total.items()}


def _noted(x: Tensor, gate: HeadGate, shares: list[Tensor]) -> Tensor:
    """Append every head's share of the energy after the output projection, `(H,)`; `x` `(N, R, H, D)` passes unchanged."""
    blocks = gate.output_weight.split(x.shape[3], 1)  # C D each
    energy = torch.stack([F.linear(x[:, :, head], block).double().square().sum() for head, block in enumerate(blocks)])
    shares.append(energy / energy.sum().clamp_min(1e-30))
    return x


@dataclass(frozen=True, slots=True)
class Cut:
    """Two static policies whose costs lie around the wanted one, and how far it is from the first to the second."""

    lower: tuple[str, ...]
    upper: tuple[str, ...]
    share: float


def cut(costs: CostModel, ranks: Mapping[str, float], cost: float) -> Cut:
    """Open sites from the highest rank down until `cost` (a fraction of dense) is reached; no router runs."""
    order = sorted(costs.sites, key=lambda name: -ranks.get(name, 1.0))
    kept = [tuple(order[:count]) for count in range(len(order) + 1)]
    prices = [static_cost(costs, names) for names in kept]
    above = next((index for index, price in enumerate(prices) if price >= cost), len(prices) - 1)
    if above == 0 or prices[above] <= cost:
        return Cut(kept[above], kept[above], 0.0)
    low, high = prices[above - 1], prices[above]
    return Cut(kept[above - 1], kept[above], (cost - low) / (high - low))


def static_cost(costs: CostModel, kept: Sequence[str]) -> float:
    """Cost of running the sites in `kept` and the skip paths of the others, without routers."""
    return costs.cost({name: float(name in kept) for name in costs.sites}, routed=())
