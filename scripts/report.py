"""`surgery report DIR --data … --out report.html`: what a converted model skips, for whom, and what that costs, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.scripts import options, outputs
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command, note, show_json


@command
def report(
    directory: options.DirectoryArgument,
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="HTML file; PNGs are written beside it.")] = Path("report.html"),
    split: options.Split = "test",
    log: Annotated[
        Path | None, typer.Option("--log", help="A log that `surgery record` wrote: adds drift over time.")
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="B,B,…", help="Budgets of the curves; those out of reach are left out.")
    ] = "0.4,0.5,0.6,0.7,0.8",
    timed_batch: options.TimedBatch = 8,
    base: options.Base = None,
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
    """Write one HTML page that works offline: curves, heat maps, easiest and hardest inputs, errors, drift."""
    from surgery.adapters import load_data
    from surgery.logs import read_log
    from surgery.scripts.report_content import write
    from surgery.scripts.report_measuring import Subject

    wanted = options.budgets(budgets)
    outputs.check_file("--out", out)
    recorded = None if log is None else read_log(log)
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    rows = load_data(
        data, loaded, split=split, batch_size=batch_size, limit=limit, seed=seed, shuffle=limit is not None
    )
    with progress_bars() as progress:
        pictures = write(
            out,
            Subject(gated, loaded.model, rows, loaded, directory.name, data),
            wanted,
            timed_batch,
            recorded,
            seed,
            progress,
        )
    if as_json:
        show_json({"report": str(out), "pictures": [str(path) for path in pictures]})
    else:
        note(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB) and {len(pictures)} pictures beside it")
