"""Plain attributes that a traced `forward` read: a graph holds their values, so it is right only as long as they stay."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
_MOST = 64


class Attributes:
    """What some attributes of a module and of its descendants were.

    Args:
        values: Name from the module on (`attn.scale`) -> value.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.names = tuple(values)
        self.values = tuple(_copied(value) for value in values.values())
        self._read = [operator.attrgetter(name) for name in values]

    def are_those_of(self, module: nn.Module) -> bool:
        """Whether the module's are still the same."""
        try:
            for read, then in zip(self._read, self.values, strict=True):
                now = read(module)
                if now is not then and (type(now) is not type(then) or now != then):
                    return False
        except AttributeError:
            return False
        return True


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text, or some few of these."""
    if type(value) in (tuple, list):
        return len(value) <= _MOST and all(map(is_plain, value))
    return type(value) in _PLAIN


def _copied(value: Any) -> Any:
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value
