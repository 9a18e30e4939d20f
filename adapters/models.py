"""`load_model`: from a `MODEL` string to a model and what turns a dataset's rows into its inputs."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery import consent
from surgery.adapters.base import Loaded
from surgery.adapters.registry import get_adapter, table
from surgery.adapters.specs import Spec, near_files, parse_spec
from surgery.errors import UnknownModel, did_you_mean


def load_model(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load the model that a `MODEL` string names.

    - `timm:resnet50`: timm's pretrained weights; `timm:resnet50.a1_in1k` a certain set of them.
    - `timm:resnet50?pretrained=false&num_classes=10`: options go to `timm.create_model`.
    - `timm:mobilenetv2_100?checkpoint=w.safetensors`: the architecture with weights of your own.
    - `timm:resnet50?mean=0.5&std=0.5&crop_pct=1.0`: another preprocessing; also `crop_mode`, `interpolation` and
      `input_size=3,192,192`.
    - `hf:google/vit-base-patch16-224`: a transformers model of the Hub; its config names its class.
    - `hf:bert-base-uncased?class=AutoModelForSequenceClassification&num_labels=3`: another class; options go to the
      config or to `from_pretrained`, `mean`, `std`, `size` to the image processor, `max_length` limits text,
      `pretrained=false` gives random weights.
    - `path/to/directory`: what transformers' `save_pretrained` or timm's `save_for_hf` wrote; the same options.
    - `python:path/to/file.py:function?depth=56`: a network of your own. The function returns it, or
      `(network, preprocess)`, where `preprocess` is called with a picture, a text or an array; options are arguments.
      Without `preprocess`: `mean`, `std`, `size`, `channels` say how pictures become tensors.

    Args:
        spec: The `MODEL` string.
        device: Where the model is put.
        dtype: Of its floating-point parameters. None keeps that of the weights, except that half precision is read as
            float32 on the CPU, where it would be slow.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The model in eval mode, with its preprocessing.

    Raises:
        UnknownModel: If the string names no known model, with near names.
        CheckpointError: If the weights do not fit the architecture.
        MissingDependency: If the library is not installed.
    """
    parsed = parse_spec(spec)
    adapter = get_adapter(_adapter_name(parsed))
    consent.remember(spec)
    loaded = adapter.load(parsed, device=device, dtype=dtype, revision=revision)
    loaded.model.eval()
    return replace(loaded, spec=spec)


def _adapter_name(spec: Spec) -> str:
    if spec.prefix:
        if any(spec.prefix == name or spec.prefix in entry.prefixes for name, entry in table().items()):
            if spec.prefix in ("hf", "huggingface") and directory_layout(Path(spec.rest)) == "timm":
                return "timm"
            return spec.prefix
        known = [prefix for entry in table().values() for prefix in entry.prefixes]
        near = difflib.get_close_matches(spec.prefix, known)
        raise UnknownModel(
            f"{spec.text!r}: unknown prefix {spec.prefix!r}"
            + did_you_mean([f"{one}:{spec.rest}" for one in near], f"known prefixes: {', '.join(known)}")
        )
    layout = directory_layout(Path(spec.rest))
    if layout is not None:
        return layout
    raise UnknownModel(_no_directory(spec))


def directory_layout(path: Path) -> str | None:
    """Which adapter reads a local directory; None if it holds no `config.json`.

    Raises:
        UnknownModel: If its `config.json` is damaged or of no known layout.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnknownModel(f"{file} is not valid JSON: {error}") from error
    if isinstance(config, dict) and "model_type" in config:
        return "huggingface"
    if isinstance(config, dict) and "architecture" in config:
        return "timm"
    raise UnknownModel(
        f"{file} has neither 'model_type' (transformers) nor 'architecture' (timm); "
        f"found: {', '.join(list(config)[:8]) if isinstance(config, dict) else type(config).__name__}"
    )


def _no_directory(spec: Spec) -> str:
    path = Path(spec.rest)
    if path.is_dir():
        files = {file.name for file in path.iterdir()}
        if "surgery_config.json" in files:
            return f"{spec.rest} holds a converted model: `surgery show DIR` lists its sites, surgery.load loads it"
        return f"directory {spec.rest} holds no config.json; found: {', '.join(sorted(files)[:8]) or 'nothing'}"
    tries = [str(one) for one in near_files(path, directories=True)]
    if path.suffix == ".py":
        tries.append(f"python:{spec.rest}:<function>")
    elif spec.rest.count("/") == 1 and not spec.rest.startswith((".", "/")):
        tries.append(f"hf:{spec.rest}")
    elif "/" not in spec.rest:
        tries += [f"timm:{name}" for name in _timm_names(spec.rest)] or [f"hf:{spec.rest}"]
    return (
        f"{spec.text!r} is neither a directory nor prefix:name{did_you_mean(tries, 'examples: timm:resnet50, hf:gpt2')}"
    )


def _timm_names(name: str) -> list[str]:
    try:
        from surgery.adapters.timm import near_names
    except ImportError:  # a hint only: without timm there is none
        return []
    return near_names(name, 3)
