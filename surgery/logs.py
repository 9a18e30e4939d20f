"""`read_log`: the rows of a log that `record` wrote, also while it grows and after a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import LogError
from surgery.log_format import FORMAT_VERSION, SUFFIX, arrow


@dataclass(frozen=True, slots=True)
class Decision:
    """What one gate decided for one input.

    Args:
        site: Name of the site.
        values: bool, of the shape of one input's decisions: `()`, or its positions.
        scores: The router's, alike; None where no router ran or none were kept.
        real: Which of them are of real tokens, not padding; None where all are.
    """

    site: str
    values: Tensor
    scores: Tensor | None
    real: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One input of one call.

    Args:
        part: Number of the file, one per process.
        call: Number of the call in that file.
        row: Place in the batch.
        size: Inputs in the batch.
        time: When the call began.
        input: Hash of the content, or the name that was given.
        budget: What was set; None before calibration or where a threshold was overridden.
        threshold: Scores above it kept a branch.
        execution: How the call ran.
        latency_ms: Of the whole call.
        cost: Of this input, as a fraction of dense.
        prediction: Largest logit, where the output has one.
        passes: Decisions of each pass, in order of execution; a second look makes none.
        looked: Whether a second look, in full, gave the answer.
        output_hash: Of the output's bytes.
        output: The output flattened, float32; None where it was too large to keep.
    """

    part: int
    call: int
    row: int
    size: int
    time: datetime
    input: str
    budget: float | None
    threshold: float
    execution: str
    latency_ms: float
    cost: float
    prediction: int | None
    passes: tuple[tuple[Decision, ...], ...]
    looked: bool
    output_hash: bytes
    output: Tensor | None

    def rates(self) -> dict[str, float]:
        """Share of this input's decisions that were open, per site; padding does not count, and a second look opens all. Of
        padding alone nothing was open.
        """
        found: dict[str, list[float]] = {}
        for one in self.passes:
            for decision in one:
                values = decision.values if decision.real is None else decision.values[decision.real]
                found.setdefault(decision.site, []).append(
                    1.0 if self.looked else float(values.sum()) / max(values.numel(), 1)
                )
        return {site: sum(values) / len(values) for site, values in found.items()}


class Log:
    """A log on disk; every iteration reads what is there by then.

    Args:
        path: The directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.parts():
            raise LogError(f"{path} holds no part of a log (*{SUFFIX}); expected a directory that surgery.record wrote")

    def parts(self) -> list[Path]:
        """Its files, one per process, oldest first."""
        return sorted(self.path.glob(f"*{SUFFIX}"), key=lambda file: (int(file.name.partition("-")[0]), file.name))

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """What is the same for all rows of a part, for every part that has begun."""
        return [found for _, found, _ in self._opened()]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites.

        Raises:
            LogError: If the parts are of different models.
        """
        found = {tuple(one["sites"]) for one in self.metadata}
        if len(found) != 1:
            raise LogError(
                f"{self.path}: its parts are of {len(found)} models with different sites; keep one log a model"
            )
        return found.pop()

    def table(self) -> Any:
        """Everything as one `pyarrow.Table`, decisions packed."""
        pa = arrow()
        batches = [batch for _, _, stream in self._opened() for batch in stream]
        if not batches:
            raise LogError(f"{self.path} holds no row yet")
        return pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in batches])

    def __iter__(self) -> Iterator[Row]:
        for part, metadata, stream in self._opened():
            for batch in stream:
                for values in batch.to_pylist():
                    yield _row(part, values, metadata)

    def calls(self) -> Iterator[list[Row]]:
        """The rows of every call, in order."""
        rows: list[Row] = []
        for row in self:
            if rows and (row.part, row.call) != (rows[0].part, rows[0].call):
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows

    def _opened(self) -> Iterator[tuple[int, dict[str, Any], Iterator[Any]]]:
        pa = arrow()
        for part, file in enumerate(self.parts()):
            with file.open("rb") as source:
                try:
                    stream = pa.ipc.open_stream(source)
                except pa.ArrowInvalid:
                    continue  # a process that has only begun to write
                yield part, _metadata(file, stream.schema), _whole(pa, stream)


def read_log(path: str | Path) -> Log:
    """Open a log.

    Args:
        path: Its directory.

    Returns:
        The rows that are there by then, whenever it is iterated.

    Raises:
        LogError: If there is none, or it is of a newer format.
        MissingDependency: If pyarrow is not installed.
    """
    arrow()
    return Log(path)


def _whole(pa: Any, stream: Any) -> Iterator[Any]:
    """Groups up to the first that is not written to its end: the log grows, or its process died."""
    while True:
        try:
            yield stream.read_next_batch()
        except (StopIteration, pa.ArrowInvalid, OSError):
            return


def _metadata(file: Path, schema: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(schema.metadata[b"surgery"])
    except (KeyError, TypeError, ValueError) as error:
        raise LogError(f"{file} is no log of this package; move it out of the directory") from error
    if found["format_version"] > FORMAT_VERSION:
        raise LogError(
            f"{file} has format version {found['format_version']}, this version of bypass-surgery reads up to "
            f"{FORMAT_VERSION}: pip install -U bypass-surgery"
        )
    return found


def _row(part: int, values: Mapping[str, Any], metadata: Mapping[str, Any]) -> Row:
    passes = tuple(
        _decisions(sites, shapes, bits, scores, real, metadata)
        for sites, shapes, bits, scores, real in zip(
            values["sites"],
            values["shapes"],
            values["decisions"],
            values["scores"],
            values.get("real") or [b""] * len(values["sites"]),  # older logs have none
            strict=True,
        )
    )
    same = (
        "call",
        "row",
        "size",
        "time",
        "input",
        "budget",
        "threshold",
        "execution",
        "latency_ms",
        "cost",
        "prediction",
    )
    return Row(
        part=part,
        passes=passes,
        looked=bool(values.get("looked")),  # older logs do not say: there every gate is open for such an input
        output_hash=values["output_hash"],
        output=None if values["output"] is None else torch.tensor(values["output"], dtype=torch.float32),
        **{name: values[name] for name in same},
    )


def _decisions(
    sites: list[int], shapes: list[list[int]], bits: bytes, scores: bytes, real: bytes, metadata: Mapping[str, Any]
) -> tuple[Decision, ...]:
    import numpy

    counts = [int(torch.Size(shape).numel()) for shape in shapes]

    def unpacked(packed: bytes) -> Tensor:
        return torch.from_numpy(numpy.unpackbits(numpy.frombuffer(packed, numpy.uint8), count=sum(counts))).bool()

    flat, tokens = unpacked(bits), unpacked(real) if real else None
    kept = None
    if scores:
        kept = torch.from_numpy(numpy.frombuffer(scores, metadata["scores"]).astype(numpy.float32))
    result, start = [], 0
    for site, shape, count in zip(sites, shapes, counts, strict=True):
        own = None if kept is None else kept[start : start + count].view(shape)
        if own is not None and count and bool(own.isnan().all()):
            own = None
        here = None if tokens is None else tokens[start : start + count].view(shape)
        result.append(Decision(metadata["sites"][site], flat[start : start + count].view(shape), own, here))
        start += count
    return tuple(result)
