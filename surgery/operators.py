"""Torch's functions that are watched for inside attention, and how their arguments are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ATTENTION: Any = F.scaled_dot_product_attention
WHOLE: Any = F.multi_head_attention_forward
"""Projections, product and output of torch's own `nn.MultiheadAttention` in one call."""
PRODUCTS: frozenset[Any] = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__})
TRANSPOSED: frozenset[Any] = frozenset({Tensor.T.__get__, Tensor.t, torch.t})  # type: ignore[attr-defined]
SOFTMAX: frozenset[Any] = frozenset({torch.softmax, Tensor.softmax, F.softmax})


def linear_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input `(…, C)`, weight and bias of a call of `F.linear`."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return named["input"], named["weight"], named.get("bias")
