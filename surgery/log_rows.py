"""One recorded call as rows of a log: hashes, packed decisions, scores, costs.

Axis letters: `N` samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.calling import Batch
from surgery.context import Event, Tape
from surgery.costs import costs_of, looked_at
from surgery.state import GatedState

PASSES = ("sites", "shapes", "decisions", "scores", "real")
"""Columns that hold one value for every pass of a call: none where no gate was asked."""
_MOST_OUTPUTS = 4096  # values of one input's output that are kept whole; of larger ones only the hash


@dataclass(frozen=True, slots=True)
class Call:
    """What the calling thread hands to the writer."""

    number: int
    started: float
    milliseconds: float
    batch: Batch
    ids: tuple[str, ...] | None
    events: Tape
    output: Tensor
    budget: float | None
    threshold: float
    execution: str


def rows_of(call: Call, size: int, state: GatedState, scores: str) -> dict[str, list[Any]]:
    """The columns of one call."""
    names = state.names
    ids = list(call.ids) if call.ids is not None else input_hashes(call.batch)
    outputs = call.output.cpu()
    parts = list(outputs) if outputs.shape[:1] == (size,) else [outputs] * size
    keep = outputs.shape[:1] == (size,) and parts[0].numel() <= _MOST_OUTPUTS
    predicted = parts[0].dim() == 1 and parts[0].numel() > 1
    same = {
        "time": int(1e6 * call.started),
        "call": call.number,
        "size": size,
        "budget": call.budget,
        "threshold": call.threshold,
        "execution": call.execution,
        "latency_ms": call.milliseconds,
    }
    events = call.events
    passes: dict[str, list[Any]] = {}
    if events:
        padded = any(event.weights is not None for event in events)
        passes = {
            "sites": [[names.index(event.site) for event in events]] * size,
            "shapes": [[list(event.decisions.shape[1:]) for event in events]] * size,
            "decisions": _packed([event.decisions for event in events]),
            "scores": [b""] * size if scores == "none" else _scores(events, scores),
            "real": _packed([_real(event) for event in events]) if padded else [b""] * size,
        }
    return {
        **{name: [value] * size for name, value in same.items()},
        "row": list(range(size)),
        "input": ids,
        "cost": costs_of(events, state.costs, size).tolist(),
        "looked": looked_at(events, size).tolist(),
        "prediction": [int(one.argmax()) if predicted else None for one in parts],
        **{name: [[value] for value in passes[name]] if passes else [[]] * size for name in PASSES},
        "output_hash": [output_hash(one) for one in parts],
        "output": [one.float().flatten().tolist() if keep else None for one in parts],
    }


def input_hashes(batch: Batch) -> list[str]:
    """128-bit hash of every sample's content, in hexadecimal; padding does not count.

    Raises:
        DataError: If the batch holds no tensor.
    """
    size = batch.size
    values = Batch((*batch.args, *(batch.kwargs[k] for k in sorted(batch.kwargs)))).tensors
    mask = batch.kwargs.get("attention_mask")
    real = mask.bool().cpu() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    tensors = [
        v.detach().cpu() for v in values if v.dim() > 0 and len(v) == size and not (real is not None and v is mask)
    ]
    found = []
    for row in range(size):
        digest = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            value = tensor[row]
            if real is not None and tensor.shape[:2] == real.shape:
                value = value[real[row]]
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(bytes_of(value))
        found.append(digest.hexdigest())
    return found


def output_hash(output: Tensor) -> bytes:
    """64-bit hash of the bytes of one sample's output."""
    return hashlib.blake2b(bytes_of(output), digest_size=8).digest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes, on the CPU, whatever its dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def _packed(decisions: Sequence[Tensor]) -> list[bytes]:
    """Of every row the decisions of all events, one after the other, eight to a byte."""
    import numpy

    rows = torch.cat([one.reshape(len(one), -1) for one in decisions], 1).cpu().numpy()
    return [row.tobytes() for row in numpy.packbits(rows, axis=1)]


def _real(event: Event) -> Tensor:
    """Which decisions of an event are of real tokens."""
    if event.weights is None or event.weights.shape != event.decisions.shape:
        return torch.ones_like(event.decisions)
    return event.weights.bool()


def _scores(events: Sequence[Event], dtype: str) -> list[bytes]:
    """Of every row the scores of all events, NaN where no router ran."""
    rows = torch.cat([_filled(event).reshape(len(event.decisions), -1) for event in events], 1).cpu()
    return [row.tobytes() for row in rows.to(getattr(torch, dtype)).numpy()]


def _filled(event: Event) -> Tensor:
    if event.scores is not None:
        return event.scores.detach().float()
    return torch.full(event.decisions.shape, torch.nan, device=event.decisions.device)
