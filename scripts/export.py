"""`surgery export DIR`: a converted model as a file that runs without this package."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from surgery.errors import OutputExists
from surgery.scripts import options, outputs
from surgery.scripts.bars import waiting
from surgery.scripts.loading import Machine, example_of
from surgery.scripts.running import command, note, show, show_json


class Form(str, Enum):
    """File formats."""

    onnx = "onnx"
    pt2 = "pt2"


class How(str, Enum):
    """Executions that a graph can hold."""

    auto = "auto"
    cond = "cond"
    mask = "mask"
    static = "static"


class Tokens(str, Enum):
    """What `cond` does with active tokens."""

    mask = "mask"
    gather = "gather"


@command
def export(
    directory: options.DirectoryArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write: FILE.onnx or FILE.pt2.")],
    form: Annotated[
        Form | None, typer.Option("--format", help="onnx or pt2 (torch.export); by default the suffix of FILE.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Samples per call; more than 1 needs --execution mask or static.")
    ] = 1,
    execution: Annotated[
        How,
        typer.Option(
            "--execution",
            help="cond: branches that are not needed do not run. mask: everything runs, decisions select. static: the "
            "static policy, without the weights that it never uses. auto: cond, or static where that policy runs.",
        ),
    ] = How.auto,
    tokens: Annotated[
        Tokens,
        typer.Option("--tokens", help="cond, per token: run a branch on all tokens, or gather the active ones (MLPs)."),
    ] = Tokens.mask,
    budget: options.OtherBudget = None,
    decisions: Annotated[bool, typer.Option("--decisions", help="Every gate's decisions are outputs as well.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.", rich_help_panel="Output")] = False,
    base: options.Base = None,
    data: Annotated[
        str | None, typer.Option("--data", help=f"Inputs whose shapes are taken. {options.DATA_HELP}")
    ] = None,
    split: options.Split = "test",
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a converted model as ONNX or as a torch.export program, with routers, skip paths and one budget inside."""
    from surgery.budgets import set_budget
    from surgery.exporting import export as write

    outputs.check_file("--out", out)
    if out.exists() and not force:
        raise OutputExists(f"{out} exists; pass --force to replace it, or another --out")
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
        if budget is not None:
            set_budget(gated, budget)
        example = example_of(loaded, data, split=split, batch_size=batch_size, seed=seed)
    with waiting("exporting"):
        done = write(
            gated,
            out,
            example,
            format=None if form is None else form.value,
            execution=None if execution is How.auto else execution.value,
            tokens=tokens.value,
            decisions=decisions,
            overwrite=force,
        )
    if as_json:
        show_json(done.to_dict())
        return
    inputs = ", ".join(f"{name} {list(shape)}" for name, shape in done.inputs.items())
    show(Text(f"{done.path}: {done.format}, {done.bytes / 1e6:.1f} MB, execution {done.execution}"))
    show(Text(f"inputs: {inputs}\noutputs: {', '.join(done.outputs)}"))
    if done.dropped:
        show(Text(f"left out: {len(done.dropped)} tensors of branches and routers that never run"))
    if decisions and len(done.outputs) == 1:
        note("a static policy decides nothing, so there are no decisions among the outputs (--execution cond has them)")
    if done.execution == "static" and loaded.adapter.name == "huggingface":
        note("no per-layer skip config is written beside it: no model in transformers reads one yet (docs/export.md)")
