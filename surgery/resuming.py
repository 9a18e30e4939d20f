"""What an interrupted training goes on from: a file that is there in full or not at all, and that is of this training.

What goes into it is the training's own affair: it alone knows what its steps change.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import CheckpointError

CHECKPOINT = "training.pt"
"""Of `train_routers`."""


def find_checkpoint(output_dir: str | Path | None) -> Path:
    """The checkpoint of an interrupted training.

    Raises:
        CheckpointError: If there is none.
    """
    if output_dir is None:
        raise CheckpointError(
            "nothing to resume: no output directory was given; pass the one of the interrupted training"
        )
    path = Path(output_dir) / CHECKPOINT
    if not path.exists():
        raise CheckpointError(f"nothing to resume: {path} does not exist; train without resume first")
    return path


def forget_checkpoints(output_dir: str | Path | None, names: Iterable[str]) -> None:
    """Remove what an earlier training left there, since one that begins anew must not go on from it."""
    if output_dir is not None:
        for name in names:
            (Path(output_dir) / name).unlink(missing_ok=True)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write what was kept so that the file is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


def read_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    total: int,
    held: Iterable[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the training of routers wrote.

    Args:
        path: Of the checkpoint.
        parameters: What is trained, by name.
        total: Number of steps.
        held: What is kept of the looks at held-out data.
        options: How this training is to go.

    Raises:
        CheckpointError: If the checkpoint is damaged, or of another model, plan or length, or of other options.
    """
    with undamaged(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["options"] = dict(saved["options"])
        shapes = {name: tuple(tensor.shape) for name, tensor in saved["parameters"].items()}
        saved["best"] = {key: saved["best"][key] for key in held}  # an older version kept something else
    ours = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    differ = sorted(name for name in {*ours, *shapes} if ours.get(name) != shapes.get(name))
    if differ:
        raise CheckpointError(f"{path} is of another model or plan; tensors that differ: {differ[:6]}")
    if saved["total"] != total:
        raise CheckpointError(
            f"{path} is of a training over {saved['total']} steps, this one has {total}; resume with the same "
            "data and options"
        )
    check_options(path, saved["options"], options)
    return saved


def check_options(path: Path, saved: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse to go on in another way than a training was begun; what an older version did not keep is not compared.

    Raises:
        CheckpointError: If an option is another one.
    """
    other = next((name for name in options if saved.get(name, options[name]) != options[name]), None)
    if other is not None:
        raise CheckpointError(
            f"{path} is of a training with {other}={saved[other]!r}, this one has {options[other]!r}; resume with the "
            "same data and options, or train from the start"
        )


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Read a checkpoint inside the block: what goes wrong there is the fault of the file."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; delete it to train from the start") from error
