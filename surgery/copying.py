"""A copy of a model that shares the original's storage and owns everything else.

The copy has its own `Parameter` and buffer *objects* over the same memory. Sharing the objects would be a trap:
`gated.half()` or `requires_grad_()` would then change the original.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes; what torch allocates at."""


def share(model: nn.Module) -> nn.Module:
    """Copy `model`; parameters are frozen views of the original's memory, ties are kept.

    Loading a state dict into the copy gives it memory of its own first, so the original is never written. Programs of
    `torch.jit` inside the model are copied with their weights.
    """
    # in lists, since those of torch.jit are made anew for every reader, and a memo goes by identity
    parameters, buffers = list(model.parameters()), list(model.buffers())
    memo: dict[int, Any] = {id(made): made.detach().clone() for made in _computed(model)}
    memo |= {id(parameter): _alias(parameter) for parameter in parameters}
    memo |= {id(buffer): buffer.detach() for buffer in buffers}
    with torch.no_grad():  # torch.jit clones
        twin = copy.deepcopy(model, memo)
    keep_modes(twin, model)
    for module in twin.modules():
        if isinstance(module, torch.jit.ScriptModule):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        elif module._parameters or module._buffers:
            module.register_load_state_dict_pre_hook(_own_memory_before_loading)
    return twin


def keep_modes(twin: nn.Module, model: nn.Module) -> None:
    """Put every module of a copy into the mode of its original: what torchvision's `create_feature_extractor` makes is copied
    into train mode, and has one graph for each.
    """
    modes = {name: mode for name, module in model.named_modules() if (mode := _mode(module)) is not None}
    parts = [(module, modes[name]) for name, module in twin.named_modules() if name in modes]
    for module, mode in parts:
        if _mode(module) not in (None, mode):
            module.train(mode)  # takes the graph of that mode, and everything inside along
    for module, mode in parts:
        if _mode(module) not in (None, mode):
            module.training = mode


def _mode(module: nn.Module) -> bool | None:
    """None where a module knows none, as one that torch.jit froze."""
    return getattr(module, "training", None)


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Attributes that were computed from parameters, which torch refuses to copy: `weight` of a pruned or normalised layer."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def align(model: nn.Module) -> nn.Module:
    """Move CPU tensors that start at an odd address, as those of a memory-mapped file do; returns `model`.

    Matrix products round differently at such addresses, so a model would depend on the length of its file's header.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor.data) is Tensor and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    alias = nn.Parameter(parameter.data, requires_grad=False)
    alias.__dict__.update(parameter.__dict__)
    return alias


def _own_memory_before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        given = state_dict.get(prefix + name)
        if tensor is not None and isinstance(given, Tensor) and not _same(tensor, given):
            tensor.data = tensor.data.clone()


def _same(mine: Tensor, given: Tensor) -> bool:
    if (
        mine.shape != given.shape
        or mine.dtype != given.dtype
        or mine.device != given.device
        or mine.device.type == "meta"
    ):
        return False
    return mine.data_ptr() == given.data_ptr() or torch.equal(mine, given)
