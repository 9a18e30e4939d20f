"""`surgery audit DIR --data …`: what the routing does to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.scripts import options, outputs
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command, show, show_json


@command
def audit(
    directory: options.DirectoryArgument,
    data: options.Data,
    split: options.Split = "test",
    group: Annotated[
        str | None, typer.Option("--group", metavar="COLUMN", help="Column whose values are groups of inputs.")
    ] = None,
    noise: Annotated[
        float, typer.Option("--noise", min=0, help="Noise on the inputs, as a share of their own spread; 0 for none.")
    ] = 0.05,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="PNG to write: groups, or else classes.", rich_help_panel="Output")
    ] = None,
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
    """Audit a converted model: sites, classes, groups, errors that skipping introduced, sensitivity to noise."""
    from surgery.adapters import load_data
    from surgery.auditing import audit as audit_model
    from surgery.budgets import set_budget
    from surgery.scripts.report_figures import drawn
    from surgery.scripts.report_figures import groups as figures_of

    if picture is not None:
        outputs.check_file("--picture", picture)
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    if budget is not None:
        set_budget(gated, budget)
    batches = load_data(
        data, loaded, split=split, batch_size=batch_size, limit=limit, seed=seed, shuffle=limit is not None
    )
    groups = None if group is None else [str(value) for value in batches.column(group)]
    shown = batches.column(batches.columns["text"]) if "text" in batches.columns else ()
    with progress_bars() as progress:
        found = audit_model(
            gated,
            batches,
            dense=loaded.model,
            groups=groups,
            label_names=loaded.label_names,
            shown=shown,
            noise=noise,
            seed=seed,
            progress=progress,
        )
    if picture is not None:
        parts = found.groups or found.classes
        content = drawn(figures_of(parts), 8, 1.6 + 0.4 * len(parts), dark=False, transparent=False)
        outputs.write(picture, content)
    if as_json:
        show_json({"directory": str(directory), **found.to_dict()})
    else:
        show(found)
