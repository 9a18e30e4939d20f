"""The adapter for timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapters.base import (
    BASE_ATTRIBUTE,
    Adapter,
    Loaded,
    Row,
    Synthetic,
    class_path,
    library,
    place,
    recorded_base,
    stack,
)
from surgery.adapters.images import in_8_bits, natural_images, to_pil
from surgery.adapters.specs import Spec, numbers, parse_spec, with_option
from surgery.calling import Batch, dtype_of
from surgery.errors import CheckpointError, UnknownModel, did_you_mean
from surgery.fingerprints import fingerprint

library("timm", "timm")

import timm  # noqa: E402  (after the check, whose message is an install line)
import timm.data  # noqa: E402
import timm.models  # noqa: E402

OWN_OPTIONS = ("checkpoint", "pretrained", "revision")
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation", "input_size")


@dataclass(frozen=True)
class TimmPreprocess:
    """timm's own evaluation transform."""

    transform: Callable[[Any], Tensor]
    channels: int = 3
    needs: tuple[str, ...] = ("image",)

    def __call__(self, row: Row) -> Tensor:
        """`(C, H, W)`."""
        image = to_pil(row["image"], colour=self.channels != 1)
        return self.transform(in_8_bits(image).convert("L") if self.channels == 1 else image)


class TimmAdapter:
    """timm: pictures in, one tensor out."""

    name = "timm"

    def load(
        self, spec: Spec, *, device: torch.device | str, dtype: torch.dtype | None, revision: str | None
    ) -> Loaded:
        """`timm:name`, `timm:hf-hub:org/name`, or a directory in timm's Hub layout."""
        options = spec.without(*OWN_OPTIONS, *PREPROCESSING)
        revision = revision or spec.options.get("revision")
        checkpoint = spec.options.get("checkpoint")
        pretrained = bool(spec.options.get("pretrained", checkpoint is None))
        name = _source(spec, revision if pretrained else None)
        try:
            model = timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            raise UnknownModel(f"{spec.text!r}: timm.create_model refuses an option: {error}") from error
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            kind = CheckpointError if "state_dict" in str(error) else UnknownModel
            hint = (
                f"; {with_option(spec.text, 'pretrained=false')} builds it with random weights, "
                f"{with_option(spec.text, 'checkpoint=FILE')} with weights of your own"
                if pretrained and kind is UnknownModel
                else ""
            )
            raise kind(f"{spec.text!r} cannot be loaded: {str(error).rstrip('. ')}{hint}") from error
        if checkpoint is not None:
            _load_weights(model, str(checkpoint))

        _override(model, spec.options)
        setattr(model, BASE_ATTRIBUTE, {"base": spec.text, "revision": revision or ""})
        on_cpu = torch.device(device).type == "cpu"
        half = next((p.dtype for p in model.parameters()), torch.float32) in (torch.float16, torch.bfloat16)
        model.to(device=device, dtype=dtype or (torch.float32 if on_cpu and half else None))
        config = data_config(model)
        transform = timm.data.create_transform(**config, is_training=False)
        return Loaded(
            model=model.eval(),
            adapter=ADAPTER,
            spec=spec.text,
            preprocess=TimmPreprocess(transform, config["input_size"][0]),
            collate=stack,
            label_names=_label_names(model),
            num_classes=getattr(model, "num_classes", None) or None,
        )

    def example(self, model: nn.Module, batch_size: int = 2, seed: int = 0) -> Batch:
        """Synthetic pictures of the size that the model was pretrained with."""
        config = data_config(model)
        images = natural_images(batch_size, config["input_size"], mean=config["mean"], std=config["std"], seed=seed)
        return place(model, Batch((images,)))

    def inputs(self, model: nn.Module, count: int, batch_size: int = 32, seed: int = 0) -> Iterable[Batch]:
        """Synthetic pictures."""
        return Synthetic(lambda size, at: self.example(model, size, at), count, batch_size, seed)

    def reference(self, model: nn.Module) -> dict[str, str]:
        """Library, class, `MODEL` string and revision."""
        config = _pretrained_config(model)
        name = str(config.get("architecture") or "")
        tag = str(config.get("tag") or "")
        found = {"base": f"timm:{name}{'.' + tag if tag else ''}" if name else "", "revision": ""}
        return {"library": "timm", "class": class_path(model), **found, **recorded_base(model)}

    def base_config(self, model: nn.Module) -> dict[str, Any]:
        """As timm writes it into a Hub repository."""
        config = dict(_pretrained_config(model))
        return {
            "architecture": config.get("architecture"),
            "num_classes": getattr(model, "num_classes", None),
            "num_features": getattr(model, "num_features", None),
            "pretrained_cfg": config,
            "model_args": dict(getattr(model, "_model_args", {})),
        }

    def save_base(self, dense: nn.Module, directory: Path) -> None:
        """`config.json` and `model.safetensors`, as timm writes them for the Hub.

        Raises:
            CheckpointError: If timm does not build the same network from them.
        """
        options = parse_spec(recorded_base(dense).get("base") or "timm:unknown").without(*OWN_OPTIONS, *PREPROCESSING)
        try:
            timm.models.save_for_hf(dense, str(directory), model_args=options or None, safe_serialization=True)
            again = timm.create_model(f"local-dir:{directory}", pretrained=True)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            raise CheckpointError(
                f"timm cannot write this {type(dense).__name__} and read it again: {error}"
            ) from error
        if fingerprint(again.to(dtype_of(dense))) != fingerprint(dense):
            raise CheckpointError(
                f"timm reads another {type(dense).__name__} from what it wrote: options of timm.create_model are not known; make "
                "the model with surgery.adapters.load_model('timm:name?option=value')"
            )

    def save_native(self, gated: nn.Module, directory: Path, spec: str | None) -> None:
        """timm has no such form."""
        raise CheckpointError(
            f"native checkpoints are for transformers models, got a {class_path(gated)}; base=True writes a directory that timm "
            "opens as the dense model and surgery.load as the gated one"
        )


ADAPTER: Adapter = TimmAdapter()


def data_config(model: nn.Module) -> dict[str, Any]:
    """`input_size` `(C, H, W)`, `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode` of a timm model."""
    pretrained = dict(_pretrained_config(model))
    config = dict(timm.data.resolve_data_config({}, pretrained_cfg=pretrained or None, model=model))
    channels, rows, columns = config["input_size"]
    # options like in_chans and img_size change the model without changing its pretrained_cfg
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        rows, columns = size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    stem = getattr(model, "in_chans", None) or (first.in_channels if first is not None and first.groups == 1 else None)
    channels = stem if stem in (1, 3, 4) else channels
    config["input_size"] = (channels, rows, columns)
    for key in ("mean", "std"):
        values = tuple(config[key])
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def create_gated(name: str, **options: Any) -> nn.Module:
    """The gated model that timm's own name of a place holds, where `timm.create_model(name)` gives the dense one.

    Args:
        name: `hf-hub:user/name`, `hf-hub:user/name@revision` or `local-dir:path`, as in timm.
        options: As of `surgery.load`.

    Raises:
        UnknownModel: If it is none of these forms.
        CheckpointError, BaseMismatch, HubError: As `surgery.load` does.
    """
    from surgery.checkpoints import load

    form, _, where = name.partition(":")
    if form == "local-dir":
        return load(where, **options)
    if form not in ("hf-hub", "hf_hub") or not where:
        raise UnknownModel(f"{name!r}: expected hf-hub:user/name, hf-hub:user/name@revision or local-dir:path")
    repository, _, revision = where.partition("@")
    return load(repository, revision=revision or None, **options)


def evaluation_transform(model: nn.Module) -> Callable[[Any], Tensor]:
    """timm's evaluation transform for a dense or gated model: a PIL picture -> `(C, H, W)`."""
    transform: Callable[[Any], Tensor] = timm.data.create_transform(**data_config(model), is_training=False)
    return transform


def near_names(name: str, count: int = 5) -> list[str]:
    """Names of timm architectures that look like `name`."""
    names = timm.list_models()
    near = difflib.get_close_matches(name.lower(), names, count, 0.6)
    return near or [known for known in names if name.lower() in known][:count]


def _source(spec: Spec, revision: str | None) -> str:
    """What `timm.create_model` takes as its name, with the revision in it."""
    name = spec.rest
    at = f"@{revision}" if revision else ""
    if (Path(name) / "config.json").is_file():
        return f"local-dir:{name}"
    if spec.prefix != "timm":
        return f"hf-hub:{name}{at}"
    if name.startswith(("hf-hub:", "hf_hub:")):
        return name + at
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = near_names(architecture)
        raise UnknownModel(
            f"{spec.text!r}: timm has no architecture {architecture!r}"
            + did_you_mean([f"timm:{one}" for one in near], "see timm.list_models()")
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UnknownModel(
            f"{spec.text!r}: {architecture} has no pretrained weights {tag!r}; there are: {', '.join(tags) or 'none'}"
        )
    if at:
        config: Any = timm.models.get_pretrained_cfg(name)
        repository = getattr(config, "hf_hub_id", None)
        if not repository:
            raise UnknownModel(f"{spec.text!r}: its weights are not on the Hub, so it has no revision {revision!r}")
        repository = f"timm/{architecture}.{config.tag}" if repository == "timm/" else repository
        return f"hf-hub:{repository}{at}"
    return name


def _load_weights(model: nn.Module, path: str) -> None:
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        timm.models.load_checkpoint(model, path, strict=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit {type(model).__name__}: {error}") from error


def _override(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Write the preprocessing options where timm reads them from."""
    chosen: dict[str, Any] = {key: options[key] for key in PREPROCESSING if key in options}
    channels = data_config(model)["input_size"][0]
    for key in ("mean", "std"):
        if key in chosen:
            values = numbers(chosen[key])
            if len(values) not in (1, channels):
                raise UnknownModel(f"{key} must have 1 or {channels} numbers, got {len(values)}")
            chosen[key] = values * (channels if len(values) == 1 else 1)
    if "input_size" in chosen:
        size = tuple(int(value) for value in numbers(chosen["input_size"]))
        size = (channels, size[0], size[0]) if len(size) == 1 else size
        if len(size) != 3:
            raise UnknownModel(f"input_size must be channels,rows,columns or one number, got {chosen['input_size']!r}")
        chosen["input_size"] = size
    if chosen:
        model.pretrained_cfg = {**_pretrained_config(model), **chosen}  # type: ignore[assignment]


def _pretrained_config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return config if isinstance(config, Mapping) else config.to_dict()


def _label_names(model: nn.Module) -> tuple[str, ...]:
    names: Sequence[str] | None = _pretrained_config(model).get("label_names")
    if names:
        return tuple(names)
    if getattr(model, "num_classes", None) == 1000:
        # image folders of ImageNet and of its subsets are named by synset
        return tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
    return ()
