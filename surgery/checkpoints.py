"""Saving what a conversion added, and putting it back: `surgery_config.json` and `surgery.safetensors` in a directory.

The base model's weights are not in it unless asked for; its name, revision and the hash of its weights are. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery import consent
from surgery.configs import (
    CONFIG,
    NATIVE_CONFIG,
    TENSORS,
    Recorded,
    decode,
    encode,
    is_checkpoint,
    native_config,
    plain,
    read_config,
)
from surgery.context import state_of
from surgery.directories import written_directory
from surgery.errors import BaseMismatch, CheckpointError, PlanMismatch, SurgeryError, UnknownModel
from surgery.fingerprints import fingerprint, float_dtypes
from surgery.gates import iter_gates
from surgery.healing import install, stored
from surgery.repositories import cached, is_repository
from surgery.rewriting import check_convertible, insert_gates, remove
from surgery.routers import Scorer
from surgery.state import GatedState
from surgery.tracing import GATES
from surgery.vetting import damaged, expected_tensors, refuse_misfit, vet_tensors

GATE_NUMBERS = ("offset",)
"""What a gate knows beside its tensors."""


def save(
    gated: nn.Module,
    directory: str | Path,
    *,
    base: bool = False,
    native: bool = False,
    overwrite: bool = False,
    spec: str | None = None,
) -> None:
    """Write routers, skip paths, plan, costs, budgets and the reference to the base model.

    Args:
        gated: A gated model.
        directory: Where to. It appears in full or not at all.
        base: Also write the dense model as its ecosystem does, so that timm or transformers opens the directory as the
            dense model and `load` needs nothing else.
        native: For transformers: write one checkpoint with the gates inside, which `from_pretrained` opens as the
            gated model after `import surgery.adapters.huggingface`.
        overwrite: Replace an older checkpoint there.
        spec: `MODEL` string from which `load` builds the base, such as `timm:resnet50`; found out where possible.

    Raises:
        NotConverted: If the model has no gates.
        OutputExists: If the directory exists and may not be replaced.
        CheckpointError: If the file system refuses, values are missing, or the ecosystem has no layout for the model.
    """
    if not isinstance(base, bool):
        raise SurgeryError(f"base must be True or False, got {base!r}; a MODEL string is given as spec=…")
    if base and native:
        raise SurgeryError("a native checkpoint holds the base already; give base=True or native=True, not both")
    with written_directory(directory, marker=is_checkpoint, overwrite=overwrite) as temporary:
        write(gated, temporary, base=base, native=native, spec=spec)


def write(gated: nn.Module, place: Path, *, base: bool = False, native: bool = False, spec: str | None = None) -> None:
    """What `save` does, into an empty directory that is already there.

    Raises:
        NotConverted, CheckpointError: As `save` does.
    """
    from surgery.adapters.registry import adapter_for

    state = state_of(gated)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own_tensors(gated).items()}
    empty = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if empty:
        raise CheckpointError(
            f"{empty[0]} and {len(empty) - 1} others are on the meta device and have no values to save"
        )
    if native:
        adapter_for(gated).save_native(gated, place, spec)
        return
    if base:
        adapter_for(gated).save_base(remove(gated), place)
    try:
        save_file(tensors, place / TENSORS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {TENSORS}: {error}; nothing was written") from error
    config = config_of(gated, state, spec, included=base, tensors_sha256=_sha256(place / TENSORS))
    (place / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@torch.inference_mode(False)
def load(
    source: str | Path,
    *,
    revision: str | None = None,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    allow_other_base: bool = False,
    trust_code: bool = False,
    token: str | bool | None = None,
) -> nn.Module:
    """Build the gated model that `save` or `push_to_hub` wrote.

    Args:
        source: A directory, or a repository on the Hub such as `me/resnet50-c60`.
        revision: Branch, tag or commit of that repository.
        model: The dense base model; it is not changed. None builds it from the reference in the checkpoint. On the meta
            device its weights are not compared.
        device: Where the gated model is put; None leaves it where the base is.
        dtype: Of the gated model's floating-point parameters; routers stay float32. None keeps that of the base.
        device_map: For transformers: weights go straight to these devices, one tensor at a time, as in `from_pretrained`.
            What is offloaded to disk is not compared with the base's hash.
        allow_other_base: Accept a base of another class or with other weights than the checkpoint was made from.
        trust_code: Build a base that is code (`python:…`) although you never ran it.
        token: For private repositories; None takes the one that `hf auth login` stored.

    Returns:
        A module of the base's class; outputs and decisions are those of the saved one, bit for bit.

    Raises:
        CheckpointError: If the source is missing, damaged, of a newer format, or its tensors do not fit.
        BaseMismatch: If the base is another one.
        PlanMismatch: If the gates' places are not found in the base.
        HubError: If a repository cannot be read.
    """
    place = directory_of(source, revision=revision, token=token)
    config = read_config(place)
    if native_config_is_used(place):
        gated = _load_native(place, config, model, dtype, device_map)
        return gated if device is None else gated.to(device)
    recorded = _read(place, config)
    if model is None:
        spec = base_spec(place, recorded.base, trust_code=trust_code)
        if device_map is not None:
            return _load_streamed(place, recorded, config, spec, dtype, device_map, allow_other_base)
        model = _build_base(place, recorded.base, spec, device)
    elif device_map is not None:
        raise SurgeryError("device_map says where a model is loaded to, and model= is loaded already; give one of them")
    check_convertible(model)
    check_base(place, recorded.base, model, allow_other_base)
    gated = _insert(place, model, recorded)
    if recorded.values.get("healing") is not None:
        install(gated, recorded.values["healing"])
    _fill(place, gated, load_file(place / TENSORS))
    restore(gated, recorded)
    _cast(gated, dtype)
    return gated if device is None else gated.to(device)


def keep_report(gated: nn.Module, directory: str | Path) -> None:
    """Write what `measure` found about a gated model into the checkpoint that it was loaded from; nothing else changes.

    Raises:
        CheckpointError: If the directory is no checkpoint, or cannot be written.
    """
    place = Path(directory).expanduser()
    check_files(place)
    file = place / (CONFIG if (place / CONFIG).is_file() else NATIVE_CONFIG)
    content = json.loads(file.read_text(encoding="utf-8"))
    ours = content if file.name == CONFIG else content["quantization_config"]
    ours["report"] = {**ours.get("report", {}), **plain(state_of(gated).report)}
    temporary = file.with_name(f".{file.name}.new")
    try:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}; it is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


def own_tensors(gated: nn.Module) -> dict[str, Tensor]:
    """What hangs under a `surgery_gates`, under its name in the state dict; a gate with two names is listed once."""
    return {
        f"{name}.{key}": tensor
        for name, module in gated.named_modules()
        if name.rpartition(".")[2] == GATES
        for key, tensor in module.state_dict().items()
    }


def config_of(gated: nn.Module, state: GatedState, spec: str | None, **own: Any) -> dict[str, Any]:
    """The content of `surgery_config.json`.

    Args:
        gated: A gated model.
        state: Its state.
        spec: `MODEL` string of the base, where the caller knows better.
        own: `included`: whether the base's weights lie beside it; `tensors_sha256`: hash of the tensors' file.
    """
    from surgery.adapters.registry import adapter_for

    adapter = adapter_for(gated)
    found: dict[str, Any] = dict(adapter.reference(gated))
    found["spec"] = found.pop("base", "")
    given = {} if spec is None else {"spec": spec}
    weights = {"dtypes": float_dtypes(gated), "sha256": fingerprint(gated), "included": own.pop("included", False)}
    base = {**found, **state.base, **given, **weights, "class": _class_path(gated)}
    numbers = {name: {key: float(getattr(gate, key)) for key in GATE_NUMBERS} for name, gate in iter_gates(gated)}
    return encode(state, base, architecture=adapter.base_config(gated), gates=numbers, **own)


def base_spec(place: Path, base: Mapping[str, Any], *, trust_code: bool = False) -> str:
    """The `MODEL` string of a checkpoint's base: the directory itself where the base lies in it.

    Raises:
        CheckpointError: If it names none, or one that runs code which this user never ran.
    """
    if base.get("included"):
        return str(place)
    spec = str(base.get("spec") or "")
    if not spec:
        raise CheckpointError(
            f"{place} was made from a {base.get('class')} of your own that no MODEL string names; "
            "pass it: surgery.load(directory, model=…)"
        )
    consent.check(spec, place, trust_code=trust_code)
    return spec


def check_base(place: Path, base: Mapping[str, Any], model: nn.Module, allow_other: bool = False) -> None:
    """Compare a model's class and weights with those that a checkpoint was made from.

    Raises:
        BaseMismatch: If they differ, with both hashes.
    """
    if allow_other:
        return
    name, expected = _class_path(model), str(base.get("class"))
    if name.rpartition(".")[2] != expected.rpartition(".")[2]:  # modules move between versions, classes seldom
        raise BaseMismatch(
            f"{place} was made from a {expected}, got a {name}; give that model, or allow_other_base=True if you know "
            "that the gates fit"
        )
    mine, theirs = fingerprint(model), base.get("sha256")
    if mine is None or theirs is None or mine == theirs:
        return
    dtypes = float_dtypes(model)
    hint = (
        f"; the weights here are {', '.join(dtypes)}, those were {', '.join(base.get('dtypes', []))}: try model.to(dtype)"
        if dtypes != base.get("dtypes")
        else ""
    )
    raise BaseMismatch(
        f"the base weights are not those that {place} was made from: sha256 {mine} here, {theirs} there{hint}; "
        f"give the weights of {base.get('spec') or expected}, or allow_other_base=True to use the gates with these"
    )


def restore(gated: nn.Module, recorded: Recorded) -> None:
    """Give a model with gates the state that was saved: costs, budgets, threshold, and the gates' numbers."""
    state = state_of(gated)
    for name, value in recorded.values.items():
        setattr(state, name, value)
    state.base = {**recorded.base, **state.base}
    for name, gate in iter_gates(gated):
        for key, value in recorded.numbers[name].items():
            setattr(gate, key, value)


def directory_of(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local directory of a checkpoint; a repository on the Hub is fetched into its cache.

    Raises:
        CheckpointError: If `source` is neither.
        HubError: If the repository cannot be read.
    """
    place = Path(source).expanduser()
    if place.exists():
        return place
    if isinstance(source, str) and is_repository(source):
        return cached(source, revision=revision, token=token)
    return place


def check_files(place: Path) -> None:
    """Check a directory as `load` does; nothing is built.

    Raises:
        CheckpointError: By the name of what is wrong.
    """
    config = read_config(place)
    if native_config_is_used(place):
        _decode(place / NATIVE_CONFIG, config)
    else:
        _read(place, config)


def native_config_is_used(place: Path) -> bool:
    """Whether a directory is a transformers checkpoint with gates inside."""
    return not (place / CONFIG).is_file() and native_config(place) is not None


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(place: Path, config: Mapping[str, Any]) -> Recorded:
    """Check everything that is in the two files; nothing is built."""
    recorded = _decode(place / CONFIG, config)
    file = place / TENSORS
    if not file.is_file():
        raise CheckpointError(f"{place} holds no {TENSORS}; expected a directory that surgery.save wrote")
    vet_tensors(file, {**expected_tensors(recorded.plan), **stored(recorded.values.get("healing"))})
    if recorded.tensors_sha256 is not None and (found := _sha256(file)) != recorded.tensors_sha256:
        raise damaged(file, f"sha256 {found}, {CONFIG} says {recorded.tensors_sha256}")
    return recorded


def _decode(file: Path, config: Mapping[str, Any]) -> Recorded:
    try:
        return decode(config)
    except CheckpointError as error:
        raise damaged(file, str(error)) from error


def _build_base(place: Path, base: Mapping[str, Any], spec: str, device: torch.device | str | None) -> nn.Module:
    from surgery.adapters.models import load_model

    dtypes = base.get("dtypes") or []
    dtype = getattr(torch, dtypes[0]) if len(dtypes) == 1 else None
    revision = None if base.get("included") else base.get("revision") or None
    try:
        return load_model(spec, device=device or "cpu", dtype=dtype, revision=revision).model
    except UnknownModel as error:
        raise unbuilt(place, base, spec, error) from error


def unbuilt(place: Path, base: Mapping[str, Any], spec: str, error: UnknownModel) -> CheckpointError:
    """What to say where the base that a checkpoint names cannot be built.

    A timm model says which weights its architecture has by default, not whether it was made with them.
    """
    why = str(error.__cause__ or error).rstrip(". ")
    give = "the model itself: surgery.load(directory, model=…), or --model on the command line"
    if base.get("library") != "timm" or "?" in spec:
        return CheckpointError(f"{place}: its base {spec!r} cannot be built: {why}; pass {give}")
    architecture = spec.partition(":")[2].partition(".")[0]
    return CheckpointError(
        f"{place} was made from the architecture {architecture} of timm; if its weights were timm's own ({spec}), they cannot be "
        f"loaded now: {why}; if they were others, pass {give}"
    )


def _load_native(
    place: Path, config: Mapping[str, Any], model: nn.Module | None, dtype: Any, device_map: Any
) -> nn.Module:
    if model is not None:
        raise SurgeryError(f"{place} holds its base; load it without model=")
    from surgery.adapters import huggingface_native

    _decode(place / NATIVE_CONFIG, config)
    return huggingface_native.load_native(place, dtype=dtype, device_map=device_map)


def _load_streamed(
    place: Path,
    recorded: Recorded,
    config: Mapping[str, Any],
    spec: str,
    dtype: torch.dtype | None,
    device_map: Any,
    allow_other: bool,
) -> nn.Module:
    if recorded.base.get("library") != "transformers":
        raise SurgeryError(
            f"device_map is for transformers models, and {place} was made from a {recorded.base.get('class')}"
        )
    from surgery.adapters import huggingface_native

    gated = huggingface_native.load_streamed(
        spec,
        config,
        place / TENSORS,
        revision=recorded.base.get("revision") or None,
        dtype=dtype,
        device_map=device_map,
    )
    if dtype is None or [str(dtype).removeprefix("torch.")] == recorded.base.get("dtypes"):
        check_base(place, recorded.base, gated, allow_other)
    return gated


def _insert(place: Path, model: nn.Module, recorded: Recorded) -> nn.Module:
    try:
        return insert_gates(model, recorded.plan)
    except SurgeryError:
        raise
    except Exception as error:  # a plan from elsewhere can be wrong in ways that only tracing finds
        raise PlanMismatch(
            f"{place}: the gates cannot be put into this {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error


def _fill(place: Path, gated: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the gates their values, in the dtypes in which they were saved."""
    expected = own_tensors(gated)
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    refuse_misfit(place / TENSORS, set(expected) - set(tensors), set(tensors) - set(expected), wrong)
    for name, module in gated.named_modules():
        if name.rpartition(".")[2] != GATES:
            continue
        devices = {key: value.device for key, value in module.state_dict().items()}
        own = {key: tensors[f"{name}.{key}"] for key in devices}
        placed = {k: v if devices[k].type == "meta" else v.to(devices[k]) for k, v in own.items()}
        module.load_state_dict(placed, assign=True)


def _cast(gated: nn.Module, dtype: torch.dtype | None) -> None:
    """Give saved tensors another dtype, as `from_pretrained` does: rotary frequencies and the like are not saved."""
    routers = {id(t) for m in gated.modules() if isinstance(m, Scorer) for t in (*m.parameters(), *m.buffers())}
    for tensor in gated.state_dict(keep_vars=True).values():
        if dtype is not None and tensor.is_floating_point() and id(tensor) not in routers:
            tensor.data = tensor.data.to(dtype)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _class_path(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
