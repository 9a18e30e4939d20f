"""Wall-clock ratios: two things timed side by side in one process, since absolute times drift with the machine's
load.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")
Thunk = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How long `a` takes as a multiple of `b`.

    Args:
        median: Median over the pairs of `a`'s time by `b`'s; below 1 means that `a` is faster.
        q1: Lower quartile of the same.
        q3: Upper quartile of the same.
        a_ms: Median time of `a` in milliseconds.
        b_ms: Median time of `b` in milliseconds.
        repeats: Number of pairs.
        total: All of `a`'s time by all of `b`'s: what counts where calls differ from one another.
    """

    median: float
    q1: float
    q3: float
    a_ms: float
    b_ms: float
    repeats: int
    total: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return asdict(self)

    def mixed(self, other: Ratio, share: float) -> Ratio:
        """`1 - share` of this and `share` of `other`, number by number: of two things, one of which is drawn each time."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in asdict(self) if name != "repeats"}
        return Ratio(**{name: a + share * (b - a) for name, (a, b) in pairs.items()}, repeats=self.repeats)


def compare(
    a: Thunk, b: Thunk, *, repeats: int = 30, warmup: int = 5, device: torch.device | str | None = None
) -> Ratio:
    """Time `a` and `b` in pairs, in alternating order, without gradients.

    Each is called `warmup + repeats` times, so thunks that step through inputs stay in step with each other.

    Args:
        a: What is judged.
        b: What it is judged against.
        repeats: Number of timed pairs.
        warmup: Number of pairs before them.
        device: Where the work happens; asynchronous ones are waited for. None means the CPU.

    Raises:
        ValueError: If `repeats` is below 1 or `warmup` negative.
    """
    return compare_all({"a": a}, b, repeats=repeats, warmup=warmup, device=device)["a"]


def compare_all(
    thunks: Mapping[Name, Thunk],
    base: Thunk,
    *,
    repeats: int = 30,
    warmup: int = 5,
    device: torch.device | str | None = None,
) -> dict[Name, Ratio]:
    """Time several thunks in turns with one that each is judged against, in changing order, without gradients.

    Args:
        thunks: What is judged, by name.
        base: What all are judged against.
        repeats: Number of timed rounds.
        warmup: Number of rounds before them.
        device: As in `compare`.

    Raises:
        ValueError: If `repeats` is below 1 or `warmup` negative.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    wait = _waiting(torch.device("cpu" if device is None else device))
    row = [*thunks.values(), base]
    times: list[list[float]] = [[] for _ in row]
    collecting = gc.isenabled()
    with torch.no_grad():
        try:
            gc.disable()  # a collection would fall on whichever call happens to trigger it
            for index in range(warmup + repeats):
                for place in (*range(index % len(row), len(row)), *range(index % len(row))):
                    seconds = _seconds(row[place], wait)
                    if index >= warmup:
                        times[place].append(seconds)
        finally:
            if collecting:
                gc.enable()
    return {name: _summary(own, times[-1]) for name, own in zip(thunks, times[:-1], strict=True)}


def conditions(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a time depends on: device, dtype, threads, processor and torch's version."""
    where = torch.device("cpu" if device is None else device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else _processor()
    return {
        "device": where.type,
        "processor": name,
        "dtype": str(dtype or torch.get_default_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _summary(times_a: list[float], times_b: list[float]) -> Ratio:
    ratios = [first / second for first, second in zip(times_a, times_b, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(
        median=median,
        q1=q1,
        q3=q3,
        a_ms=1e3 * statistics.median(times_a),
        b_ms=1e3 * statistics.median(times_b),
        repeats=len(ratios),
        total=sum(times_a) / sum(times_b),
    )


def _seconds(thunk: Thunk, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    thunk()
    wait()
    return max(time.perf_counter() - start, 1e-9)  # clocks tick, ratios must stay finite


def _waiting(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
