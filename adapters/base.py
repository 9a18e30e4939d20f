"""What an adapter is, and what loading a model gives.

Axis letters: `N` samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from surgery.adapters.specs import Spec
from surgery.calling import Batch, device_of, dtype_of
from surgery.errors import MissingDependency

Row = Mapping[str, Any]
"""One row of a dataset after its columns were recognised: keys among image, text, pair, target, audio, value."""

BASE_ATTRIBUTE = "surgery_base"
"""Set on models that `load_model` made, so that a checkpoint can name what it was made from."""


class Preprocess(Protocol):
    """Turns one row into one sample: a tensor, or the keyword arguments of one call."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Which of image, text, audio a row must have; empty means whichever there is."""

    def __call__(self, row: Row) -> Any:
        """One sample."""


class Collate(Protocol):
    """Turns samples and their labels into what the model is called with."""

    def __call__(self, samples: Sequence[Any], labels: Tensor | None) -> Any:
        """`(inputs, labels)`, `inputs` alone, or keyword arguments with `labels` among them."""


class Adapter(Protocol):
    """What is known about one ecosystem."""

    @property
    def name(self) -> str:
        """Its name in the registry."""

    def load(
        self, spec: Spec, *, device: torch.device | str, dtype: torch.dtype | None, revision: str | None
    ) -> Loaded:
        """The model that a `MODEL` string names."""

    def example(self, model: nn.Module, batch_size: int = 2, seed: int = 0) -> Batch:
        """One batch of what the model is called with, of random values, on the model's device."""

    def inputs(self, model: nn.Module, count: int, batch_size: int = 32, seed: int = 0) -> Iterable[Batch]:
        """`count` synthetic samples in batches, the same ones on every pass: for conversion without data."""

    def reference(self, model: nn.Module) -> dict[str, str]:
        """What a checkpoint writes down about its base: `library`, `class`, `base` (a `MODEL` string), `revision`."""

    def base_config(self, model: nn.Module) -> dict[str, Any]:
        """The content of a `config.json` from which the ecosystem builds the same architecture again."""

    def save_base(self, dense: nn.Module, directory: Path) -> None:
        """Write a dense model, its preprocessing included, as the ecosystem itself does."""

    def save_native(self, gated: nn.Module, directory: Path, spec: str | None) -> None:
        """Write a gated model as one checkpoint that the ecosystem's own loader opens."""


@dataclass(frozen=True)
class Loaded:
    """A model, and what turns a dataset's rows into its inputs.

    Args:
        model: In eval mode.
        adapter: The adapter that loaded it.
        spec: The `MODEL` string.
        preprocess: One row -> one sample.
        collate: Samples and labels -> one batch.
        label_names: Names of the classes in the order of the logits, where known.
        num_classes: Number of classes, where the model is a classifier.
        tokenizer: Where there is one.
        image_processor: Where there is one.
        feature_extractor: Where there is one (audio).
    """

    model: nn.Module
    adapter: Adapter
    spec: str
    preprocess: Preprocess
    collate: Collate
    label_names: tuple[str, ...] = ()
    num_classes: int | None = None
    tokenizer: Any = None
    image_processor: Any = None
    feature_extractor: Any = None


def stack(samples: Sequence[Any], labels: Tensor | None) -> Any:
    """`(inputs, labels)` as timm loaders give them, or `inputs` where there are no labels."""
    inputs = torch.stack(list(samples))
    return inputs if labels is None else (inputs, labels)


def library(name: str, install: str) -> ModuleType:
    """Import an optional library.

    Args:
        name: Module name.
        install: What to give to `pip install`.

    Raises:
        MissingDependency: If it is not installed; the message is the install line.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(f'{name} is needed here: pip install "{install}"') from error


def place(model: nn.Module, batch: Batch) -> Batch:
    """Move a batch to the model's device, its floating-point inputs to the model's dtype."""
    return batch.to(device_of(model), dtype_of(model))


def class_path(model: nn.Module) -> str:
    """`module.ClassName` of the model."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def recorded_base(model: nn.Module) -> Mapping[str, str]:
    """What `load_model` wrote onto the model; empty for models made otherwise."""
    return getattr(model, BASE_ATTRIBUTE, {})


class Synthetic:
    """A re-iterable of synthetic batches, made anew and alike on every pass.

    Args:
        make: `(batch size, seed) -> Batch`.
        count: Number of samples.
        batch_size: Samples per batch; the last batch may be smaller.
        seed: Of the first batch; later batches have seeds of their own.
        keep: Hold on to the batches after the first pass: for those that are small and slow to make.
    """

    def __init__(self, make: Make, count: int, batch_size: int, seed: int, *, keep: bool = False) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"count and batch_size must be at least 1, got {count} and {batch_size}")
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._make = cache(make) if keep else make

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            size = min(self._batch_size, self._count - index * self._batch_size)
            # seeds of neighbouring runs must not share batches, so batches are far apart in seed space
            yield self._make(size, self._seed + 1_000_003 * index)


class Make(Protocol):
    """Makes one synthetic batch."""

    def __call__(self, size: int, seed: int, /) -> Batch:
        """A batch of `size` samples."""
