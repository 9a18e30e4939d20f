"""FLOPs of torch's fused kernels, by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import surgery
from surgery.counting import flop_counter, recurrent_flops, uncounted

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


@pytest.mark.parametrize("gates", [4, 3, 1], ids=["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("inference", [True, False], ids=["inference", "no_grad"])
def test_recurrent_layers(gates: int, inference: bool) -> None:
    """Per position and gate: C*F from the input and F*F from the last state; 2 per multiply-add."""
    kind = {4: nn.LSTM, 3: nn.GRU, 1: nn.RNN}[gates]
    x = torch.randn(N, T, C)
    with torch.inference_mode(inference):
        assert counted(kind(C, F, batch_first=True), x) == 2 * N * T * gates * (C * F + F * F)
        both = kind(C, F, 2, batch_first=True, bidirectional=True)
        first, second = C * F + F * F, 2 * F * F + F * F  # the second layer reads both directions of the first
        assert counted(both, x) == 2 * N * T * gates * 2 * (first + second)
        packed = pack_sequence([torch.randn(T, C), torch.randn(3, C)])
        assert counted(kind(C, F), packed) == 2 * (T + 3) * gates * (C * F + F * F)  # type: ignore[arg-type]


def test_recurrent_cells_and_projections() -> None:
    x = torch.randn(N, C)
    for cell, gates in ((nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)):
        assert counted(cell(C, F), x) == 2 * N * gates * (C * F + F * F)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # oneDNN has no projections
        model = nn.LSTM(C, F, proj_size=3, batch_first=True)
        assert counted(model, torch.randn(N, T, C)) == 2 * N * T * (4 * (C * F + 3 * F) + 3 * F)


def test_recurrent_layers_on_gpus_are_one_kernel() -> None:
    shapes = [(4 * F, C), (4 * F, F), (4 * F,), (4 * F,)]
    assert recurrent_flops((T, N, C), shapes, 4, None, (1, N, F)) == 2 * N * T * 4 * (C * F + F * F)


def test_recurrent_branches_are_sites() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rnn = nn.LayerNorm(C), nn.LSTM(C, C, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.rnn(self.norm(x))[0]

    sites = surgery.find_sites(nn.Sequential(Block(), Block()), torch.randn(N, T, C))
    assert [site.flops for site in sites] == [2 * T * 4 * 2 * C * C] * 2 and sites.model_flops == 2 * sites[0].flops
