"""FLOPs of torch's fused kernels, by hand."""

from __future__ import annotations

import torch
from torch import nn

from surgery.counting import flop_counter, uncounted

N, T, C, F = 2, 5, 8, 12


def counted(model: nn.Module, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), flop_counter() as counter:
        model.eval().requires_grad_(False)(*inputs)
    return counter.get_total_flops()


def test_fused_attention() -> None:
    """Per token: 4 projections of C*C, and T*C for the scores and again for the sum; 2 per multiply-add."""
    x = torch.randn(N, T, C)
    model = nn.MultiheadAttention(C, 2, batch_first=True)
    by_hand = 2 * N * T * (4 * C * C + 2 * T * C)
    assert counted(model, x, x, x) == by_hand
    with flop_counter() as counter:  # the path that is not one kernel agrees
        model.requires_grad_(True)(x, x, x, need_weights=False)
    assert counter.get_total_flops() == by_hand


def test_attention_product_with_fewer_key_heads() -> None:
    """4 query heads of width 6 on 3 tokens, 7 keys: 2 * 4 * 3 * 7 * (6 + 6) a sample."""
    query, key = torch.randn(N, 4, 3, 6), torch.randn(N, 2, 7, 6)
    with torch.no_grad(), flop_counter() as counter:
        nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert counter.get_total_flops() == N * 2 * 4 * 3 * 7 * 12


def test_fused_encoder_layer() -> None:
    x = torch.randn(N, T, C)
    model = nn.TransformerEncoderLayer(C, 2, F, batch_first=True)
    assert counted(model, x) == 2 * N * T * (4 * C * C + 2 * T * C + 2 * C * F)


def test_other_kernels_are_counted_as_torch_counts_them() -> None:
    assert counted(nn.Linear(C, F), torch.randn(N, T, C)) == 2 * N * T * C * F


def test_what_is_run_to_check_costs_nothing() -> None:
    model, x = nn.Linear(C, F), torch.randn(N, T, C)
    with torch.no_grad(), flop_counter() as counter:
        model(x)
        with uncounted():
            model(x)
        assert counter.get_total_flops() == 2 * N * T * C * F
        model(x)
    assert counter.get_total_flops() == 2 * 2 * N * T * C * F
