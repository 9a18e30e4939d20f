"""`surgery calibrate DIR --data … --out DIR`: thresholds and second looks of a converted model from other inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.scripts import options, outputs
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command, note, show, show_json


@command
def calibrate(
    directory: options.DirectoryArgument,
    data: Annotated[str, typer.Option("--data", help=f"Inputs as the model will get them. {options.DATA_HELP}")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    split: options.Split = "train",
    base: options.Base = None,
    budget: options.OtherBudget = None,
    second_look: Annotated[
        bool,
        typer.Option(
            "--second-look/--no-second-look",
            help="Run uncertain inputs again in full, within the budget, where it pays.",
        ),
    ] = True,
    force: options.Force = False,
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
    """Make the budget of a converted model hold on other inputs: thresholds and second looks anew, nothing is trained."""
    from surgery.adapters import load_data
    from surgery.budgets import set_budget
    from surgery.calling import batches
    from surgery.checkpoints import save
    from surgery.conversion import calibrate_anew
    from surgery.overview import status

    outputs.check_conversion("--out", out, force=force)
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    if budget is not None:
        set_budget(gated, budget)
    read = load_data(
        data, loaded, split=split, batch_size=batch_size, limit=limit, seed=seed, shuffle=True, group_by_length=True
    )
    with progress_bars() as progress:
        calibrate_anew(gated, list(batches(read)), second_look=second_look, progress=progress)
    save(gated, out, overwrite=force, spec=base)
    if as_json:
        show_json({"out": str(out), **status(gated).to_dict()})
    else:
        show(status(gated))
        note(f"written to {out}")
