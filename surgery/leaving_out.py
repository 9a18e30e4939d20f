"""Harm by leaving out: how far the output moves from the dense model's when one branch is skipped for one sample.

One forward pass more for every site (every head where heads are gated), and no gradient: the labels for models through which
no gradient goes, or for which a backward pass does not fit into memory. What a site's absence does to a sample is shared among
its tokens as their parts of the change of the stream.

Axis letters: `N` samples, `T` tokens, `H` heads.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from surgery.calling import Batch, read_output
from surgery.context import handled, state_of
from surgery.costs import run
from surgery.harm import Collector, HarmLabels, Seen
from surgery.objectives import divergence
from surgery.policies import constant, decided
from surgery.sites import CHANNELS_FIRST


def label_by_leaving_out(gated: nn.Module, batch: Batch, sites: Collection[str] | None = None) -> dict[str, HarmLabels]:
    """Label sites of a gated model on one batch, with all other gates open.

    Args:
        gated: A gated model.
        batch: On its device.
        sites: Which ones; all by default. Those that are always on have no harm, and cost nothing.

    Returns:
        By site, as `label_harm`; harm is a divergence (`surgery.objectives.divergence`).
    """
    collector = Collector()
    values, units = state_of(gated).gives_values, state_of(gated).units
    labels = {}
    with torch.no_grad():
        with handled(gated, collector):
            dense = read_output(run(gated, batch))
        for seen in collector.sites:
            name = seen.gate.site.name
            if sites is not None and name not in sites:
                continue
            found = []
            for unit in seen.gate.site.units:
                if seen.gate.always_on:
                    found.append(torch.zeros(batch.size, device=dense.device))
                    continue
                with decided(gated, constant([other for other in units if other != unit])):
                    output = read_output(run(gated, batch))
                found.append(divergence(output, dense, batch, values=values).clamp_min(0.0))
            labels[name] = HarmLabels(seen.features, _shared_out(seen, torch.stack(found, 1)), seen.weights)
    return labels


def _shared_out(seen: Seen, harm: Tensor) -> Tensor:
    """Harm `(N, units)` of a site in the shape of its gate's scores."""
    if seen.difference is None:  # of heads
        return harm
    harm = harm[:, 0]
    if not seen.gate.per_token:
        return harm
    channels = 1 if seen.gate.site.layout in CHANNELS_FIRST else -1
    sizes = seen.difference.float().square().sum(channels)  # N *positions
    if seen.weights is not None:
        sizes = sizes.masked_fill(~seen.weights.bool(), 0.0)
    total = sizes.flatten(1).sum(1).clamp_min(1e-30)
    shape = (-1, *(1,) * (sizes.dim() - 1))
    return harm.view(shape) * sizes / total.view(shape)
