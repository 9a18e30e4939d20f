"""`MODEL` strings: `prefix:rest?option=value&option=value`, or the path of a local directory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from surgery.errors import UnknownModel


@dataclass(frozen=True, slots=True)
class Spec:
    """A `MODEL` string, taken apart.

    Args:
        text: As it was given.
        prefix: What stands before the first colon, "" for a local directory.
        rest: What stands between the prefix and the question mark.
        options: What follows the question mark, values read as Python values.
    """

    text: str
    prefix: str
    rest: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def without(self, *names: str) -> dict[str, Any]:
        """The options but those named."""
        return {name: value for name, value in self.options.items() if name not in names}


def parse_spec(text: str) -> Spec:
    """Take a `MODEL` string apart.

    Values after the question mark are read as numbers, `true`, `false`, `none`, comma-separated lists of these, or else
    text: `mean=0.5`, `mean=0.485,0.456,0.406`, `pad_type=same`.

    Raises:
        UnknownModel: If it is empty or its options are malformed.

    Example:
        >>> spec = parse_spec("timm:mobilenetv2_100?pad_type=same&mean=0.5&pretrained=false")
        >>> spec.prefix, spec.rest, spec.options
        ('timm', 'mobilenetv2_100', {'pad_type': 'same', 'mean': 0.5, 'pretrained': False})
    """
    body, mark, query = text.partition("?")
    prefix, colon, rest = body.partition(":")
    if not colon or len(prefix) == 1:  # one letter is a drive, as in C:\models
        prefix, rest = "", body
    if not rest.strip():
        raise UnknownModel(f"{text!r} names no model; examples: timm:resnet50, hf:bert-base-uncased, a directory")
    if not mark:
        return Spec(text, prefix, rest)
    options = {}
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise UnknownModel(f"{text!r}: options must read name=value&name=value, got {part!r}")
        options[name] = _value(unquote(value))
    return Spec(text, prefix, rest, options)


def with_option(text: str, option: str) -> str:
    """A `MODEL` string with one more option."""
    return f"{text}{'&' if '?' in text else '?'}{option}"


def numbers(value: Any) -> tuple[float, ...]:
    """An option that is one number or several, as several.

    Raises:
        UnknownModel: If it is neither.
    """
    values = value if isinstance(value, (list, tuple)) else (value,)
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise UnknownModel(f"expected a number or comma-separated numbers, got {value!r}")
    return tuple(float(v) for v in values)


def near_files(path: Path, *, directories: bool = False) -> list[Path]:
    """What lies beside `path` and is named like it."""
    if not path.parent.is_dir():
        return []
    beside = {one.name: one for one in path.parent.iterdir() if one.is_dir() or not directories}
    return [beside[name] for name in difflib.get_close_matches(path.name, beside, cutoff=0.5)]


def _value(text: str) -> Any:
    if "," in text:
        return [_value(part) for part in text.split(",") if part]
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
