"""Saving what a conversion added, and putting it back: `surgery_config.json` and `surgery.safetensors` in a directory.

The base model's weights are not in it; its name, revision and the hash of its weights are. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery.context import state_of
from surgery.directories import written_directory
from surgery.errors import BaseMismatch, CheckpointError, UnknownModel
from surgery.fingerprints import fingerprint, float_dtypes
from surgery.gates import Gate, iter_gates
from surgery.rewriting import check_convertible, insert_gates
from surgery.sites import Plan
from surgery.state import BudgetPoint, CostModel, GatedState, SiteCost

CONFIG = "surgery_config.json"
TENSORS = "surgery.safetensors"
FORMAT_VERSION = 1
LIBRARIES = ("bypass-surgery", "torch", "timm", "transformers")
GATE_NUMBERS = ("offset",)
"""What a gate knows beside its tensors."""
_OWN_FORM = ("plan", "costs", "base", "table", "threshold")
"""Fields of the state that are not written down as they are."""


def save(gated: nn.Module, directory: str | Path, *, overwrite: bool = False, base: str | None = None) -> None:
    """Write routers, skip paths, plan, costs, budgets and the reference to the base model.

    Args:
        gated: A gated model.
        directory: Where to. It appears in full or not at all.
        overwrite: Replace an older checkpoint there.
        base: `MODEL` string from which `load` builds the base, such as `timm:resnet50`; found out where possible.

    Raises:
        NotConverted: If the model has no gates.
        OutputExists: If the directory exists and may not be replaced.
        CheckpointError: If the file system refuses, or gates have no values.
    """
    state = state_of(gated)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in gate_tensors(gated).items()}
    empty = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if empty:
        raise CheckpointError(
            f"{empty[0]} and {len(empty) - 1} others are on the meta device and have no values to save"
        )
    config = _encode(gated, state, _reference(gated, state, base))
    text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    with written_directory(directory, marker=CONFIG, overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        try:
            save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"cannot write {Path(directory) / TENSORS}: {error}; nothing was written") from error


def load(
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    allow_other_base: bool = False,
) -> nn.Module:
    """Build the gated model that `save` wrote.

    Args:
        directory: What `save` wrote.
        model: The dense base model; it is not changed. None builds it from the reference in the checkpoint. On the meta
            device its weights are not compared.
        device: Where the gated model is put; None leaves it where the base is.
        allow_other_base: Accept a base of another class or with other weights than the checkpoint was made from.

    Returns:
        A module of the base's class; outputs and decisions are those of the saved one, bit for bit.

    Raises:
        CheckpointError: If the directory is missing, damaged, of a newer format, or its tensors do not fit.
        BaseMismatch: If the base is another one.
        PlanMismatch: If the gates' places are not found in the base.
    """
    place = Path(directory).expanduser()
    config, tensors = read_config(place), _read_tensors(place)
    try:
        plan, base = Plan.from_dict(config["plan"]), dict(config["base"])
        changes = _decode(config)
        numbers = {name: {key: float(value[key]) for key in GATE_NUMBERS} for name, value in config["gates"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(place / CONFIG, repr(error)) from error
    if model is None:
        model = _build_base(place, base, device)
    check_convertible(model)
    _check_base(place, base, model, allow_other_base)
    gated = insert_gates(model, plan)
    _fill(place, gated, tensors, numbers)
    state = state_of(gated)
    for name, value in changes.items():
        setattr(state, name, value)
    state.base = {**base, **state.base}
    return gated if device is None else gated.to(device)


def gate_tensors(gated: nn.Module) -> dict[str, Tensor]:
    """Routers' and skip paths' tensors under their names in the state dict; a gate with two names is listed once."""
    return {
        f"{name}.{key}": tensor
        for name, module in gated.named_modules()
        if isinstance(module, Gate)
        for key, tensor in module.state_dict().items()
    }


def read_config(directory: str | Path) -> dict[str, Any]:
    """The content of `surgery_config.json`, checked for its format version only.

    Raises:
        CheckpointError: If it is missing, damaged or of a newer format.
    """
    place = Path(directory).expanduser()
    try:
        text = (place / CONFIG).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = f"holds no {CONFIG}" if place.is_dir() else "is no directory"
        raise CheckpointError(f"{directory} {what}; expected a directory that surgery.save wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(place / CONFIG, str(error)) from error
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _damaged(place / CONFIG, str(error)) from error
    found = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(found, int):
        raise _damaged(place / CONFIG, f"format_version is {found!r}")
    if found > FORMAT_VERSION:
        raise CheckpointError(
            f"{place / CONFIG} has format version {found}, this version of bypass-surgery reads up to {FORMAT_VERSION}: "
            "pip install -U bypass-surgery"
        )
    return config


# -- writing ----------------------------------------------------------------------------------------------------------


def _reference(gated: nn.Module, state: GatedState, spec: str | None) -> dict[str, Any]:
    """What the gated model was made from."""
    from surgery.adapters.registry import adapter_for

    found: dict[str, Any] = dict(adapter_for(gated).reference(gated))
    found["spec"] = found.pop("base", "")
    known = {key: value for key, value in state.base.items() if key != "trainable"}  # belongs to the model in memory
    given = {} if spec is None else {"spec": spec}
    weights = {"dtypes": float_dtypes(gated), "sha256": fingerprint(gated)}
    return {**found, **known, **given, **weights, "class": _class_path(gated)}


def _encode(gated: nn.Module, state: GatedState, base: dict[str, Any]) -> dict[str, Any]:
    plain = {field.name: getattr(state, field.name) for field in fields(state) if field.name not in _OWN_FORM}
    return {
        "format_version": FORMAT_VERSION,
        "versions": _versions(),
        "base": _strict(base),
        "plan": _strict(state.plan.to_dict()),
        "costs": _strict(asdict(state.costs)),
        "threshold": _number(state.threshold),
        "table": [_strict(asdict(point)) | {"threshold": _number(point.threshold)} for point in state.table],
        "gates": {name: {key: _number(getattr(gate, key)) for key in GATE_NUMBERS} for name, gate in iter_gates(gated)},
        **_strict(plain),
    }


def _number(value: float) -> float | str:
    """Infinity is no JSON number: it becomes text that `float` reads back."""
    return float(value) if math.isfinite(value) else str(float(value))


def _strict(value: Any) -> Any:
    """What strict JSON can hold: numbers that are not finite become null, what is no JSON value becomes text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_strict(item) for item in value]
    return str(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# -- reading ----------------------------------------------------------------------------------------------------------


def _decode(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the state's fields."""
    costs = config["costs"]
    sites = {name: SiteCost(**cost) for name, cost in costs["sites"].items()}
    table = [
        BudgetPoint(**{**point, "threshold": float(point["threshold"]), "static": tuple(point["static"])})
        for point in config["table"]
    ]
    plain = {f.name: config[f.name] for f in fields(GatedState) if f.name not in _OWN_FORM and f.name in config}
    return {
        **plain,
        "costs": CostModel(costs["unit"], float(costs["dense"]), sites),
        "table": table,
        "threshold": float(config["threshold"]),
    }


def _read_tensors(place: Path) -> dict[str, Tensor]:
    file = place / TENSORS
    if not file.is_file():
        raise CheckpointError(f"{place} holds no {TENSORS}; expected a directory that surgery.save wrote")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error


def _build_base(place: Path, base: Mapping[str, Any], device: torch.device | str | None) -> nn.Module:
    from surgery.adapters.models import load_model

    spec = base.get("spec")
    if not spec:
        raise CheckpointError(
            f"{place} was made from a {base.get('class')} of your own that no MODEL string names; "
            "pass it: surgery.load(directory, model=…)"
        )
    dtypes = base.get("dtypes") or []
    dtype = getattr(torch, dtypes[0]) if len(dtypes) == 1 else None
    try:
        return load_model(spec, device=device or "cpu", dtype=dtype, revision=base.get("revision") or None).model
    except UnknownModel as error:
        raise CheckpointError(
            f"{place}: its base {spec!r} cannot be built: {error}; pass it: surgery.load(directory, model=…)"
        ) from error


def _check_base(place: Path, base: Mapping[str, Any], model: nn.Module, allow_other: bool) -> None:
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


def _fill(
    place: Path, gated: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Mapping[str, float]]
) -> None:
    """Give the gates their values, in the dtypes in which they were saved."""
    expected = gate_tensors(gated)
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    gates = {name: module for name, module in gated.named_modules() if isinstance(module, Gate)}
    missing += sorted(f"numbers of {gate.site.name}" for gate in gates.values() if gate.site.name not in numbers)
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        found = "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)
        raise CheckpointError(f"{place / TENSORS} does not fit its plan: {found}; save the model again")
    for name, gate in gates.items():
        own = {key: tensors[f"{name}.{key}"] for key in gate.state_dict()}
        devices = {key: value.device for key, value in gate.state_dict().items()}
        placed = {k: v if devices[k].type == "meta" else v.to(devices[k]) for k, v in own.items()}
        gate.load_state_dict(placed, assign=True)
        for key, value in numbers[gate.site.name].items():
            setattr(gate, key, value)


def _listed(names: Iterable[str], most: int = 20) -> str:
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def _damaged(file: Path, detail: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({detail}); copy or save it again")


def _class_path(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
