"""The second look: inputs of which a gated pass is not sure are run again in full.

Skipping costs accuracy on few inputs, and the gated model's own margin tells which (`docs/second_look.md`). So a cheaper
first pass runs on every input, and the share of inputs with the smallest margins is given to the dense model; both
passes count. This is what cascades of two models do (Viola and Jones 2001; Teerapittayanon et al. 2016, BranchyNet,
within one network), with one set of weights.

Axis letters: `N` samples, `K` classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery import context
from surgery.calling import Batch, read_output
from surgery.state import GatedState


def margin_of(output: Tensor) -> Tensor:
    """How sure a classifier is: the largest probability minus the second largest, `(N, K)` logits -> `(N,)`."""
    top = output.float().softmax(-1).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def least_certain(margin: Tensor, weights: Tensor, share: float) -> Tensor:
    """The inputs of smallest margin that together hold `share` of the weight, bool `(N,)`.

    Args:
        margin: `(N,)`.
        weights: How much each input counts, summing to 1, `(N,)`.
        share: In [0, 1].
    """
    order = margin.argsort(stable=True)
    looked = torch.zeros_like(weights, dtype=torch.bool)
    looked[order] = weights[order].cumsum(0) - weights[order] / 2 < share
    return looked


def margin_in_force(state: GatedState) -> float | None:
    """The margin below which a call that runs now looks again, or None: not where decisions, thresholds or gates are set
    by hand.
    """
    over = context.overrides_of(state)
    if over.forced is not None or context.default_execution(state, over) not in ("skip", "mask", "static"):
        return None
    if over.margin is not None:
        return over.margin
    by_hand = (over.handler, over.thresholds, over.static)
    return state.margin if all(one is None for one in by_hand) else None


def look_again(gated: nn.Module, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The output of a first pass, with the rows of uncertain inputs replaced by the dense model's.

    Only logits `(N, K)` are replaced; other parts of a transformers output stay those of the first pass. What is no
    class logits is returned as it is.
    """
    state = context.state_of(gated)
    logits = read_output(output)
    margin = margin_in_force(state)
    if logits.dim() != 2 or logits.shape[1] < 2 or margin is None:
        return output
    unsure = ~(margin_of(logits) >= margin)  # NaN is not sure either
    over = context.overrides_of(state)
    if isinstance(over.tape, context.Tape):
        over.tape.looked.append(unsure)
    rows = unsure.nonzero().squeeze(1)
    if len(rows) == 0:
        return output
    batch = Batch(args, kwargs).rows(rows)
    with context.override(state, execution="dense", tape=None, recorder=None, handler=None):
        again = read_output(gated(*batch.args, **batch.kwargs))
    return _replaced(output, logits, logits.index_copy(0, rows, again.to(logits.dtype)))


def given_to_others(output: Any, dense: Any, looked: Tensor, seed: int) -> tuple[Any, Tensor]:
    """A first pass's output with as many rows replaced by the dense model's as `looked` says, but drawn at random.

    Returns:
        The output, and which rows were replaced, bool `(N,)`.
    """
    order = torch.randperm(len(looked), generator=torch.Generator().manual_seed(seed)).to(looked.device)
    logits, rows = read_output(output), looked[order]
    return _replaced(output, logits, torch.where(rows[:, None], read_output(dense).to(logits.dtype), logits)), rows


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """`output` with the tensor `old` replaced; a new object, since others may hold the first one."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        return type(output)(**{k: new if v is old else v for k, v in output.items()})
    if isinstance(output, (tuple, list)):
        parts = [new if part is old else part for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    result = copy.copy(output)  # a dataclass, or an object of the user's own
    names = [one.name for one in fields(output)] if is_dataclass(output) else list(vars(output))
    for name in names:
        if getattr(output, name, None) is old:
            object.__setattr__(result, name, new)  # frozen ones too
    return result
