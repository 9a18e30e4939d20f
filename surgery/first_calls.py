"""The first call in a new way: a program that was made while a model runs is compared with the original `forward`, once.

Programs of the plan's call patterns were compared when sites were found. One that is made later may be wrong without an
error, since Python's questions about an argument (`isinstance`, `hasattr`, `is`) have one answer in a trace. So both run
here with all gates open, on copies of the module and of the arguments, and everything that they give or write must be equal.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from surgery.context import Scope, entered, override
from surgery.copying import keep_modes
from surgery.counting import uncounted
from surgery.gates import Gate
from surgery.state import GatedState

_SMALL = 2**16
_PARTS = 8


def kind_of_object(value: Any) -> Any:
    """What may decide how Python goes on with an argument that is no tensor: its class, and those of its parts."""
    if isinstance(value, Enum):
        return value
    if type(value) in (tuple, list):
        return (type(value), len(value), *map(kind_of_object, value[:_PARTS]))
    return type(value)


def difference(
    program: Callable[..., Any], original: Callable[..., Any], module: nn.Module, state: GatedState, call: Sequence[Any]
) -> str | None:
    """How a program differs from the original `forward`, "" if it does not; None where that cannot be said in this call.

    Args:
        program: Takes the module and `call`.
        original: Takes the same.
        module: The host.
        state: What its gates share; all are open here.
        call: The arguments.
    """
    devices = {t.device for t in (*module.parameters(), *module.buffers())}
    if torch.compiler.is_compiling() or detect_fake_mode(call) is not None or any(d.type == "meta" for d in devices):
        return None
    devices = {device for device in devices if device.type == "cuda"}
    with torch.no_grad(), uncounted(), plain_attention(), entered(Scope()), _open(state):
        try:
            theirs = _result(original, _twin(module, state), call, devices)
        except Exception:  # the call is wrong, or cannot be repeated; its own error says more
            return None
        try:
            ours = _result(program, _twin(module, state), call, devices)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # whatever a wrong trace runs into
            return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    return "" if _same(ours, theirs, set()) else "it gives another result"


@contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of torch's own TransformerEncoder, which rounds differently."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _result(
    run: Callable[..., Any], module: nn.Module, call: Sequence[Any], devices: Collection[torch.device]
) -> tuple[Any, Sequence[Any]]:
    """What a call gives, and its arguments afterwards."""
    own = _own_layers(module)
    arguments = [_copied(value, own) for value in call]
    with torch.random.fork_rng(list(devices)):
        return run(module, *arguments), arguments


def _open(state: GatedState) -> AbstractContextManager[Any]:
    def handler(gate: Gate, branch: Any, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        return gate.open(branch, left, inputs)

    return override(state, handler=handler, tape=None, recorder=None)


def _twin(module: nn.Module, state: GatedState) -> nn.Module:
    """A copy without hooks that shares weights and large buffers, so that nothing is written or noticed outside."""
    shared = [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.numel() > _SMALL), state]
    twin = copy.deepcopy(module, {id(one): one for one in shared})
    keep_modes(twin, module)
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


def _own_layers(module: nn.Module) -> frozenset[int]:
    """Layers of a key/value cache that modules in here write, as transformers numbers them."""
    found = (getattr(part, "layer_idx", None) for part in module.modules())
    return frozenset(index for index in found if isinstance(index, int))


def _copied(value: Any, layers: frozenset[int]) -> Any:
    """A copy of an argument; a cache keeps the layers that this module does not write."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item, layers) for item in value)
    if type(value) is dict:
        return {key: _copied(item, layers) for key, item in value.items()}
    kept = getattr(value, "layers", None) if layers else None
    shared = [layer for i, layer in enumerate(kept) if i not in layers] if isinstance(kept, list) else []
    return copy.deepcopy(value, {id(layer): layer for layer in shared})


def _same(ours: Any, theirs: Any, seen: set[int]) -> bool:
    """Whether two results are bit-equal, as far as they hold tensors, numbers or texts."""
    if ours is theirs or id(ours) in seen:
        return True
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and _equal(ours, theirs)
    if type(ours) is not type(theirs):
        return False
    seen.add(id(ours))
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key], seen) for key in ours)
    if isinstance(ours, (tuple, list)):
        return len(ours) == len(theirs) and all(_same(a, b, seen) for a, b in zip(ours, theirs, strict=True))
    if members := _members(ours):
        return _same(members, _members(theirs), seen)
    return not isinstance(ours, (int, float, str)) or ours == theirs or ours != ours


def _members(value: Any) -> dict[str, Any]:
    """What an object holds, in fields with slots too; nothing for numbers and texts."""
    named = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in named if hasattr(value, name)}}


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(ours, theirs) or torch.equal(ours.nan_to_num(), theirs.nan_to_num())
