"""What a log is on disk: a directory of Arrow streams, their columns, and what is the same for all rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.calling import device_of
from surgery.configs import versions
from surgery.context import state_of
from surgery.errors import LogError, MissingDependency, shortened
from surgery.fingerprints import fingerprint
from surgery.gates import iter_gates
from surgery.log_rows import bytes_of

FORMAT_VERSION = 1
SUFFIX = ".arrow"


def arrow() -> Any:
    """pyarrow, imported late.

    Raises:
        MissingDependency: If it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependency('a log needs pyarrow: pip install "bypass-surgery[data]"') from error
    return pyarrow


def schema_of(metadata: Mapping[str, Any]) -> Any:
    """Columns of a log, and what is the same for all of its rows."""
    pa = arrow()
    fields = [
        ("time", pa.timestamp("us", tz="UTC")),
        ("call", pa.int64()),
        ("row", pa.int32()),
        ("size", pa.int32()),
        ("input", pa.string()),
        ("budget", pa.float64()),
        ("threshold", pa.float64()),
        ("execution", pa.string()),
        ("latency_ms", pa.float32()),
        ("cost", pa.float32()),
        ("prediction", pa.int32()),
        ("sites", pa.list_(pa.list_(pa.int16()))),  # of every pass
        ("shapes", pa.list_(pa.list_(pa.list_(pa.int32())))),
        ("decisions", pa.list_(pa.binary())),
        ("scores", pa.list_(pa.binary())),
        ("real", pa.list_(pa.binary())),  # where decisions are of real tokens, not padding; empty: everywhere
        ("looked", pa.bool_()),  # whether the answer is that of a second look
        ("output_hash", pa.binary(8)),
        ("output", pa.list_(pa.float32())),
    ]
    return pa.schema(fields, metadata={"surgery": json.dumps(metadata)})


def check_place(path: Path) -> None:
    """Refuse a directory that belongs to something else, such as a converted model that is replaced one day.

    Raises:
        LogError: If it holds anything else than parts of a log; hidden files do not count.
    """
    others = sorted(one.name for one in path.iterdir() if not one.name.startswith(".")) if path.is_dir() else []
    others = [name for name in others if not name.endswith(SUFFIX)]
    if others:
        raise LogError(f"{path} holds {shortened(others, 3)}, so it is no log's; give a directory of its own")


def describe(gated: nn.Module, scores: str) -> dict[str, Any]:
    """What is the same for all rows: model, weights, gates, versions and the conditions of the run."""
    state = state_of(gated)
    digest = hashlib.sha256()
    for name, gate in iter_gates(gated):
        for key, tensor in sorted(gate.state_dict().items()):
            digest.update(f"{name}.{key}".encode() + bytes_of(tensor))
    plan = json.dumps(state.plan.to_dict(), sort_keys=True).encode()
    dtype = next((p.dtype for p in gated.parameters() if p.is_floating_point()), None)
    return {
        "format_version": FORMAT_VERSION,
        "model": f"{type(gated).__module__}.{type(gated).__qualname__}",
        "base": {key: value for key, value in state.base.items() if isinstance(value, (str, type(None)))},
        "base_sha256": fingerprint(gated),
        "gates_sha256": digest.hexdigest(),
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "sites": list(state.names),
        "granularity": [planned.granularity for planned in state.plan.sites],
        "scores": scores,
        "costs": asdict(state.costs),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_of(gated).type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "process": os.getpid(),
    }
