"""`surgery convert MODEL --data … --budget 0.6 --out DIR`: a network that runs a share of the dense compute."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
import warnings
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.errors import BudgetError, CheckpointError
from surgery.scripts import options
from surgery.scripts import outputs as places
from surgery.scripts.bars import progress_bars, waiting
from surgery.scripts.loading import Machine
from surgery.scripts.memory import keep_freed_memory
from surgery.scripts.running import command, interrupted, note, program, show, show_json


class Granularity(str, Enum):
    """How finely is decided."""

    auto = "auto"
    sample = "sample"
    token = "token"
    prefill = "prefill"


class Skip(str, Enum):
    """What replaces a branch where it is skipped."""

    auto = "auto"
    identity = "identity"
    affine = "affine"
    low_rank = "low-rank"
    linear = "linear"
    depthwise = "depthwise"
    narrow = "narrow"


class Routers(str, Enum):
    """Whether sites share routers."""

    own = "own"
    shared = "shared"


class Tune(str, Enum):
    """How routers and skip paths get their values."""

    auto = "auto"
    oneshot = "oneshot"
    routers = "routers"
    train = "train"


class Cost(str, Enum):
    """What the budget is a share of."""

    flops = "flops"
    latency = "latency"


class Outputs(str, Enum):
    """What the model's outputs hold."""

    auto = "auto"
    logits = "logits"
    values = "values"


class Heal(str, Enum):
    """What of the backbone is adapted, as copies."""

    norms = "norms"
    lora = "lora"


@command
def convert(
    model: options.ModelArgument,
    budget: options.Budget,
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    data: Annotated[
        str | None,
        typer.Option("--data", help=f"Data to fit and calibrate on; synthetic inputs without it. {options.DATA_HELP}"),
    ] = None,
    split: options.Split = "train",
    validation: options.Validation = None,
    validation_split: options.ValidationSplit = "validation",
    augment: options.Augment = False,
    whole_texts: Annotated[
        bool | None,
        typer.Option(
            "--whole-texts/--all-texts",
            help="Leave out texts that are parts of other texts; by default where most are, as in sets of phrases.",
            rich_help_panel="Data",
        ),
    ] = None,
    sites: options.SitesOption = None,
    granularity: Annotated[
        Granularity, typer.Option("--granularity", help="How finely is decided.")
    ] = Granularity.auto,
    skip: Annotated[Skip, typer.Option("--skip", help="What replaces a skipped branch.")] = Skip.auto,
    width: Annotated[
        float | None,
        typer.Option("--width", help="Share of a branch's hidden channels that narrow skip paths keep; by the budget."),
    ] = None,
    routers: Annotated[
        Routers,
        typer.Option("--routers", help="shared: an MLP reads what the router of its layer's attention made."),
    ] = Routers.own,
    tune: Annotated[
        Tune,
        typer.Option(
            "--tune",
            help="oneshot fits in closed form, train goes on with gradients, routers with those of routers alone.",
        ),
    ] = Tune.auto,
    epochs: options.Epochs = None,
    lowest_budget: Annotated[
        float | None,
        typer.Option(
            "--lowest-budget",
            help="Smallest budget that training is also for; 0.45 by default, or --budget if that is less.",
        ),
    ] = None,
    second_look: Annotated[
        bool | None,
        typer.Option(
            "--second-look/--no-second-look",
            help="Run uncertain inputs again in full, within the budget; by default where it pays.",
        ),
    ] = None,
    first_tokens: Annotated[
        int | None,
        typer.Option(
            "--first-tokens",
            min=0,
            help="First tokens of every sequence that run in full.",
            rich_help_panel="Language models",
        ),
    ] = None,
    first_layers: Annotated[
        int | None,
        typer.Option("--first-layers", min=0, help="First layers that always run.", rich_help_panel="Language models"),
    ] = None,
    cost: Annotated[Cost, typer.Option("--cost", help="Budget in FLOPs, or in latency measured here.")] = Cost.flops,
    heal: Annotated[
        Heal | None,
        typer.Option("--heal", help="Also adapt the backbone a little: copies of its norms, or low-rank changes."),
    ] = None,
    outputs: Annotated[
        Outputs,
        typer.Option("--outputs", help="values: what MODEL gives are numbers of a regression or an embedding."),
    ] = Outputs.auto,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
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
    """Convert MODEL into one that runs BUDGET of the dense compute, and write what was added to a directory."""
    from surgery.checkpoints import save
    from surgery.conversion import UnmeasuredQuality
    from surgery.conversion import convert as convert_model
    from surgery.errors import check_budget
    from surgery.options import HIGHEST, Options
    from surgery.overview import status

    check_budget(budget)
    if epochs is not None and heal is None and tune is Tune.oneshot:
        raise typer.BadParameter("--epochs counts passes of a training, and --tune oneshot does not train")
    if epochs is not None and tune is Tune.auto and data is None:
        raise typer.BadParameter("--epochs counts passes over --data, which is not given")
    if epochs is not None and tune is Tune.auto and budget == 1:
        raise typer.BadParameter(
            "--epochs counts passes of a training, and --budget 1 runs dense: add --tune train to train for lower ones"
        )
    if width is not None and skip not in (Skip.auto, Skip.narrow):
        raise typer.BadParameter(f"--width is that of narrow skip paths, and --skip {skip.value} has none")
    training = Options() if epochs is None else Options(epochs=epochs)
    if lowest_budget is not None:
        check_budget(lowest_budget)
        if lowest_budget > budget:
            raise BudgetError(f"--lowest-budget {lowest_budget:g} is above --budget {budget:g}; give at most that")
        training = replace(training, budgets=(lowest_budget, max(HIGHEST, budget)))
    work = out.with_name(f"{out.name}.tuning")
    places.check_conversion("--out", out, force=force)
    if resume and not _resumable(work, since=0):
        raise CheckpointError(f"--resume: {work} holds no interrupted run; start without --resume")
    keep_freed_memory()
    with waiting("loading the model"):
        loaded = Machine(device, dtype, threads, seed, revision).load(model)
    batches, held = read_data(
        loaded,
        data,
        split,
        validation,
        validation_split,
        common={"batch_size": batch_size, "limit": limit, "seed": seed, "shuffle": True},
        augment=augment,
        whole_texts="auto" if whole_texts is None else whole_texts,
    )
    started = time.time()
    try:
        with progress_bars() as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmeasuredQuality)  # the status says so
            gated = convert_model(
                loaded.model,
                budget,
                data=batches,
                validation=held,
                sites=options.words(sites),
                granularity=granularity.value,
                tune=tune.value,
                skip=skip.value,
                width="auto" if width is None else width,
                second_look="auto" if second_look is None else second_look,
                first_tokens="auto" if first_tokens is None else first_tokens,
                first_layers="auto" if first_layers is None else first_layers,
                routers=routers.value,
                cost=cost.value,
                options=training,
                heal=None if heal is None else heal.value,
                outputs=outputs.value,
                seed=seed,
                progress=progress,
                output_dir=work,
                resume=resume,
            )
        save(gated, out, overwrite=force, spec=model)
    except KeyboardInterrupt:
        if _resumable(work, since=0 if resume else started):
            interrupted(f"interrupted; what was tuned is kept. Go on with: {_resumed(sys.argv[1:])}")
        interrupted("interrupted before tuning began; nothing was written")
    shutil.rmtree(work, ignore_errors=True)
    settings = status(gated)
    if as_json:
        show_json({"out": str(out), "model": model, **settings.to_dict()})
    else:
        show(settings)
        note(f"written to {out}; next: {program()} score {shlex.quote(str(out))} --data …")


def _resumable(work: Path, *, since: float) -> bool:
    """Whether training left a checkpoint there after the time `since`."""
    from surgery import nesting, resuming

    files = [work / module.CHECKPOINT for module in (nesting, resuming)]
    return any(file.is_file() and file.stat().st_mtime >= since for file in files)


def read_data(
    loaded: Any,
    data: str | None,
    split: str,
    validation: str | None,
    validation_split: str,
    *,
    common: dict[str, Any],
    augment: bool,
    whole_texts: bool | Literal["auto"],
) -> tuple[Any, Any]:
    """What to fit on, and what to calibrate on (None for a part of the former)."""
    from surgery.adapters import load_data

    if data is None:
        note(
            "no --data: fitting on synthetic inputs, which say little about yours; calibrate on real ones where you can"
        )
        made = common["limit"] or 256
        return loaded.adapter.inputs(loaded.model, made, common["batch_size"], common["seed"]), None
    batches = load_data(
        data, loaded, split=split, augment=augment, whole_texts=whole_texts, group_by_length=True, **common
    )
    if batches.parts:
        note(f"left out {batches.parts:,} texts that are parts of other texts; --all-texts keeps them")
    held = None if validation is None else load_data(validation, loaded, split=validation_split, **common)
    return batches, held


def _resumed(arguments: list[str]) -> str:
    return shlex.join([program(), *arguments, *(() if "--resume" in arguments else ("--resume",))])
