"""`surgery benchmark DIR`: wall-clock time of a converted model against the dense one, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from surgery.errors import DataError
from surgery.scripts import options
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command, show, show_json

if TYPE_CHECKING:
    from surgery.timing import Ratio

SAMPLES = 256
"""How many different inputs are timed at most; decisions, and so times, differ between inputs."""


@command
def benchmark(
    directory: options.DirectoryArgument,
    data: Annotated[
        str | None, typer.Option("--data", help=f"Inputs to time on; synthetic ones without it. {options.DATA_HELP}")
    ] = None,
    split: options.Split = "test",
    base: options.Base = None,
    budget: options.OtherBudget = None,
    timed_batch: options.TimedBatches = None,
    group_by_length: Annotated[
        bool,
        typer.Option("--group-by-length", help="Texts of like length share a batch, so that there is little padding."),
    ] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed pairs of calls per batch size.")] = 30,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time a converted model against the dense one: the median of paired calls, of 1 and of 8 samples by default."""
    from surgery.budgets import set_budget
    from surgery.calling import device_of, dtype_of
    from surgery.overview import status
    from surgery.tables import speed_table
    from surgery.timing import compare, conditions

    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    if budget is not None:
        set_budget(gated, budget)
    where = device_of(loaded.model)
    speed: dict[int, Ratio] = {}
    sizes = tuple(timed_batch or (1, 8))
    with progress_bars() as progress:
        for done, size in enumerate(sizes):
            progress("timing", done, len(sizes))
            inputs = inputs_of(loaded, data, split, size, seed, group_by_length=group_by_length)
            speed[size] = compare(
                steps_of(gated, inputs), steps_of(loaded.model, inputs), repeats=repeats, device=where
            )
        progress("timing", len(sizes), len(sizes))
    here = conditions(where, dtype_of(loaded.model))
    cost = status(gated).to_dict().get("cost")
    if as_json:
        show_json(
            {
                "directory": str(directory),
                "speed": {str(size): ratio.to_dict() for size, ratio in speed.items()},
                "conditions": here,
                "cost": cost,
                "real_inputs": bool(data),
            }
        )
    else:
        show(Group(speed_table(speed), Text(_words(here)), *([] if data else [Text(_SYNTHETIC)])))


_SYNTHETIC = "note: synthetic inputs; decisions and so times on yours will differ, pass --data"


def inputs_of(
    loaded: Any, data: str | None, split: str, size: int, seed: int, *, group_by_length: bool = False
) -> list[Any]:
    """Batches of `size` on the model's device."""
    import torch

    from surgery.adapters import load_data
    from surgery.calling import batches, call_dense, device_of, dtype_of

    if data is None:
        source = loaded.adapter.inputs(loaded.model, 4 * size, size, seed)
    else:
        source = load_data(
            data,
            loaded,
            split=split,
            batch_size=size,
            limit=max(SAMPLES, size),
            seed=seed,
            shuffle=True,
            group_by_length=group_by_length,
        )
    where, dtype = device_of(loaded.model), dtype_of(loaded.model)
    whole = [batch for batch in (one.to(where, dtype) for one in batches(source)) if batch.size == size]
    if not whole:
        raise DataError(f"{data} (split {split!r}) has fewer than {size} samples; take a smaller --timed-batch")
    with torch.no_grad():
        call_dense(loaded.model, whole[0])  # refused by name, if at all
    return whole


def steps_of(model: Any, inputs: list[Any]) -> Callable[[], object]:
    """Call the model with the next batch each time, so that gated and dense see the same ones in the same order."""
    from surgery.calling import call

    stream: Iterator[Any] = cycle(inputs)
    return lambda: call(model, next(stream))


def _words(here: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in here.items())
