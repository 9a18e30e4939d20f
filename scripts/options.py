"""Options that several commands share, each written once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch


class Dtype(str, Enum):
    """Floating-point types that a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


MODEL_HELP = "timm:NAME, hf:ORG/NAME, a local directory, or python:FILE.py:FUNCTION."
DATA_HELP = (
    "A .parquet, .csv, .tsv, .jsonl or .json file, a folder of images by class, a dataset's name on the Hub, or digits."
)

# Where an option may be given several times it has the name of one (--timed-batch, --tag, --open); lists in one word, with
# commas, have the name of many (--budgets, --sites).
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `surgery convert` wrote.")]
RepositoryArgument = Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub: user/name.")]
Token = Annotated[
    str | None,
    typer.Option("--token", help="By default HF_TOKEN, or what `hf auth login` stored.", rich_help_panel="Hub"),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Revision of a model on the Hub.", rich_help_panel="Model")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel="Machine")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="auto: as stored, float32 on a CPU.", rich_help_panel="Machine")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads for torch.", rich_help_panel="Machine")
]
Data = Annotated[str, typer.Option("--data", help=DATA_HELP)]
Split = Annotated[str, typer.Option("--split", help="Split of --data.", rich_help_panel="Data")]
Budget = Annotated[float, typer.Option("--budget", help="Mean cost as a share of the dense model's, in (0, 1].")]
OtherBudget = Annotated[
    float | None, typer.Option("--budget", help="Another budget than the one it was converted for.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for everything random.", rich_help_panel="Machine")]
Validation = Annotated[
    str | None,
    typer.Option("--validation", help="Data to calibrate on; by default every fifth batch.", rich_help_panel="Data"),
]
ValidationSplit = Annotated[
    str, typer.Option("--validation-split", help="Split of --validation.", rich_help_panel="Data")
]
Augment = Annotated[
    bool, typer.Option("--augment", help="Flip and shift pictures, splice texts, at random.", rich_help_panel="Data")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an older conversion in --out.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.", rich_help_panel="Data")]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Read at most this many samples.", rich_help_panel="Data")
]
TimedBatch = Annotated[int, typer.Option("--timed-batch", min=0, help="Samples per timed call; 0 for no times.")]
TimedBatches = Annotated[
    list[int] | None, typer.Option("--timed-batch", min=1, help="Time calls of so many samples; repeatable.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the data in training; 3 by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.", rich_help_panel="Output")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]

# of the lab pages that convert one network in several ways and compare on other training data
FitLimit = Annotated[int, typer.Option("--limit", min=1, help="Inputs to fit with.")]
Held = Annotated[int, typer.Option("--held", min=1, help="Other inputs to compare on.")]
TrialBudgets = Annotated[list[float] | None, typer.Option("--budget", help="Repeatable; 0.75, 0.6, 0.5.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds.")]
Grain = Annotated[str, typer.Option("--granularity", help="As in `surgery convert`.")]
TrialTune = Annotated[str, typer.Option("--tune", help="oneshot or train.")]

Base = Annotated[
    str | None,
    typer.Option("--model", help="MODEL that DIR was made from; by default the one it names.", rich_help_panel="Model"),
]
SitesOption = Annotated[
    str | None,
    typer.Option(
        "--sites",
        metavar="WORD,WORD",
        help="Kinds (block, attention, mlp, heads) and name patterns ('layer3.*'); all by default.",
    ),
]


def words(text: str | None) -> list[str] | None:
    """A comma-separated list; None where nothing was given."""
    return [word.strip() for word in text.split(",") if word.strip()] or None if text is not None else None


def numbers(option: str, text: str) -> list[float]:
    """A comma-separated list of numbers.

    Raises:
        typer.BadParameter: If something in it is none.
    """
    found = []
    for word in words(text) or []:
        try:
            found.append(float(word))
        except ValueError as error:
            raise typer.BadParameter(f"{option}: {word!r} is no number; write 0.4,0.6") from error
    return found


def budgets(text: str) -> list[float]:
    """The budgets of `--budgets`, as fractions of the dense cost.

    Raises:
        typer.BadParameter: If one is no number.
        BudgetError: If one is outside (0, 1].
    """
    from surgery.errors import check_budget

    found = numbers("--budgets", text)
    for budget in found:
        check_budget(budget)
    return found


def choose_device(name: str) -> torch.device:
    """`auto` takes an accelerator where there is one.

    Raises:
        typer.BadParameter: If the device is unknown or not there.
    """
    import torch

    hint = "--device"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"{name!r} is none; use auto, cpu, cuda, cuda:N or mps", param_hint=hint) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise typer.BadParameter(f"{name!r} is not there: torch sees {found} CUDA devices", param_hint=hint)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise typer.BadParameter("'mps' is not available in this build of torch or on this machine", param_hint=hint)
    return device


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype | None:
    """None leaves the weights as stored; half-precision weights run slowly on a CPU, so `auto` is float32 there."""
    import torch

    if dtype is Dtype.auto:
        return torch.float32 if device.type == "cpu" else None
    return {
        Dtype.float32: torch.float32,
        Dtype.bfloat16: torch.bfloat16,
        Dtype.float16: torch.float16,
        Dtype.float64: torch.float64,
    }[dtype]


def set_up(threads: int | None, seed: int) -> None:
    """Apply `--threads` and `--seed` to this process."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
