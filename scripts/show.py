"""`surgery show MODEL_OR_DIR NAME`: the forward that is generated for one module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.scripts import options
from surgery.scripts.bars import waiting
from surgery.scripts.loading import Machine, example_of, is_converted
from surgery.scripts.running import command, command_line, note, show_code, show_json


@command
def show(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_DIR", help=f"{options.MODEL_HELP} Or a converted directory.")
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A site or the module that contains it, '' for the model; names are listed without it."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help=options.DATA_HELP)] = None,
    split: options.Split = "train",
    base: options.Base = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the code that runs instead of the original forward, with its gates; without NAME, the names of the sites."""
    import surgery
    from surgery.context import state_of

    machine = Machine(device, dtype, revision=revision)
    with waiting("loading the model"):
        if is_converted(model):
            gated, _ = machine.load_converted(Path(model), base)
        else:
            loaded = machine.load(model)
            example = example_of(loaded, data, split=split, batch_size=2, seed=0)
            gated = surgery.insert_gates(loaded.model, surgery.find_sites(loaded.model, example))
    if name is None:
        names = state_of(gated).names
        if as_json:
            show_json({"sites": list(names)})
        else:
            typer.echo("\n".join(names))
            given = {"data": data, "split": None if data is None else split, "model": base, "revision": revision}
            note(f"next: {command_line('show', model, names[0], options=given)}")
        return
    code = surgery.show(gated, name)
    if as_json:
        show_json({"name": name, "code": code})
    else:
        show_code(code)
