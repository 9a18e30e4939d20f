"""One module's own `forward` as an `fx.Graph`, its children as leaves.

Whole-model tracing fails on most transformers and some timm models; tracing each module alone, children as leaves,
works on nearly all. `torch.fx.Tracer.trace` patches `nn.Module` globally while it runs, which would disturb other
threads (a gated model may trace a new call pattern while it serves), so `forward` runs here on a *stand-in* instead:
an object of the same class whose parameters read as proxies and whose children record a call. Nothing global is
touched, nor the module.

A graph belongs to one *call pattern* (`surgery.patterns`).
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.attributes import Attributes, is_plain
from surgery.containers import Guard, original_of
from surgery.errors import TraceError, first_line
from surgery.notes import collector, is_idle
from surgery.patterns import Pattern, signature_of

DTYPE = "dtype"  # key in the metadata of an output node: the dtype that decided what `forward` does
ATTRIBUTES = "attributes"  # key in the metadata of an output node: the plain attributes that `forward` read
INPLACE = "inplace"  # key in the metadata of sums that were written `a += b`
GATES = "surgery_gates"  # name of the child that holds a host's gates; invisible to tracing
CACHE_NAMES = frozenset({"past_key_value", "past_key_values", "layer_past", "cache_params", "cache"})


def trace(
    module: nn.Module,
    pattern: Pattern,
    inlined: Collection[str] = (),
    *,
    until_cached: bool = False,
    many_tokens: bool = False,
) -> fx.Graph:
    """Trace `type(module).forward` for one call pattern.

    Args:
        module: The module; it is not changed and none of its children run.
        pattern: Which arguments are None, constants, tensors or other objects.
        inlined: Names (relative to `module`) of descendants to trace through instead of recording a call.
        until_cached: Stop where keys and values go into a cache; the graph's output is what `update` is called with,
            its positional arguments in a tuple and the named ones in a dict.
        many_tokens: Where `forward` asks whether a size is larger than 1, take it that it is.

    Returns:
        A graph without dead code. Its placeholders are the arguments that are not constants; the names of calls and
        attributes are relative to `module`.

    Raises:
        TraceError: If `forward` reads a tensor's value, sets attributes, uses a context manager, or cannot be traced; if it
            should stop at a cache and none is updated.
    """
    try:
        return _traced(module, pattern, inlined, until_cached, many_tokens, by_name=False)
    except TraceError as error:
        if pattern.extra or "got multiple values for argument" not in str(error.__cause__):
            raise
        # A decorator fills in arguments by name (`use_cache` of transformers' models). With all of them by name it may fill in
        # others than in a call that leaves some out, so such a graph is not used; it says what else is in the way.
        _traced(module, pattern, inlined, until_cached, many_tokens, by_name=True)
        raise


def _traced(
    module: nn.Module,
    pattern: Pattern,
    inlined: Collection[str],
    until_cached: bool,
    many_tokens: bool,
    *,
    by_name: bool,
) -> fx.Graph:
    """The graph, from one call whose arguments are given by position where they can be, or `by_name`."""
    cls = base_class(module)
    if "forward" in module.__dict__:
        raise TraceError(f"{cls.__name__}: `forward` was replaced on the instance; undo the patch before converting")
    if "SETUP_WITH" in _opcodes(cls) or "BEFORE_WITH" in _opcodes(cls) or "LOAD_SPECIAL" in _opcodes(cls):
        raise TraceError(f"{cls.__name__}.forward uses a `with` block, which a graph would lose")
    signature = signature_of(cls)
    if len(pattern.named) != len(signature.named):
        raise TraceError(
            f"{cls.__name__}.forward takes {len(signature.named)} arguments, the pattern has {len(pattern.named)}"
        )
    tracer = _Tracer(module, until_cached=until_cached, many_tokens=many_tokens)
    positional, keyword = [], {}
    for parameter, kind in zip(signature.named, pattern.named, strict=True):
        value = tracer.argument(parameter.name, kind)
        named = by_name and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if named or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keyword[parameter.name] = value
        else:
            positional.append(value)
    positional += [tracer.argument(f"{signature.extra}_{i}", kind) for i, kind in enumerate(pattern.extra)]
    keyword.update({name: tracer.argument(name, kind) for name, kind in pattern.keywords})
    stand_in = _stand_in(module, "", tracer, frozenset(inlined), root=True)
    try:
        result = _answering(cls.forward)(stand_in, *positional, **keyword)
        if until_cached:
            raise TraceError(f"{cls.__name__}.forward updates no cache")
        tracer.graph.output(tracer.create_arg(result))
    except _Updates as reached:
        tracer.graph.output(tracer.create_arg(reached.arguments))
    except TraceError:
        raise
    except Exception as error:  # code that meets proxies may raise anything
        raise TraceError(
            f"{cls.__name__}.forward cannot be traced ({_where(error)}): {first_line(error, type(error).__name__)}"
        ) from error
    finally:
        tracer.check_unchanged()
    tracer.graph.output_node().meta[ATTRIBUTES] = Attributes(tracer.read)
    if tracer.asked:
        tracer.graph.output_node().meta[DTYPE] = tracer.dtype
    _remove_dropout(tracer.graph)
    _name_no_terms(tracer.graph)
    remove_dead_code(tracer.graph)
    return tracer.graph


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, looking through the subclass that a conversion gives it."""
    return getattr(type(module), "_surgery_base", type(module))


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the module's first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def is_autocast(module: nn.Module) -> bool:
    """Whether autocast decides dtypes where the module's parameters are, or may be when it runs (meta: offloaded)."""
    devices = {p.device.type for p in module.parameters()} - {"meta"} or {"cpu", "cuda"}
    return any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in devices)


def _remove_dropout(graph: fx.Graph) -> None:
    """Take out `F.dropout(x, p, training=False)`, which returns `x` itself, so that sums around it are one sum
    (Falcon).
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.dropout:
            training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            if training is False:
                node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])


def _name_no_terms(graph: fx.Graph) -> None:
    """Write `torch.add(input=a, other=b)` and `a.add(other=b)` as sums whose terms are given by position."""
    for node in graph.nodes:
        if node.target not in (torch.add, "add", "add_"):
            continue
        named = dict(node.kwargs)
        terms = (*node.args, *(named.pop(name) for name in ("input", "other") if name in named))
        if len(terms) == 2 and named.get("alpha", 1) == 1 and named.keys() <= {"alpha"}:
            node.args, node.kwargs = terms, {}


def is_watched(module: nn.Module) -> bool:
    """Whether somebody else has a say in what the module's call does."""
    return bool(
        GATES in module._modules
        or "forward" in module.__dict__
        or not all(map(is_idle, module._forward_hooks.values()))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def remove_dead_code(graph: fx.Graph) -> None:
    """Remove nodes that nothing reads and that do nothing; placeholders and side effects stay."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("output", "placeholder") and not has_side_effect(node):
            graph.erase_node(node)


def has_side_effect(node: fx.Node) -> bool:
    """Whether a node does something beyond its value: in-place methods, item assignment, assertions, unread calls."""
    if node.op == "call_module":
        return not node.users
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in _MUTATING_METHODS
    if node.op == "call_function":
        written = node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
        return written or node.target in _MUTATING_FUNCTIONS or _inplace_name(node.target)
    return False


_MUTATING_METHODS = frozenset(
    {"update", "append", "pop", "setdefault", "extend", "insert", "clear", "remove", "__setitem__"}
)
_MUTATING_FUNCTIONS = frozenset(
    {operator.setitem, operator.delitem, torch._assert, setattr}
    | {
        getattr(operator, name)
        for name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "imatmul", "ipow")
    }
)


def _inplace_name(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def new_graph() -> fx.Graph:
    """An empty graph in which no value may be named `self` (BERT has a child of that name)."""
    graph = fx.Graph()
    graph._graph_namespace.create_name("self", None)
    return graph


class _Proxy(fx.Proxy):
    """A proxy that remembers which sums were written `a += b`, and answers `x.dtype == torch.float16`."""

    @property
    def dtype(self) -> Any:
        return _Dtype(self, "dtype")

    def __iadd__(self, other: Any) -> Any:
        result = self + other
        if isinstance(result, fx.Proxy):
            result.node.meta[INPLACE] = True
        return result

    def __gt__(self, other: Any) -> Any:
        return True if self._is_size_beside(other) else super().__gt__(other)  # type: ignore[misc]

    __hash__ = fx.Proxy.__hash__

    def __eq__(self, other: Any) -> Any:
        return False if self._is_size_beside(other) else super().__eq__(other)

    def _is_size_beside(self, other: Any) -> bool:
        """Whether this is a size that is compared with 1, and known to be larger."""
        assert isinstance(self.tracer, _Tracer)
        return self.tracer.many_tokens and type(other) is int and other == 1 and _is_size(self.node)


def _is_size(node: fx.Node) -> bool:
    """Whether it reads one size of a tensor."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 2
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.target is getattr and source.args[1:] == ("shape",)


class _Dtype(fx.proxy.Attribute):
    """A value's dtype. Asked whether it is a floating-point dtype other than the weights', it says no."""

    __hash__ = fx.proxy.Attribute.__hash__

    def __eq__(self, other: Any) -> Any:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        if isinstance(other, torch.dtype) and other.is_floating_point and tracer.dtype not in (None, other):
            tracer.asked = True
            return False
        return super().__eq__(other)


class _Tracer(fx.proxy.TracerBase):
    """Records into one graph; knows which proxies stand for tensors."""

    def __init__(self, module: nn.Module, *, until_cached: bool = False, many_tokens: bool = False) -> None:
        super().__init__()
        self.graph = new_graph()
        self.module = module
        self.until_cached = until_cached
        self.many_tokens = many_tokens
        self.trace_asserts = False
        self.proxy_buffer_attributes = True
        self._attributes: dict[str, fx.Proxy] = {}
        self.dtype = weights_dtype(module)
        self.asked = False
        self.read: dict[str, Any] = {}
        self.guard = Guard()
        self.stand_ins: list[tuple[nn.Module, frozenset[str]]] = []
        self.notes = collector()

    def check_unchanged(self) -> None:
        """Put back what `forward` changed beside its module.

        Raises:
            TraceError: If it changed something.
        """
        self.guard.check()
        for stand_in, names in self.stand_ins:
            cls = type(stand_in)
            new = [
                n for n in vars(stand_in) if n not in names and not isinstance(getattr(cls, n, None), cached_property)
            ]
            if new:
                raise TraceError(f"{cls.__name__}.forward sets self.{new[0]}, a side effect that a graph would lose")

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        notes = collector()
        if kind == "call_module" and notes is not None and notes is not self.notes:
            raise TraceError(
                f"{base_class(self.module).__name__}.forward returns what hooks in its modules note, which a graph would lose"
            )
        return self.graph.create_node(kind, target, args, kwargs, name, type_expr)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def argument(self, name: str, kind: str) -> Any:
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        tag, _, text = kind.partition(":")
        if tag == "str":
            return text
        if tag == "int" and text:
            return int(text)
        if tag == "ints":
            return tuple(map(int, text.split(",")))
        node = self.create_node("placeholder", name, (), {})
        if kind in _CLASSES:
            return _Number(node, self, _CLASSES[kind])
        if tag == "typed":
            name_of_dtype, _, rank = text.partition(":")
            dtype = getattr(torch, name_of_dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise TraceError(f"{name_of_dtype} is no dtype")
            return _Typed(node, self, int(rank), dtype)
        if tag == "sized":
            rank, _, sizes = text.partition(":")
            return _Sized(node, self, int(rank), tuple(map(int, sizes.split(","))))
        if tag == "tensor":
            return (_Ranked if self.until_cached or self.many_tokens else _Argument)(node, self, int(text))
        return _Cache(node, self) if self.until_cached and name in CACHE_NAMES else fx.Proxy(node, self)

    def attribute(self, name: str) -> fx.Proxy:
        if name not in self._attributes:
            self._attributes[name] = fx.Proxy(self.create_node("get_attr", name, (), {}), self)
        return self._attributes[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        a = original_of(a)
        if isinstance(a, Tensor):
            raise TraceError(
                f"{type(self.module).__name__}.forward uses a tensor that is neither a parameter nor a buffer"
            )
        if isinstance(a, nn.Module):
            raise TraceError(f"{type(self.module).__name__}.forward passes a module as a value")
        if isinstance(a, dict) and type(a) is not dict and all(isinstance(key, str) for key in a):
            # a dict subclass that is also read by attribute, such as transformers' ModelOutput, must stay one
            return self.create_node("call_function", type(a), (), {key: self.create_arg(v) for key, v in a.items()})
        return super().create_arg(a)


class _Argument(_Proxy):
    """A tensor argument, whose rank belongs to the call pattern and may therefore decide what `forward` does."""

    is_nested = False
    _is_param = False

    def __init__(self, node: fx.Node, tracer: _Tracer, rank: int) -> None:
        super().__init__(node, tracer)
        self.ndim = rank

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # what `isinstance` asks for; torch's functions in C ask as well, and would take a proxy's memory for a tensor's
        return Tensor if sys._getframe(1).f_code in _ONLY_ASK else type(self)

    def dim(self) -> int:
        return self.ndim

    ndimension = dim


class _Typed(_Argument):
    """A tensor argument whose dtype belongs to the call pattern."""

    def __init__(self, node: fx.Node, tracer: _Tracer, rank: int, dtype: torch.dtype) -> None:
        super().__init__(node, tracer, rank)
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def is_floating_point(self) -> bool:
        return self._dtype.is_floating_point

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.is_floating_point, Tensor.is_floating_point) and type(args[0]) is _Typed:
            return args[0].is_floating_point()
        return super().__torch_function__(function, kinds, args, kwargs)


class _Number(_Proxy):
    """A number argument, whose class belongs to the call pattern."""

    def __init__(self, node: fx.Node, tracer: _Tracer, kind: type) -> None:
        super().__init__(node, tracer)
        self._kind = kind

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._kind  # what `isinstance` asks for


class _Ranked(_Argument):
    """A tensor argument whose shape is as many sizes as it has axes."""

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.size(axis) for axis in range(self.ndim))


class _Cache(fx.Proxy):
    """A key/value cache at which tracing stops."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise _Updates((args, kwargs))


class _Updates(Exception):
    """A cache is updated with these arguments."""

    def __init__(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__()
        self.arguments = arguments


class _Sized(_Argument):
    """A tensor argument of which all sizes but the first belong to the call pattern."""

    def __init__(self, node: fx.Node, tracer: _Tracer, rank: int, sizes: tuple[int, ...]) -> None:
        super().__init__(node, tracer, rank)
        self._sizes = sizes

    @property
    def shape(self) -> tuple[Any, ...]:
        whole: Any = self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})
        return (whole[0], *self._sizes)

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def __len__(self) -> int:
        raise TraceError("the number of samples decides what is computed")


def _answering(function: Any) -> Any:
    """The function, in which two questions about traced values are answered that Python's own builtins cannot: `len(x)` is
    recorded, since Python would want a number, and `isinstance(x, Tensor)` is true of tensor arguments.
    """
    if not isinstance(function, FunctionType) or not _names_in(function.__code__) & _ANSWERS.keys():
        return function
    scope = {**_ANSWERS, **function.__globals__}
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _names_in(code: CodeType) -> set[str]:
    """Names that code reads from outside, inner functions included."""
    return {*code.co_names, *(n for inner in code.co_consts if isinstance(inner, CodeType) for n in _names_in(inner))}


def _length(value: Any) -> Any:
    """`len(value)`. The number of a shape's sizes is the rank, where the call pattern holds it."""
    if not isinstance(value, fx.Proxy):
        return len(value)
    if isinstance(value, fx.proxy.Attribute) and value.attr == "shape" and isinstance(value.root, _Argument):
        return value.root.ndim
    return value.tracer.create_proxy("call_function", len, (value,), {})


def _is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance(value, kinds)`; tensor arguments are tensors."""
    return isinstance(value, kinds) or (issubclass(type(value), _Argument) and issubclass(Tensor, kinds))


_ANSWERS: dict[str, Any] = {"len": _length, "isinstance": _is_instance}
_ONLY_ASK = (F._none_or_dtype.__code__, torch.is_tensor.__code__)
_CLASSES: dict[str, type] = {"float": float, "int": int}
_CONSTANTS: dict[str, Any] = {"none": None, "true": True, "false": False}


_OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})


class _Tensors(dict[str, Any]):
    """A module's parameters or buffers, read as proxies."""

    def __init__(self, source: Mapping[str, Any], prefix: str, tracer: _Tracer) -> None:
        super().__init__(source)
        self._prefix, self._tracer = prefix, tracer

    def __getitem__(self, name: str) -> Any:
        return None if super().__getitem__(name) is None else self._tracer.attribute(self._prefix + name)

    def __setitem__(self, name: str, value: Any) -> None:
        raise TraceError(f"`forward` sets self.{name}, a side effect that a graph would lose")


class _Children(dict[str, Any]):
    """A module's children, read as stand-ins; gates are left out."""

    def __init__(self, source: Mapping[str, Any], make: Callable[[str, nn.Module], nn.Module]) -> None:
        super().__init__({name: child for name, child in source.items() if name != GATES})
        self._make = make
        self._made: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> Any:
        child = super().__getitem__(name)
        if child is None:
            return None
        if name not in self._made:
            self._made[name] = self._make(name, child)
        return self._made[name]

    def __setitem__(self, name: str, value: Any) -> None:
        raise TraceError(f"`forward` sets self.{name}, a side effect that a graph would lose")

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


def _stand_in(
    module: nn.Module, path: str, tracer: _Tracer, inlined: frozenset[str], *, root: bool = False
) -> nn.Module:
    """An object of the module's class whose tensors are proxies and whose call is recorded (or, inlined, run)."""
    cls = base_class(module)
    prefix = f"{path}." if path else ""

    def child(name: str, value: nn.Module) -> nn.Module:
        return _stand_in(value, prefix + name, tracer, inlined)

    def record(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if path in inlined:
            return _answering(cls.forward)(self, *args, **kwargs)
        return tracer.create_proxy("call_module", path, args, kwargs)

    def refuse(self: nn.Module, name: str, value: Any = None) -> None:
        raise TraceError(f"{cls.__name__}.forward sets self.{name}, a side effect that a graph would lose")

    plain = {n: v for n, v in vars(module).items() if n != "training" and is_plain(v)}

    def read(self: nn.Module, name: str) -> Any:
        if name in plain:
            tracer.read[prefix + name] = plain[name]
        return cls.__getattribute__(self, name)

    def changes(name: str) -> str:
        return f"{cls.__name__}.forward changes what self.{name} holds, a side effect that a graph would lose"

    namespace: dict[str, Any] = {"__setattr__": refuse, "__delattr__": refuse, "__module__": cls.__module__}
    namespace["__getattribute__"] = read
    namespace |= {name: tracer.guard.of(value, changes(name)) for name, value in _containers_of(cls).items()}
    if not root:
        namespace["__call__"] = record
    stand_in: nn.Module = object.__new__(type(cls.__name__, (cls,), namespace))
    state = {name: tracer.guard.of(value, changes(name)) for name, value in vars(module).items() if name not in _OWN}
    state["_parameters"] = _Tensors(module._parameters, prefix, tracer)
    state["_buffers"] = _Tensors(module._buffers, prefix, tracer)
    state["_modules"] = _Children(module._modules, child)
    state["training"] = False
    stand_in.__dict__.update(state)
    tracer.stand_ins.append((stand_in, frozenset(state)))
    return stand_in


def _containers_of(cls: type) -> dict[str, Any]:
    """Dicts, lists and sets that all modules of a class share."""
    classes = [base for base in reversed(cls.__mro__) if base not in nn.Module.__mro__]
    found = {name: value for base in classes for name, value in vars(base).items() if not name.startswith("__")}
    return {name: value for name, value in found.items() if isinstance(value, (dict, list, set, deque))}


def _opcodes(cls: type) -> frozenset[str]:
    import dis

    function = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    code = getattr(function, "__code__", None)
    return frozenset() if code is None else frozenset(i.opname for i in dis.get_instructions(code))


def _where(error: BaseException) -> str:
    frames = []
    step = error.__traceback__
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        if "/torch/fx/" not in filename and not filename.endswith("surgery/tracing.py"):
            frames.append(f"{filename.rsplit('/', 1)[-1]}:{step.tb_lineno}")
        step = step.tb_next
    return frames[-1] if frames else "at its entry"
