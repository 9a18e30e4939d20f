"""JSON -> frozen dataclasses, checked field by field against their annotations.

What a checkpoint says was written by somebody else. Nothing is built from it before every value has the type that its
field declares, and an unknown, missing or malformed key is refused by its path, as in `plan.sites[3].site.channels`. A field
that is added to a dataclass is read without a change here; one with a default may be missing, as it is in older files. What
older files hold and no version reads any more is named by the dataclass, in `RETIRED`, and skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from surgery.errors import CheckpointError

T = TypeVar("T")

MOST_BYTES = 64 * 2**20
"""A larger JSON text is no configuration."""
LARGEST_INTEGER = 2**62
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def parse(text: bytes) -> dict[str, Any]:
    """Strict JSON that holds one object.

    Raises:
        CheckpointError: If it is none, holds a key twice, or is larger than any configuration.
    """
    if len(text) > MOST_BYTES:
        raise CheckpointError(f"{len(text)} bytes of JSON, at most {MOST_BYTES} are read")
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, got {_kind(value)}")
    return value


def read(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` names.

    Args:
        hint: A dataclass, a builtin, `Literal`, `Mapping`, `tuple[X, ...]`, `list[X]`, a union of these, or `Any`.
        value: What `json.loads` gave.
        where: Its path, for messages.

    Raises:
        CheckpointError: If it is not of that type, by its path.
    """
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _fields(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is Literal:
        return value if value in arguments and type(value) in map(type, arguments) else _refuse(hint, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is list:
        return [read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_a(list, value, where))]
    if origin is not None and issubclass(origin, Mapping):
        items = _a(dict, value, where).items()
        return {read(arguments[0], k, where): read(arguments[1], item, f"{where}.{k}") for k, item in items}
    if hint is float:
        return _float(value, where)
    if hint is int:
        number = _a(int, value, where)
        return number if abs(number) <= LARGEST_INTEGER else _refuse("a smaller integer", value, where)
    if hint is type(None):
        return value if value is None else _refuse("null", value, where)
    return _a(hint, value, where)


def check_keys(
    value: Mapping[str, Any], known: typing.Collection[str], required: typing.Collection[str], where: str
) -> None:
    """Refuse unknown and missing keys by name.

    Raises:
        CheckpointError: If there are any.
    """
    at = f" in {where}" if where else ""
    unknown, missing = sorted(set(value) - set(known)), sorted(set(required) - set(value))
    if missing:
        raise CheckpointError(f"missing{at}: {', '.join(missing)}")
    if unknown:
        raise CheckpointError(
            f"unknown{at}: {', '.join(unknown[:8])}; a newer version may know them: pip install -U bypass-surgery"
        )


def required_fields(cls: Any) -> list[str]:
    """Names of a dataclass's fields that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    return typing.get_type_hints(cls)


def _fields(cls: Any, value: Any, where: str) -> Any:
    retired = getattr(cls, "RETIRED", ())
    given = {key: item for key, item in _a(dict, value, where).items() if key not in retired}
    check_keys(given, [f.name for f in dataclasses.fields(cls)], required_fields(cls), where)
    types_ = hints(cls)
    return cls(**{name: read(types_[name], item, f"{where}.{name}") for name, item in given.items()})


def _union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    others = [one for one in arguments if one is not type(None)]
    for one in others[:-1]:
        try:
            return read(one, value, where)
        except CheckpointError:
            continue
    return read(others[-1], value, where)


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _a(list, value, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(arguments):
        _refuse(f"{len(arguments)} items", value, where)
    return tuple(read(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(arguments, items, strict=True)))


def _float(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _INFINITIES:  # infinity is no JSON number
        return _INFINITIES[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return typing.cast(float, _refuse("a number", value, where))
    return float(value)


def _a(kind: type[T], value: Any, where: str) -> T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        _refuse(kind, value, where)
    return value


def _refuse(expected: Any, value: Any, where: str) -> typing.NoReturn:
    wanted = expected if isinstance(expected, str) else getattr(expected, "__name__", None) or str(expected)
    if get_origin(expected) is Literal:
        wanted = f"one of {', '.join(map(str, get_args(expected)))}"
    text = repr(value)
    raise CheckpointError(f"{where} must be {wanted}, got {text if len(text) <= 60 else text[:57] + '...'}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a key stands twice: {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: Any) -> str:
    return {"list": "an array", "str": "a text", "NoneType": "null"}.get(type(value).__name__, "a number")
