"""A hash of a model's weights, by which a checkpoint recognises the model that it was made from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from surgery.tracing import GATES


def fingerprint(model: nn.Module) -> str | None:
    """SHA-256 over the names, dtypes, shapes and bytes of all tensors in the state dict, in order of their names.

    Gates do not count, so a gated model has the fingerprint of its base.

    Returns:
        Hexadecimal digits, or None where a tensor has no values (meta device).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone_tensors(model).items()):
        if tensor.device.type == "meta":
            return None
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def backbone_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the gates' tensors."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and GATES not in name.split(".")
    }


def float_dtypes(model: nn.Module) -> list[str]:
    """Floating-point dtypes of the backbone, sorted: `["float32"]`."""
    found = {str(t.dtype).removeprefix("torch.") for t in backbone_tensors(model).values() if t.is_floating_point()}
    return sorted(found)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)
