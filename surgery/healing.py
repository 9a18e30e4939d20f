"""Healing: small own changes to backbone parameters that act wherever a gated model does not run dense.

A healed module keeps its parameters as they are and gets, under the name that gates have, what is added to them: a
tensor of the same shape for norms, a product of two thin matrices for LoRA. Reading the parameter gives the sum while
gates decide, and the original while the model runs dense or healing is switched off; the state dict holds both apart.
`surgery.heal` makes it, `surgery.load` brings it back, `surgery.remove` leaves nothing of it.

Axis letters: `O` outputs, `I` inputs, `R` rank of a low-rank change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery import context
from surgery.context import state_of
from surgery.errors import PlanMismatch
from surgery.rewriting import subclass
from surgery.state import GatedState, Healing
from surgery.tracing import GATES, base_class

DOWN, UP = "_down", "_up"


class Change(nn.Module):
    """What is added to the parameters of one module.

    Args:
        state: The gated model's state.
        shapes: The module's parameters by name, with their shapes.
        healing: What kind of change it is.
        device: Of the module.
    """

    def __init__(
        self, state: GatedState, shapes: Mapping[str, tuple[int, ...]], healing: Healing, device: torch.device
    ) -> None:
        super().__init__()
        self.state = state
        self.low_rank = healing.kind == "lora"
        self.sums = _Sums()
        for name, shape in tensors_of(shapes, healing).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device), requires_grad=False))

    @property
    def active(self) -> bool:
        """Whether the call that runs now uses it."""
        over = context.overrides_of(self.state)
        return over.healed and context.default_execution(self.state, over) != "dense"

    def value(self, name: str, own: Tensor) -> Tensor:
        """The parameter with its change; the same tensor every time until one of both changes."""
        parts = self.parts(name)
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            return self._sum(own, parts)
        key = tuple((t.data_ptr(), t.device, t.dtype, 0 if t.is_inference() else t._version) for t in (own, *parts))
        found = self.sums.get(name)
        if found is None or found[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                found = self.sums[name] = (key, self._sum(own, parts))
        return found[1]

    def parts(self, name: str) -> tuple[Tensor, ...]:
        """The tensors that make the change of one parameter."""
        names = (name + UP, name + DOWN) if self.low_rank else (name,)
        return tuple(getattr(self, one) for one in names)

    def _sum(self, own: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        change = parts[0] @ parts[1] if self.low_rank else parts[0]  # O I, or as `own`
        wide = torch.promote_types(own.dtype, change.dtype)
        return (own.to(wide) + change.to(wide)).to(own.dtype)


class _Sums(dict[str, tuple[Any, Tensor]]):
    """Sums that can be made again, so that copies do without."""

    def __deepcopy__(self, _: Any) -> _Sums:
        return _Sums()


def tensors_of(shapes: Mapping[str, tuple[int, ...]], healing: Healing) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is stored for the parameters of one module."""
    if healing.kind == "norms":
        return dict(shapes)
    found: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs) in shapes.items():
        found |= {name + DOWN: (healing.rank, inputs), name + UP: (outputs, healing.rank)}
    return found


def by_module(healing: Healing) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the changed parameters, by module and name in it."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in healing.shapes.items():
        module, _, own = name.rpartition(".")
        found.setdefault(module, {})[own] = tuple(shape)
    return found


def stored(healing: Healing | None) -> dict[str, tuple[int, ...]]:
    """Names in the state dict, and shapes, of everything that healing added."""
    found: dict[str, tuple[int, ...]] = {}
    if healing is None:
        return found
    for module, shapes in by_module(healing).items():
        prefix = f"{module}.{GATES}" if module else GATES
        found |= {f"{prefix}.{name}": shape for name, shape in tensors_of(shapes, healing).items()}
    return found


def install(gated: nn.Module, healing: Healing) -> dict[str, nn.Parameter]:
    """Put changes, all zero, into a gated model; one that was there before goes.

    Returns:
        The added parameters by name.

    Raises:
        PlanMismatch: If a parameter is missing or of another shape, or its module carries gates.
    """
    uninstall(gated)
    modules = dict(gated.named_modules())
    state = state_of(gated)
    for name, shapes in by_module(healing).items():
        module = modules.get(name)
        for own, shape in shapes.items():
            parameter = None if module is None else module._parameters.get(own)
            if parameter is None or tuple(parameter.shape) != shape:
                has = "missing" if parameter is None else f"of shape {tuple(parameter.shape)}"
                raise PlanMismatch(
                    f"healing changes {name}.{own} of shape {shape}, which is {has} in this {type(gated).__name__}; was it "
                    "made for another model?"
                )
        assert module is not None
        if GATES in module._modules:
            raise PlanMismatch(f"healing changes {name}, which carries gates; was it made for another model?")
        _attach(module, Change(state, shapes, healing, next(iter(module.parameters())).device))
    state.healing = healing
    return {name: gated.get_parameter(name) for name in stored(healing)}


def uninstall(gated: nn.Module) -> None:
    """Take every change out again."""
    for module in changed(gated):
        del module._modules[GATES]
        module.__class__ = base_class(module)
    state_of(gated).healing = None


def make_permanent(twin: nn.Module) -> None:
    """Write every change into the parameters of a copy that nobody else holds."""
    for module in changed(twin):
        change: Any = module._modules.pop(GATES)
        names = [name for name in module._parameters if hasattr(change, name) or hasattr(change, name + UP)]
        for name in names:
            own = module._parameters[name]
            assert own is not None
            module._parameters[name] = nn.Parameter(change.value(name, own).detach(), requires_grad=False)
        module.__class__ = base_class(module)


def changed(gated: nn.Module) -> list[nn.Module]:
    """The modules that carry a change."""
    return [module for module in gated.modules() if isinstance(module._modules.get(GATES), Change)]


@contextmanager
def unhealed(gated: nn.Module) -> Iterator[None]:
    """Run `gated` with the backbone as it was inside the block, with the gates as they are set.

    Args:
        gated: A gated model, healed or not.

    Raises:
        NotConverted: If the model has no gates.
    """
    with context.override(state_of(gated), healed=False):
        yield


def _attach(module: nn.Module, change: Change) -> None:
    shapes = [name for name in module._parameters if hasattr(change, name) or hasattr(change, name + UP)]
    module.add_module(GATES, change)
    module.__class__ = subclass(type(module), {name: _reader(name) for name in shapes})


def _reader(name: str) -> property:
    def read(self: nn.Module) -> Tensor | None:
        own = self._parameters[name]
        change: Any = self._modules.get(GATES)
        return change.value(name, own) if own is not None and change is not None and change.active else own

    return property(read)
