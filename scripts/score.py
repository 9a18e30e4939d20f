"""`surgery score DIR --data …`: quality and cost against dense, static and random policies."""

from __future__ import annotations

from typing import Annotated

import typer

from surgery.scripts import options
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command, note, show, show_json


@command
def score(
    directory: options.DirectoryArgument,
    data: options.Data,
    split: options.Split = "test",
    base: options.Base = None,
    budget: options.OtherBudget = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also score static and random policies.")] = True,
    timed_batch: options.TimedBatches = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the result into DIR, for its model card.", rich_help_panel="Output")
    ] = False,
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
    """Score a converted model on labelled data against the dense one and against policies that ignore the input."""
    from surgery.adapters import load_data
    from surgery.budgets import set_budget
    from surgery.checkpoints import keep_report
    from surgery.measurement import measure

    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    if budget is not None:
        set_budget(gated, budget)
    batches = load_data(
        data, loaded, split=split, batch_size=batch_size, limit=limit, seed=seed, shuffle=limit is not None
    )
    with progress_bars() as progress:
        report = measure(
            gated,
            batches,
            dense=loaded.model,
            speed=tuple(timed_batch or ()),
            peers=peers,
            seed=seed,
            progress=progress,
        )
    if batches.labels is None and not report.metric and report.agreement_of == "argmax":
        others = f" among {', '.join(batches.unused)}" if batches.unused else ""
        note(f"no column of labels was recognised{others}, so quality is agreement with the dense model; call it label")
    if keep:
        keep_report(gated, directory)
    if as_json:
        show_json({"directory": str(directory), **report.to_dict()})
    else:
        show(report)
