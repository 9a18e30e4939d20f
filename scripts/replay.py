"""`surgery replay LOG --from DIR --data …`: run recorded decisions again and compare the outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.scripts import options
from surgery.scripts.bars import waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import ERROR, command, show, show_json


@command
def replay(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="A directory that `surgery record` wrote.")],
    data: Annotated[str, typer.Option("--data", help=f"The data that was recorded. {options.DATA_HELP}")],
    directory: Annotated[
        Path, typer.Option("--from", metavar="DIR", help="The directory that `surgery convert` wrote.")
    ],
    split: options.Split = "test",
    base: options.Base = None,
    opened: Annotated[
        list[str] | None, typer.Option("--open", metavar="SITE", help="What if this site ran; repeatable.")
    ] = None,
    closed: Annotated[
        list[str] | None, typer.Option("--close", metavar="SITE", help="What if it was skipped; repeatable.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Largest difference where bit-equality is not to be expected.")
    ] = 1e-4,
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
    """Run what a log says was decided instead of the routers, and report every row that comes out otherwise.

    Leaves with status 1 if a row differs, unless sites were forced.
    """
    from surgery.adapters import load_data
    from surgery.logs import read_log
    from surgery.replaying import replay as run_again

    recorded = read_log(log)
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    batches = load_data(data, loaded, split=split, batch_size=batch_size, limit=limit, seed=seed)
    with waiting("replaying"):
        found = run_again(
            gated, recorded, batches, opened=tuple(opened or ()), closed=tuple(closed or ()), tolerance=tolerance
        )
    if as_json:
        show_json({"log": str(log), **found.to_dict()})
    else:
        show(found)
    if found.differing and not (opened or closed):
        raise typer.Exit(ERROR)
