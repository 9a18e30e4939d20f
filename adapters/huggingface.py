"""The adapter for Hugging Face transformers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.adapters.base import (
    BASE_ATTRIBUTE,
    Adapter,
    Loaded,
    Synthetic,
    class_path,
    library,
    place,
    recorded_base,
)
from surgery.adapters.specs import Spec, near_files, numbers, parse_spec
from surgery.calling import Batch
from surgery.copying import align
from surgery.errors import CheckpointError, UnknownModel, did_you_mean, near
from surgery.tracing import base_class

library("transformers", "transformers")

import transformers  # noqa: E402  (after the check, whose message is an install line)

from surgery.adapters import huggingface_native  # noqa: E402
from surgery.adapters.huggingface_files import copy_processors, file_of  # noqa: E402
from surgery.adapters.huggingface_inputs import modalities, random_batch, text_limit  # noqa: E402
from surgery.adapters.huggingface_rows import HuggingFaceCollate, HuggingFacePreprocess  # noqa: E402
from surgery.adapters.images import ImagePreprocess  # noqa: E402

logger = logging.getLogger(__name__)

OWN_OPTIONS = ("class", "pretrained", "revision", "mean", "std", "size", "max_length")
HALF = (torch.float16, torch.bfloat16)


class HuggingFaceAdapter:
    """transformers: text, pictures and sound, called with keyword arguments."""

    name = "huggingface"

    def load(
        self, spec: Spec, *, device: torch.device | str, dtype: torch.dtype | None, revision: str | None
    ) -> Loaded:
        """`hf:org/name`, or a directory written by `save_pretrained`."""
        revision = revision or spec.options.get("revision")
        if spec.rest.startswith("timm/"):  # timm's repositories on the Hub are read by timm
            from surgery.adapters import timm

            return timm.ADAPTER.load(spec, device=device, dtype=dtype, revision=revision)
        model = _model(spec, torch.device(device), dtype, revision)
        setattr(model, BASE_ATTRIBUTE, {"base": spec.text, "revision": _commit(model, revision)})
        needs = modalities(model)
        tokenizer = _tokenizer(spec, revision) if "text" in needs or "decoder_input_ids" in needs else None
        image_processor = _image_processor(spec, revision, model) if "image" in needs else None
        feature_extractor = _feature_extractor(spec, revision) if "audio" in needs else None
        limit = spec.options.get("max_length") or text_limit(model, tokenizer)
        return Loaded(
            model=model,
            adapter=ADAPTER,
            spec=spec.text,
            preprocess=HuggingFacePreprocess.of(model, tokenizer, image_processor, feature_extractor, int(limit)),
            collate=HuggingFaceCollate.of(model, tokenizer, int(limit)),
            label_names=_label_names(model),
            num_classes=_num_classes(model),
            tokenizer=tokenizer,
            image_processor=image_processor,
            feature_extractor=feature_extractor,
        )

    def example(self, model: nn.Module, batch_size: int = 2, seed: int = 0) -> Batch:
        """Random tokens (the last row padded), synthetic pictures or sound, whichever the model takes."""
        return place(model, random_batch(model, batch_size, seed, length=32))

    def inputs(self, model: nn.Module, count: int, batch_size: int = 32, seed: int = 0) -> Iterable[Batch]:
        """Synthetic inputs; language models write their own."""
        keep = "text" in modalities(model)  # tokens are small, and slow to make where the model writes them

        def make(size: int, at: int) -> Batch:
            return place(model, random_batch(model, size, at, length=128, varied=True, generate=True))

        return Synthetic(make, count, batch_size, seed, keep=keep)

    def reference(self, model: nn.Module) -> dict[str, str]:
        """Library, class, `MODEL` string and revision."""
        name = getattr(model.config, "_name_or_path", "") or ""
        base = name if Path(name).is_dir() or not name else f"hf:{name}"
        found = {"base": base, "revision": _commit(model, None)}
        return {"library": "transformers", "class": class_path(model), **found, **recorded_base(model)}

    def base_config(self, model: nn.Module) -> dict[str, Any]:
        """The model's config."""
        config: Any = model.config
        known = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
        return {**known, "architectures": [type(model).__name__]}

    def save_base(self, dense: nn.Module, directory: Path) -> None:
        """What `save_pretrained` writes, with the tokenizer and processors that the model came with."""
        cls: Any = type(dense)
        _write(dense, cls.save_pretrained, directory)

    def save_native(self, gated: nn.Module, directory: Path, spec: str | None) -> None:
        """The same of a gated model, with gates inside."""
        cls: Any = base_class(gated)
        save = functools.partial(huggingface_native.save_pretrained, save=cls.save_pretrained, spec=spec)
        _write(gated, save, directory)


ADAPTER: Adapter = HuggingFaceAdapter()

huggingface_native.register()


def _write(model: nn.Module, save: Callable[..., Any], directory: Path) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        raise CheckpointError(
            f"{type(model).__name__} wraps a model of transformers, whose weights it cannot write in one piece; "
            "merge adapters before converting (peft: merge_and_unload), or use surgery.save(gated, directory) and "
            "surgery.load(directory, model=…)"
        )
    try:
        with _quiet():
            save(model, save_directory=str(directory))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"transformers cannot save this {type(model).__name__}: {error}") from error
    copy_processors(_source(model), directory, recorded_base(model).get("revision") or None)


def _source(model: nn.Module) -> str:
    """The directory or Hub id that a model came from, or ""."""
    recorded = recorded_base(model).get("base")
    return parse_spec(recorded).rest if recorded else getattr(model.config, "_name_or_path", "") or ""


def _model(spec: Spec, device: torch.device, dtype: torch.dtype | None, revision: str | None) -> nn.Module:
    options = spec.without(*OWN_OPTIONS)
    _check_directory(spec)
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            spec.rest, revision=revision, return_unused_kwargs=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        hint = did_you_mean(
            near_files(Path(spec.rest), directories=True),
            "without a connection, give a directory that `save_pretrained` wrote",
        )
        raise UnknownModel(f"{spec.text!r} cannot be read: {str(error).rstrip('. ')}{hint}") from error
    cls = class_of(spec.text, config, spec.options.get("class"))
    if dtype is None and device.type == "cpu" and getattr(config, "dtype", None) in HALF:
        dtype = torch.float32
    if spec.options.get("pretrained", True) is False:
        factory = getattr(cls, "_from_config", None) or cls.from_config
        model = factory(config)
    else:
        unused.pop("revision", None)
        try:
            with _quiet():
                model, info = cls.from_pretrained(
                    spec.rest,
                    config=config,
                    revision=revision,
                    dtype=dtype or "auto",
                    output_loading_info=True,
                    **unused,
                )
        except (OSError, ValueError, ImportError) as error:
            raise UnknownModel(f"{spec.text!r} cannot be loaded: {error}") from error
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{spec.text!r}: the weights do not fit {cls.__name__}: {error}") from error
        if info["missing_keys"]:
            logger.warning(
                "%s: the weights lack %s; these stay random until they are trained",
                spec.text,
                ", ".join(sorted(info["missing_keys"])[:6]),
            )
    if dtype is None and device.type == "cpu" and any(p.dtype in HALF for p in model.parameters()):
        dtype = torch.float32
    return align(model.to(device=device, dtype=dtype) if dtype is not None else model.to(device)).eval()


def _check_directory(spec: Spec) -> None:
    """Refuse a path that leads nowhere, which the Hub's client would take for an id of its own."""
    if (spec.rest.startswith((".", "/", "~")) or spec.rest.count("/") > 1) and not Path(spec.rest).is_dir():
        path = Path(spec.rest).expanduser()
        hint = did_you_mean([path] if path.is_dir() else near_files(path, directories=True))
        raise UnknownModel(f"{spec.text!r}: directory {spec.rest} does not exist{hint}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar of reading weights; those of downloads stay."""
    was = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            transformers.utils.logging.enable_progress_bar()


def class_of(text: str, config: Any, wanted: Any = None) -> Any:
    """The class that is `wanted`, or that the config names, else `AutoModel`.

    Args:
        text: The `MODEL` string, for messages.
        config: A transformers config.
        wanted: Name of a class of transformers, or None.

    Raises:
        UnknownModel: If transformers has no such class.
    """
    if wanted is not None:
        cls = getattr(transformers, str(wanted), None)
        if cls is None:
            raise UnknownModel(f"{text!r}: transformers has no class {wanted!r}{near(str(wanted), dir(transformers))}")
        return cls
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
        logger.warning("%s: transformers has no class %s, using AutoModel", text, name)
    return transformers.AutoModel


def _tokenizer(spec: Spec, revision: str | None) -> Any:
    if file_of(spec.rest, ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "spiece.model"), revision) is None:
        logger.warning("%s: there is no tokenizer, so text cannot be read", spec.text)
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.rest, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _image_processor(spec: Spec, revision: str | None, model: nn.Module) -> Any:
    if file_of(spec.rest, ("preprocessor_config.json", "processor_config.json"), revision) is None:
        from surgery.adapters.huggingface_inputs import image_config

        config = image_config(model)
        channels, rows, columns = config["input_size"]
        mean, std = (numbers(spec.options.get(key, list(config[key]))) for key in ("mean", "std"))
        logger.warning("%s: there is no image processor, using mean %s and std %s", spec.text, mean, std)
        return ImagePreprocess(mean=mean, std=std, size=(rows, columns), channels=channels)
    options: dict[str, Any] = {}
    for key in ("mean", "std"):
        if key in spec.options:
            values = numbers(spec.options[key])
            options[f"image_{key}"] = list(values * (3 if len(values) == 1 else 1))
    if "size" in spec.options:
        size = [int(value) for value in numbers(spec.options["size"])]
        options["size"] = {"height": size[0], "width": size[-1]}
    return transformers.AutoImageProcessor.from_pretrained(spec.rest, revision=revision, **options)


def _feature_extractor(spec: Spec, revision: str | None) -> Any:
    if file_of(spec.rest, ("preprocessor_config.json", "processor_config.json"), revision) is None:
        logger.warning("%s: there is no feature extractor, so sound cannot be read", spec.text)
        return None
    return transformers.AutoFeatureExtractor.from_pretrained(spec.rest, revision=revision)


def _commit(model: nn.Module, revision: str | None) -> str:
    return getattr(model.config, "_commit_hash", None) or revision or ""


def _num_classes(model: nn.Module) -> int | None:
    if "Classification" not in type(model).__name__:
        return None
    count = getattr(model.config, "num_labels", None)
    return int(count) if isinstance(count, int) else None


def _label_names(model: nn.Module) -> tuple[str, ...]:
    names: Mapping[Any, str] | None = getattr(model.config, "id2label", None)
    if not names or _num_classes(model) is None:
        return ()
    ordered = [str(names[key]) for key in sorted(names, key=int)]
    # LABEL_0, LABEL_1, … are transformers' placeholders, not names
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else tuple(ordered)
