"""What a traced `forward` may read but not change: containers, tensors and objects that hang on a module.

A stand-in for a module must share nothing with it that can be written: a proxy that is left in a dict or a list of the
original breaks it for good. So containers are copied, and the copies refuse every change; small tensors are copied; other
objects are put back as they were.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, defaultdict, deque
from typing import Any

from torch import Tensor

from surgery.errors import TraceError

_CHANGE_NAMES = (
    "__setitem__ __delitem__ __iadd__ __imul__ __iand__ __ior__ __isub__ __ixor__ append appendleft extend extendleft insert "
    "pop popleft popitem remove reverse rotate sort clear update setdefault add discard move_to_end difference_update "
    "intersection_update symmetric_difference_update subtract"
)
_CHANGES = frozenset(_CHANGE_NAMES.split())
_KINDS: tuple[type, ...] = (OrderedDict, dict, list, set, deque)
_SMALL = 2**16
_SHARED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


class Guard:
    """Copies of what one or more modules hold, for one trace."""

    def __init__(self) -> None:
        self.copies: dict[int, Any] = {}
        self.tensors: list[tuple[Tensor, int, str]] = []
        self.contents: list[tuple[Any, Any, str]] = []

    def of(self, value: Any, where: str) -> Any:
        """`value` itself where it cannot be changed, else a copy that refuses it, or is looked at later.

        Args:
            value: What a module holds.
            where: What the error says about the place, such as `Block.forward changes self.cache`.
        """
        if id(value) in self.copies:
            return self.copies[id(value)]
        if type(value) is tuple:
            items = [self.of(item, where) for item in value]
            return value if all(new is old for new, old in zip(items, value, strict=True)) else tuple(items)
        if isinstance(value, _KINDS):
            return self._container(value, where)
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if hasattr(value, "__dict__") and not isinstance(value, _SHARED):
            self._watch(value, where)
        return value

    def check(self) -> None:
        """Put objects back as they were.

        Raises:
            TraceError: If one was changed.
        """
        changed = [where for tensor, version, where in self.tensors if tensor._version != version]
        for holder, content, where in self.contents:
            if not _is_same(_content(holder), content):
                _restore(holder, content)
                changed.append(where)
        if changed:
            raise TraceError(changed[0])

    def _container(self, value: Any, where: str) -> Any:
        kind: Any = next(kind for kind in _KINDS if isinstance(value, kind))
        cls: Any = _refusing(type(value))  # type: ignore[arg-type]
        guarded = self.copies[id(value)] = cls.__new__(cls)
        guarded.__dict__.update(getattr(value, "__dict__", {}), surgery_original=value, surgery_refusal=where)
        if isinstance(value, dict):
            for key in value:
                kind.__setitem__(guarded, key, self.of(dict.__getitem__(value, key), where))
            if isinstance(value, defaultdict):
                guarded.default_factory = value.default_factory
        elif kind is deque:
            deque.__init__(guarded, (self.of(item, where) for item in value), value.maxlen)
        elif kind is set:
            set.update(guarded, value)
        else:
            list.extend(guarded, [self.of(item, where) for item in value])
        return guarded

    def _tensor(self, value: Tensor, where: str) -> Tensor:
        if value.numel() > _SMALL or type(value) is not Tensor:
            return value
        copied = self.copies[id(value)] = value.detach().clone()
        self.tensors.append((copied, copied._version, where))
        return copied

    def _watch(self, value: Any, where: str) -> None:
        self.copies[id(value)] = value
        for holder in (value, *vars(value).values()):
            if holder is value or type(holder) in (dict, list, set):
                self.contents.append((holder, _content(holder), where))


def original_of(value: Any) -> Any:
    """What a refusing copy was made of; anything else is itself."""
    return getattr(value, "__dict__", {}).get("surgery_original", value) if isinstance(value, _KINDS) else value


@functools.cache
def _refusing(cls: Any) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(self.surgery_refusal)

    def plain(self: Any, *args: Any) -> Any:
        return copy.copy(self.surgery_original)

    names = [name for name in _CHANGES if hasattr(cls, name)]
    return type(
        cls.__name__,
        (cls,),
        {
            **dict.fromkeys(names, refuse),
            "copy": plain,
            "__copy__": plain,
            "__deepcopy__": plain,
            "__module__": cls.__module__,
        },
    )


def _content(holder: Any) -> Any:
    if type(holder) in (dict, list, set):
        return holder.copy()
    lazy = {name for name in vars(holder) if isinstance(getattr(type(holder), name, None), functools.cached_property)}
    return {name: value for name, value in vars(holder).items() if name not in lazy}


def _is_same(now: Any, then: Any) -> bool:
    if isinstance(now, dict):
        return now.keys() == then.keys() and all(now[key] is then[key] for key in now)
    return len(now) == len(then) and (isinstance(now, set) or all(a is b for a, b in zip(now, then, strict=True)))


def _restore(holder: Any, content: Any) -> None:
    store = holder if type(holder) in (dict, list, set) else vars(holder)
    store.clear()
    (store.extend if isinstance(store, list) else store.update)(content)
