"""The adapter for networks of the user's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from surgery.adapters.base import BASE_ATTRIBUTE, Adapter, Loaded, Row, class_path, recorded_base, stack
from surgery.adapters.images import ImagePreprocess, to_pil
from surgery.adapters.specs import Spec, near_files, numbers
from surgery.calling import Batch
from surgery.errors import CheckpointError, DataError, UnknownModel, did_you_mean
from surgery.finding import check_weights

PREPROCESSING = ("mean", "std", "size", "channels")


@dataclass(frozen=True)
class PlainPreprocess:
    """Pictures become tensors in [0, 1], normalised if asked; arrays become tensors."""

    image: ImagePreprocess
    needs: tuple[str, ...] = ()

    def __call__(self, row: Row) -> Tensor:
        """One sample, without the batch axis."""
        if "image" in row:
            return self.image(row)
        if "value" in row:
            value = torch.as_tensor(row["value"])
            return value.float() if value.is_floating_point() else value
        raise DataError(
            f"found {' and '.join(row) or 'nothing'} in the data, and a network of your own has no tokenizer: let the "
            "function named in the MODEL string return (network, preprocess), where preprocess(text) gives a tensor"
        )


@dataclass(frozen=True)
class UserPreprocess:
    """A function of the user's own, called with the picture (PIL), text or array.

    Pictures have the colours of the file; where the network takes three, transparency and palettes become RGB.
    """

    function: Callable[[Any], Any]
    channels: int | None = None
    needs: tuple[str, ...] = ()

    def __call__(self, row: Row) -> Any:
        """One sample, without the batch axis."""
        if "pair" in row:
            both = row["text"], row["pair"]
            return _sample(self.function(both), both)
        value = next(row[key] for key in ("image", "text", "audio", "value") if key in row)
        if "image" in row and not isinstance(value, Tensor):
            value = to_pil(value, colour=False)
            if self.channels == 3 and (value.mode == "P" or len(value.getbands()) > 1):
                value = value.convert("RGB")
        return _sample(self.function(value), value)


def _sample(sample: Any, value: Any) -> Any:
    """What `preprocess` gave, if a batch can be made of it."""
    for one in sample.values() if isinstance(sample, dict) else (sample,):
        try:
            torch.as_tensor(one)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"preprocess was called with {type(value).__name__} and gave {type(one).__name__}; a tensor, an array or a "
                "dict of these is expected: is this data for another network?"
            ) from error
    return sample


class PlainAdapter:
    """Any `nn.Module`: nothing is known about it but what it is."""

    name = "plain"

    def load(
        self, spec: Spec, *, device: torch.device | str, dtype: torch.dtype | None, revision: str | None
    ) -> Loaded:
        """`python:path/to/file.py:function` or `python:package.module:function`."""
        where, _, function_name = spec.rest.rpartition(":")
        if not where:
            raise UnknownModel(f"{spec.text!r}: expected python:path/to/file.py:function")
        function = _function(spec, _module(spec, where), function_name)
        own = [name for name in PREPROCESSING if name in inspect.signature(function).parameters]
        preprocessing = {k: v for k, v in spec.options.items() if k in PREPROCESSING and k not in own}
        options = spec.without(*preprocessing)
        _check_options(spec, function, options)
        try:
            result = function(**options)
        except Exception as error:  # it is the user's code
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UnknownModel(
                f"{spec.text!r}: {function_name} failed in {Path(place.filename).name}, line {place.lineno}: "
                f"{type(error).__name__}: {error}; --debug shows the traceback"
            ) from error
        model, preprocess = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        if not isinstance(model, nn.Module):
            raise UnknownModel(
                f"{spec.text!r}: {function_name} must return an nn.Module or (nn.Module, preprocess), "
                f"got {type(model).__name__}"
            )
        if preprocess is not None and not callable(preprocess):
            raise UnknownModel(f"{spec.text!r}: preprocess must be callable, got {type(preprocess).__name__}")
        check_weights(model)
        setattr(model, BASE_ATTRIBUTE, {"base": spec.text, "revision": revision or ""})
        channels = _channels(model)
        pictures = _pictures({"channels": channels, **preprocessing} if channels else preprocessing)
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if dtype is None and torch.device(device).type == "cpu" and dtypes & {torch.float16, torch.bfloat16}:
            dtype = torch.float32
        return Loaded(
            model=model.to(device=device, dtype=dtype).eval(),
            adapter=ADAPTER,
            spec=spec.text,
            preprocess=UserPreprocess(preprocess, channels) if preprocess else PlainPreprocess(pictures),
            collate=collate,
        )

    def example(self, model: nn.Module, batch_size: int = 2, seed: int = 0) -> Batch:
        """Unknown for a network of the user's own."""
        _refuse(model)

    def inputs(self, model: nn.Module, count: int, batch_size: int = 32, seed: int = 0) -> Iterable[Batch]:
        """Unknown for a network of the user's own."""
        _refuse(model)

    def reference(self, model: nn.Module) -> dict[str, str]:
        """Class, and the `MODEL` string if it was loaded by one."""
        return {"library": "", "class": class_path(model), "base": "", "revision": "", **recorded_base(model)}

    def base_config(self, model: nn.Module) -> dict[str, Any]:
        """Nothing is known."""
        return {}

    def save_base(self, dense: nn.Module, directory: Path) -> None:
        """Nothing opens it."""
        raise CheckpointError(
            f"{class_path(dense)} is a network of your own, which no library opens from a directory; save without base=True and"
            " share its code and weights as you do now"
        )

    def save_native(self, gated: nn.Module, directory: Path, spec: str | None) -> None:
        """Nothing opens it."""
        raise CheckpointError(
            f"native checkpoints are for transformers models, got a {class_path(gated)}; save without native=True"
        )


ADAPTER: Adapter = PlainAdapter()


def collate(samples: Sequence[Any], labels: Tensor | None) -> Any:
    """Stack tensors; samples that are dicts of tensors become keyword arguments."""
    if samples and isinstance(samples[0], dict):
        batch = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}
        return batch if labels is None else {**batch, "labels": labels}
    tensors = [torch.as_tensor(sample) for sample in samples]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        option = "channels" if len({shape[1:] for shape in shapes}) == 1 else "size"
        raise DataError(
            f"samples of one batch have different shapes: {', '.join(map(str, shapes[:4]))}; give ?{option}=… in the MODEL "
            "string or let preprocess make them equal"
        )
    return stack(tensors, labels)


def _refuse(model: nn.Module) -> NoReturn:
    raise DataError(
        f"{type(model).__name__} is a network of your own, so what it is called with is not known: "
        "give data (--data in the shell, data=<a loader> in Python) or, in Python, example=<one batch>"
    )


def _module(spec: Spec, where: str) -> ModuleType:
    path = Path(where)
    if path.suffix != ".py":
        try:
            return importlib.import_module(where)
        except ImportError as error:
            raise UnknownModel(f"{spec.text!r}: cannot import {where}: {error}") from error
    if not path.is_file():
        raise UnknownModel(f"{spec.text!r}: file {where} does not exist{did_you_mean(near_files(path))}")
    name = f"surgery_user_{path.stem}"
    source = importlib.util.spec_from_file_location(name, path.resolve())
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up by name
    sys.path.insert(0, str(path.resolve().parent))  # files beside it can be imported, as when it is run
    try:
        source.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UnknownModel(f"{spec.text!r}: running {where} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _function(spec: Spec, module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function
    known = {one: value for one, value in vars(module).items() if callable(value) and not one.startswith("_")}
    # imports are called by the names that the file gives them, but are seldom what is meant
    own = [one for one, value in known.items() if getattr(value, "__module__", None) == module.__name__] or list(known)
    near = difflib.get_close_matches(name, own) or difflib.get_close_matches(name, known) or own[:8]
    raise UnknownModel(f"{spec.text!r}: no function {name!r} there; found: {', '.join(near) or 'none'}")


def _check_options(spec: Spec, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a function does not have, and functions that need more than is given."""
    signature, name = inspect.signature(function), spec.rest.rpartition(":")[2]
    try:
        signature.bind_partial(**options)
    except TypeError as error:
        raise UnknownModel(f"{spec.text!r}: {name} refuses an option: {error}") from error
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UnknownModel(
            f"{spec.text!r}: {name}{signature} cannot be called with {', '.join(options) or 'nothing'}: {error}; name a "
            "function that returns a network, and give its arguments as ?name=value&name=value"
        ) from error


def _channels(model: nn.Module) -> int | None:
    """3 where the first convolution takes three channels, None where nothing is known."""
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first == 3 else None


def _pictures(options: Mapping[str, Any]) -> ImagePreprocess:
    size = tuple(int(value) for value in numbers(options["size"])) if "size" in options else None
    return ImagePreprocess(
        mean=numbers(options["mean"]) if "mean" in options else None,
        std=numbers(options.get("std", 1.0)),
        size=None if size is None else (size[0], size[-1]),
        channels=int(options["channels"]) if "channels" in options else None,
    )
