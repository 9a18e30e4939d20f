"""What most commands begin with: a model, its data, and the checkpoint made from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, UnknownModel
from surgery.scripts.options import Dtype, choose_device, choose_dtype, set_up

if TYPE_CHECKING:
    from torch import nn

    from surgery.adapters import Loaded


@dataclass(frozen=True)
class Machine:
    """Where and how a model is loaded, from the options of that name."""

    device: str = "auto"
    dtype: Dtype = Dtype.auto
    threads: int | None = None
    seed: int = 0
    revision: str | None = None

    def load(self, spec: str) -> Loaded:
        """The dense model that a `MODEL` string names."""
        from surgery.adapters import load_model

        set_up(self.threads, self.seed)
        device = choose_device(self.device)
        return load_model(spec, device=device, dtype=choose_dtype(self.dtype, device), revision=self.revision)

    def load_converted(self, directory: Path, spec: str | None) -> tuple[nn.Module, Loaded]:
        """The gated model in `directory`, and the dense model that it was made from.

        Args:
            directory: What `surgery convert` wrote.
            spec: `MODEL` string of the base; None reads it from the checkpoint.

        Raises:
            CheckpointError: If the checkpoint does not say what it was made from, or that cannot be built.
        """
        from surgery.checkpoints import base_spec, load, native_config_is_used, unbuilt
        from surgery.configs import decode, read_config
        from surgery.rewriting import remove

        base = decode(read_config(directory)).base
        if native_config_is_used(directory):
            loaded = self.load(str(directory))
            return loaded.model, replace(loaded, model=remove(loaded.model))
        if not (spec or base.get("spec") or base.get("included")):
            raise CheckpointError(
                f"{directory} was made from a {base.get('class')} that no MODEL string names; give one with --model"
            )
        there = spec or self.revision or base.get("included")
        machine = self if there else replace(self, revision=base.get("revision") or None)
        try:
            loaded = machine.load(spec or base_spec(directory, base))
        except UnknownModel as error:
            if spec:
                raise
            raise unbuilt(directory, base, str(base.get("spec")), error) from error
        return load(directory, model=loaded.model), loaded


def example_of(loaded: Loaded, data: str | None, *, split: str, batch_size: int, seed: int) -> Any:
    """The first batch of the data, or random inputs of the right form where no data is given."""
    if data is None:
        return loaded.adapter.example(loaded.model, batch_size, seed)
    from surgery.adapters import load_data

    return next(iter(load_data(data, loaded, split=split, batch_size=batch_size, limit=batch_size)))


def is_converted(model: str) -> bool:
    """Whether a `MODEL` argument is a directory that `surgery convert` wrote."""
    from surgery.configs import is_checkpoint

    return is_checkpoint(model)
