"""Call patterns: how a module was called, as far as it decides what `forward` does.

FX silently takes one side of `if argument is None`. Therefore a graph always belongs to a *call pattern*: which
arguments are None, True, False, a string, a number, a tensor, or another object. A host keeps one graph per pattern it meets.
"""

from __future__ import annotations

import inspect
import keyword as words
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn

_RANKS = tuple(f"tensor:{rank}" for rank in range(65))
_NUMBERS = {float: "float", int: "int"}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Held = Literal["kinds", "dtypes", "numbers", "sizes"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a module was called: the kind of each named argument, of extra positional ones, and of extra keyword ones.

    A kind is `none`, `true`, `false`, `str:<value>`, `enum:<class>.<name>`, `float`, `int`, `tensor:<rank>`, `object`; where
    dtypes are held fixed `typed:<dtype>:<rank>`; where numbers are, `int:<value>` and `ints:<values>`; where sizes are as
    well, `sized:<rank>:<all sizes but the first>`.
    """

    named: tuple[str, ...]
    extra: tuple[str, ...] = ()
    keywords: tuple[tuple[str, str], ...] = ()

    @property
    def holds(self) -> Held:
        """What is held fixed beside the kinds."""
        kinds = (*self.named, *self.extra, *(kind for _, kind in self.keywords))
        if any(kind.startswith("sized:") for kind in kinds):
            return "sizes"
        if any(kind.startswith(("int:", "ints:")) for kind in kinds):
            return "numbers"
        return "dtypes" if any(kind.startswith("typed:") for kind in kinds) else "kinds"

    def to_list(self) -> list[Any]:
        """JSON-ready form."""
        return [list(self.named), list(self.extra), [list(pair) for pair in self.keywords]]

    @classmethod
    def from_list(cls, data: list[Any]) -> Pattern:
        """Inverse of `to_list`.

        Raises:
            ValueError: If a keyword is no name of an argument; names become part of generated code.
        """
        named, extra, keywords = data
        for name, _ in keywords:
            if not isinstance(name, str) or not name.isidentifier() or words.iskeyword(name):
                raise ValueError(f"{str(name)[:60]!r} is no name of an argument")
        return cls(tuple(named), tuple(extra), tuple((name, kind) for name, kind in keywords))


def kind_of(value: Any) -> str:
    """The kind of one argument, as used in `Pattern`."""
    if isinstance(value, Tensor):
        return "object" if value.is_nested else _RANKS[value.dim()]
    if value is None:
        return "none"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, Enum):
        return f"enum:{type(value).__qualname__}.{value.name}"
    if isinstance(value, str):
        return f"str:{value}"
    return _NUMBERS.get(type(value), "object")


def kind_with_dtypes(value: Any) -> str:
    """Like `kind_of`, with the dtypes of tensors held fixed."""
    if isinstance(value, Tensor) and not value.is_nested:
        return f"typed:{str(value.dtype).removeprefix('torch.')}:{value.dim()}"
    return kind_of(value)


def kind_with_numbers(value: Any) -> str:
    """Like `kind_of`, with integers (and tuples of integers) held fixed."""
    if type(value) is int:
        return f"int:{value}"
    if isinstance(value, tuple) and value and all(type(item) is int for item in value):
        return f"ints:{','.join(map(str, value))}"
    return kind_of(value)


def kind_with_sizes(value: Any) -> str:
    """Like `kind_with_numbers`, with the sizes of tensors held fixed, but not along the first axis, the batch."""
    if isinstance(value, Tensor) and not value.is_nested and value.dim() > 1:
        return f"sized:{value.dim()}:{','.join(map(str, value.shape[1:]))}"
    return kind_with_numbers(value)


KINDS: Mapping[Held, Callable[[Any], str]] = {
    "kinds": kind_of,
    "dtypes": kind_with_dtypes,
    "numbers": kind_with_numbers,
    "sizes": kind_with_sizes,
}


@dataclass(frozen=True, slots=True)
class Signature:
    """Names and defaults of a `forward`, without `self`."""

    named: tuple[inspect.Parameter, ...]
    extra: str | None
    keywords: str | None
    positional: int = field(init=False)
    """How many of the named ones may be given by position."""

    def __post_init__(self) -> None:
        count = sum(parameter.kind is not inspect.Parameter.KEYWORD_ONLY for parameter in self.named)
        object.__setattr__(self, "positional", count)

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
        """Values of the named parameters, extra positional ones, extra keyword ones."""
        rest = dict(kwargs)
        values = []
        for index, parameter in enumerate(self.named):
            if index < len(args) and index < self.positional:
                values.append(args[index])
            else:
                values.append(rest.pop(parameter.name, parameter.default))
        return values, args[self.positional :] if self.extra else (), rest

    def fits(self, values: Sequence[Any], rest: Mapping[str, Any], args: Sequence[Any]) -> bool:
        """Whether Python would accept the call of which `bind` gave `values` and `rest`."""
        surplus = (rest and not self.keywords) or (len(args) > self.positional and not self.extra)
        return not surplus and not any(value is inspect.Parameter.empty for value in values)

    def names(self, pattern: Pattern) -> list[str]:
        """Names of all arguments of a call of that pattern, in the order in which generated code takes them."""
        extra = [f"{self.extra}_{i}" for i in range(len(pattern.extra))]
        return [*(p.name for p in self.named), *extra, *(name for name, _ in pattern.keywords)]

    def pattern(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], held: Held = "kinds") -> Pattern:
        """The call pattern of one call."""
        return pattern_of(*self.bind(args, kwargs), held)


def pattern_of(values: Sequence[Any], extra: Sequence[Any], rest: Mapping[str, Any], held: Held = "kinds") -> Pattern:
    """The call pattern of one call whose arguments `Signature.bind` gave."""
    kind = KINDS[held]
    return Pattern(
        tuple(map(kind, values)), tuple(map(kind, extra)), tuple((name, kind(rest[name])) for name in sorted(rest))
    )


def signature_of(cls: type) -> Signature:
    """Signature of a class's `forward`, decorators unwrapped."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    extra = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    keywords = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    return Signature(tuple(p for p in parameters if p.kind not in _VARIADIC), extra, keywords)


def patterns_of_call(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, list[Pattern]], Any]:
    """Run `run()` once and note with which call patterns each module of `model` was called.

    Returns:
        Module name -> distinct patterns in order of appearance; and what `run` returned.
    """
    seen: dict[str, list[Pattern]] = {}
    signatures: dict[type, Signature | None] = {}
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cls = type(module)
            if cls not in signatures:
                signatures[cls] = _signature_or_none(cls)
            signature = signatures[cls]
            if signature is not None:
                known = seen.setdefault(name, [])
                found = dict.fromkeys(signature.pattern(args, kwargs, held) for held in KINDS)
                known += [p for p in found if p not in known]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it takes no hooks, and holds nothing that could be traced
        handles.append(module.register_forward_pre_hook(note(name), with_kwargs=True))
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return seen, result


def _signature_or_none(cls: type) -> Signature | None:
    try:
        return signature_of(cls)
    except (TypeError, ValueError):  # a forward written in C has no signature: the module stays a leaf
        return None
