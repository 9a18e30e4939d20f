"""`surgery heal DIR --kind lora --data … --out DIR`: a small adaptation of the backbone of a converted model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.scripts import options, outputs
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.convert import Heal, read_data
from surgery.scripts.loading import Machine
from surgery.scripts.memory import keep_freed_memory
from surgery.scripts.running import command, note, show, show_json


@command
def heal(
    directory: options.DirectoryArgument,
    kind: Annotated[Heal, typer.Option("--kind", help="Copies of its norms, or low-rank changes of linear maps.")],
    data: Annotated[str, typer.Option("--data", help=f"Data to heal and calibrate on. {options.DATA_HELP}")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    split: options.Split = "train",
    validation: options.Validation = None,
    validation_split: options.ValidationSplit = "validation",
    augment: options.Augment = False,
    base: options.Base = None,
    budget: options.OtherBudget = None,
    epochs: options.Epochs = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps, in place of epochs.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Of the changes.")] = None,
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
    """Adapt the backbone of a converted model a little, as copies beside it, and calibrate it anew."""
    from surgery.budgets import set_budget
    from surgery.checkpoints import save
    from surgery.conversion import heal_converted
    from surgery.options import Options
    from surgery.overview import status

    default = Options()
    training = Options(
        epochs=default.epochs if epochs is None else epochs,
        steps=steps,
        heal_rate=default.heal_rate if learning_rate is None else learning_rate,
    )
    outputs.check_conversion("--out", out, force=force)
    keep_freed_memory()
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    if budget is not None:
        set_budget(gated, budget)
    batches, held = read_data(
        loaded,
        data,
        split,
        validation,
        validation_split,
        common={"batch_size": batch_size, "limit": limit, "seed": seed, "shuffle": True},
        augment=augment,
        whole_texts="auto",
    )
    with progress_bars() as progress:
        heal_converted(gated, batches, kind.value, validation=held, options=training, seed=seed, progress=progress)
    save(gated, out, overwrite=force, spec=base)
    if as_json:
        show_json({"out": str(out), **status(gated).to_dict()})
    else:
        show(status(gated))
        note(f"written to {out}")
