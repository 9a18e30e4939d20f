"""`surgery sites MODEL`: what can be skipped in a model, and what cannot and why."""

from __future__ import annotations

from typing import Annotated

import typer

from surgery.scripts import options
from surgery.scripts.bars import waiting
from surgery.scripts.loading import Machine, example_of
from surgery.scripts.running import command, show, show_json


@command
def sites(
    model: options.ModelArgument,
    data: Annotated[
        str | None, typer.Option("--data", help=f"Find sites on its first batch. {options.DATA_HELP}")
    ] = None,
    split: options.Split = "train",
    only: options.SitesOption = None,
    batch_size: options.BatchSize = 2,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List what can be skipped in MODEL: sites, their share of the compute, and what was left alone and why."""
    from surgery import find_sites
    from surgery.conversion import select

    with waiting("loading the model"):
        loaded = Machine(device, dtype, threads, seed, revision).load(model)
    example = example_of(loaded, data, split=split, batch_size=batch_size, seed=seed)
    with waiting("finding sites"):
        found = find_sites(loaded.model, example)
    wanted = options.words(only)
    if wanted:
        found = select(found, wanted)
    if as_json:
        show_json(found.to_dict())
    else:
        show(found)
