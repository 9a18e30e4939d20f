"""The content of `surgery_config.json`: written from a gated model's state, read with every value checked.

Every field of `GatedState` that is not `IN_MEMORY` alone is a key of its own name, so what is added there is saved and
read without a change here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgery import decoding
from surgery.errors import CheckpointError, PlanMismatch
from surgery.sites import Plan
from surgery.state import IN_MEMORY, GatedState
from surgery.vetting import damaged, vet, vet_healing

CONFIG = "surgery_config.json"
NATIVE_CONFIG = "config.json"
TENSORS = "surgery.safetensors"
METHOD = "surgery"
"""`quant_method` of the `quantization_config` in a transformers checkpoint with gates."""
FORMAT_VERSION = 1
LIBRARIES = ("bypass-surgery", "torch", "timm", "transformers")
DTYPES = ("float64", "float32", "float16", "bfloat16")

_OWN_KEYS: Mapping[str, Any] = {
    "format_version": int,
    "versions": dict[str, str],
    "tensors_sha256": str | None,
    "architecture": dict[str, Any],
    "gates": dict[str, dict[str, float]],
}
_REQUIRED = ("format_version", "base", "plan", "costs", "table", "threshold", "gates")
_BASE_KEYS: Mapping[str, Any] = {
    "library": str,
    "class": str,
    "spec": str,
    "revision": str,
    "sha256": str | None,
    "dtypes": list[str],
    "included": bool,
}


@dataclass(frozen=True, slots=True)
class Recorded:
    """A configuration whose every value was checked.

    Args:
        plan: What gates there are.
        base: What the model was made from.
        numbers: What gates know beside their tensors, by site.
        values: The state's fields but the plan and the base.
        tensors_sha256: Of the file of tensors, where there is one.
    """

    plan: Plan
    base: dict[str, Any]
    numbers: dict[str, dict[str, float]]
    values: dict[str, Any]
    tensors_sha256: str | None


def encode(state: GatedState, base: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """JSON-ready form of everything that is not a tensor."""
    values = {
        field.name: getattr(state, field.name) for field in fields(state) if field.name not in ("base", *IN_MEMORY)
    }
    content = {"format_version": FORMAT_VERSION, "versions": versions(), **own, "base": base, **values}
    return {key: plain(value) for key, value in content.items()}


def decode(config: Mapping[str, Any]) -> Recorded:
    """Inverse of `encode`.

    Raises:
        CheckpointError: If a key is unknown or missing, or a value is none that `encode` gives.
    """
    hints = {**decoding.hints(GatedState), **_OWN_KEYS}
    for name in IN_MEMORY:
        del hints[name]
    check_version(config)
    decoding.check_keys(config, hints, _REQUIRED, "")
    version = config["plan"].get("format_version") if isinstance(config["plan"], dict) else None
    if isinstance(version, int) and not isinstance(version, bool):
        Plan.check_version(version)
    try:
        found = {key: decoding.read(hints[key], value, key) for key, value in config.items()}
    except PlanMismatch as error:
        raise CheckpointError(str(error)) from error
    vet(found["plan"])
    vet_healing(found.get("healing"))
    _check_base(found["base"])
    _check_numbers(found)
    rest = {field.name: found[field.name] for field in fields(GatedState) if field.name in found}
    plan, base = rest.pop("plan"), rest.pop("base")
    return Recorded(plan, base, found["gates"], rest, found.get("tensors_sha256"))


def read_config(directory: str | Path) -> dict[str, Any]:
    """The content of `surgery_config.json`, or of the `quantization_config` of a transformers checkpoint with gates.

    Checked for its format version only.

    Raises:
        CheckpointError: If it is missing, damaged or of a newer format.
    """
    place = Path(directory).expanduser()
    file = place / CONFIG
    try:
        if not file.is_file() and (native := native_config(place)) is not None:
            file, config = place / NATIVE_CONFIG, native
        else:
            size = file.stat().st_size
            if size > decoding.MOST_BYTES:
                raise CheckpointError(f"{file} has {size} bytes, at most {decoding.MOST_BYTES} are read")
            config = decoding.parse(file.read_bytes())
        check_version(config)
    except (FileNotFoundError, NotADirectoryError):
        what = f"holds no {CONFIG}" if place.is_dir() else "is no directory"
        raise CheckpointError(f"{directory} {what}; expected a directory that surgery.save wrote") from None
    except OSError as error:
        raise damaged(file, str(error)) from error
    except NewerFormat as error:
        raise CheckpointError(f"{file} has {error}") from error
    except CheckpointError as error:
        raise damaged(file, str(error)) from error
    return config


def native_config(directory: Path) -> dict[str, Any] | None:
    """The part of a transformers checkpoint's `config.json` that is ours, or None where it has none.

    Raises:
        CheckpointError: If `config.json` is damaged.
    """
    file = directory / NATIVE_CONFIG
    if not file.is_file() or file.stat().st_size > decoding.MOST_BYTES:
        return None
    found = decoding.parse(file.read_bytes()).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return None
    return {key: value for key, value in found.items() if key != "quant_method"}


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory holds a converted model."""
    place = Path(directory).expanduser()
    if (place / CONFIG).is_file():
        return True
    try:
        return native_config(place) is not None
    except CheckpointError:
        return False


class NewerFormat(CheckpointError):
    """A checkpoint of a later version of this package."""


def check_version(config: Mapping[str, Any]) -> None:
    """Refuse a newer format before anything else is read, since it may hold anything.

    Raises:
        NewerFormat: If it is newer.
        CheckpointError: If it has no version.
    """
    found = config.get("format_version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"format_version is {str(found)[:60]!r}")
    if found > FORMAT_VERSION:
        raise NewerFormat(
            f"format version {found}, this version of bypass-surgery reads up to {FORMAT_VERSION}: "
            "pip install -U bypass-surgery"
        )


def _check_base(base: Mapping[str, Any]) -> None:
    decoding.check_keys(base, _BASE_KEYS, (), "base")
    for key, value in base.items():
        decoding.read(_BASE_KEYS[key], value, f"base.{key}")
    unknown = [one for one in base.get("dtypes", ()) if one not in DTYPES]
    if unknown:
        raise CheckpointError(f"base.dtypes holds {unknown[0]!r}, expected some of {', '.join(DTYPES)}")
    sha256 = base.get("sha256")
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise CheckpointError(f"base.sha256 must be 64 hexadecimal digits, got {sha256[:80]!r}")


def _check_numbers(found: Mapping[str, Any]) -> None:
    """What belongs to a site belongs to a site of the plan; costs and budgets are possible ones."""
    names = set(found["plan"].units)  # gates go by sites, all else by what is decided
    decoding.check_keys(found["gates"], sites := set(found["plan"].names), sites, "gates")
    owners = {"costs.sites": found["costs"].sites}
    subsets: dict[str, Any] = {"static": found.get("static", ())}
    for index, point in enumerate(found["table"]):
        owners[f"table[{index}].active_rate"], subsets[f"table[{index}].static"] = point.active_rate, point.static
    for where, values in owners.items():
        decoding.check_keys(values, names, names, where)
    for where, some in subsets.items():
        decoding.check_keys(dict.fromkeys(some), names, (), where)
    if found["costs"].unit not in ("flops", "seconds") or not 0 < found["costs"].dense < math.inf:
        raise CheckpointError("costs must be in flops or seconds, with a positive total of the dense model")
    if found.get("budget") is not None and not 0 < found["budget"] <= 1:
        raise CheckpointError(f"budget must be in (0, 1], got {found['budget']}")
    if found.get("policy", "routed") not in ("routed", "static"):
        raise CheckpointError(f"policy must be routed or static, got {found['policy'][:60]!r}")


def plain(value: Any) -> Any:
    """What strict JSON can hold: infinities become text that is read back, NaN null, what is no JSON value text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)


def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
