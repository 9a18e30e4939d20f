"""`surgery record DIR --data … --out LOG`: run a converted model and write down what it decides for every input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.errors import LogError
from surgery.scripts import options, outputs
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command, command_line, note, show_json


@command
def record(
    directory: options.DirectoryArgument,
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="Directory of the log; an older log there grows.")],
    split: options.Split = "test",
    base: options.Base = None,
    budget: options.OtherBudget = None,
    batch_size: options.BatchSize = 32,
    limit: options.Limit = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run a converted model on data and log every decision: what `replay`, `audit` and `report` read."""
    import torch

    from surgery.adapters import load_data
    from surgery.budgets import set_budget
    from surgery.calling import batches
    from surgery.costs import place, run
    from surgery.log_format import check_place
    from surgery.recording import record as recording

    check_place(out.expanduser())
    outputs.check_writable("--out", out, LogError)
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    if budget is not None:
        set_budget(gated, budget)
    rows = load_data(data, loaded, split=split, batch_size=batch_size, limit=limit, seed=seed)
    with progress_bars() as progress, torch.no_grad(), recording(gated, out) as log:
        for index, batch in enumerate(batches(rows)):
            run(gated, place(batch, gated))
            progress("recording", index + 1, len(rows))
    found = {"log": str(out), "calls": log.calls, "rows": rows.samples}
    if as_json:
        show_json(found)
    else:
        note(f"{rows.samples:,} inputs in {log.calls:,} calls were added to {out}")
        given = {
            "from": directory,
            "data": data,
            "split": split,
            "model": base,
            "batch-size": batch_size,
            "limit": limit,
        }
        given |= {"revision": revision, "device": None if device == "auto" else device, "threads": threads}
        given |= {"dtype": None if dtype is options.Dtype.auto else dtype.value, "seed": seed or None}
        note(f"next: {command_line('replay', out, options=given)}")
