"""Which adapter handles what: one table, entry points for outsiders, nothing imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import cast

from torch import nn

from surgery.adapters.base import Adapter
from surgery.errors import SurgeryError, UnknownModel, near

GROUP = "surgery.adapters"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an adapter is found.

    Args:
        target: `module:attribute`.
        prefixes: Prefixes of the `MODEL` strings that it loads.
        packages: Top-level packages whose classes it handles.
    """

    target: str
    prefixes: tuple[str, ...]
    packages: tuple[str, ...]


BUILT_IN: Mapping[str, Entry] = {
    "timm": Entry("surgery.adapters.timm:ADAPTER", ("timm",), ("timm",)),
    "huggingface": Entry("surgery.adapters.huggingface:ADAPTER", ("hf", "huggingface"), ("transformers",)),
    "plain": Entry("surgery.adapters.plain:ADAPTER", ("python",), ()),
}


@cache
def table() -> Mapping[str, Entry]:
    """Every known adapter: name -> where it is found.

    Raises:
        SurgeryError: If two packages offer an adapter of the same name or prefix.
    """
    found = dict(BUILT_IN)
    owner = {prefix: "bypass-surgery" for entry in found.values() for prefix in entry.prefixes}
    owner |= dict.fromkeys(found, "bypass-surgery")
    for point in entry_points(group=GROUP):
        origin = point.dist.name if point.dist is not None else point.value
        if point.name in owner:
            raise SurgeryError(
                f"adapter {point.name!r} is offered twice: by {owner[point.name]} and by {origin} ({point.value}); "
                "uninstall one of them"
            )
        owner[point.name] = origin
        found[point.name] = Entry(point.value, (point.name,), (point.name,))
    return found


def adapter_names() -> tuple[str, ...]:
    """Names of all adapters, built-in ones first."""
    return tuple(table())


def get_adapter(name: str) -> Adapter:
    """The adapter of that name, or of that prefix of `MODEL` strings.

    Raises:
        UnknownModel: If there is none, with near names.
    """
    entries = table()
    for key, entry in entries.items():
        if name == key or name in entry.prefixes:
            module, _, attribute = entry.target.partition(":")
            return cast(Adapter, getattr(importlib.import_module(module), attribute))
    known = [*entries, *(prefix for entry in entries.values() for prefix in entry.prefixes)]
    raise UnknownModel(f"there is no adapter {name!r}" + near(name, known, "known: " + ", ".join(entries)))


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter for a model: that of the first class in its method resolution order that some adapter handles.

    A network of the user's own gets the `plain` adapter.
    """
    entries = table()
    for cls in type(model).__mro__:
        package = cls.__module__.partition(".")[0]
        for name, entry in entries.items():
            if package in entry.packages:
                return get_adapter(name)
    return get_adapter("plain")
