"""Attention for some query tokens only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.context import state_of
from surgery.costs import observe
from surgery.counting import flop_counter
from surgery.queries import ActiveQueries, QueryRoles
from surgery.query_finding import find_roles


class Attention(nn.Module):
    """One way to write self-attention: fused or separate projections, causal or not."""

    def __init__(self, *, fused: bool, causal: bool, interleaved: bool = False) -> None:
        super().__init__()
        self.fused, self.causal, self.interleaved = fused, causal, interleaved
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        if self.interleaved:
            q, k, v = self.qkv(x).view(n, t, 2, 3, 4).permute(3, 0, 2, 1, 4)
        elif self.fused:
            q, k, v = self.qkv(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (layer(x).view(n, t, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).reshape(n, t, c))


class Block(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = Attention(**options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_active_rows_equal_the_full_result(fused: bool, causal: bool) -> None:
    x = torch.randn(3, 5, 8)
    attention = Attention(fused=fused, causal=causal)
    parameters = dict(attention.named_parameters())
    with torch.no_grad():
        full = attention(x)
        roles = find_roles(lambda: (attention(x), ()), full, parameters)
        assert isinstance(roles, QueryRoles)
        assert (roles.query, roles.first, roles.last) == ("qkv.weight" if fused else "q.weight", 0, 8)
        assert roles.output == "proj.weight"
        # per token: 2 * 8 * 8 queries + 2 * 8 * 8 output + 4 * 2 heads * 5 keys * 4 = 128 + 128 + 160
        assert roles.flops == 5 * (128 + 128 + 160)
        decisions = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
        with ActiveQueries(roles, parameters[roles.query], parameters[roles.output], decisions.shape, decisions):
            part = attention(x)
    torch.testing.assert_close(part[decisions], full[decisions])


def test_interleaved_projections_make_every_query_and_attend_with_active_ones() -> None:
    x = torch.randn(3, 5, 8)
    attention = Attention(fused=True, causal=False, interleaved=True)
    with torch.no_grad():
        roles = find_roles(lambda: (attention(x), ()), attention(x), dict(attention.named_parameters()))
    assert isinstance(roles, QueryRoles) and (roles.query, roles.output) == ("", "proj.weight")
    # per token: 2 * 8 * 8 output + 4 * 2 heads * 5 keys * 4
    assert roles.flops == 5 * (128 + 160) and roles.core == 32


def test_skip_equals_mask_and_costs_what_it_says() -> None:
    x = torch.randn(2, 16, 8)
    model = Block(fused=True, causal=False).eval()
    sites = surgery.find_sites(model, x)
    assert sites["attn"].granularities == ("sample", "token") and sites["attn"].kind == "attention"
    gated = surgery.insert_gates(model, sites.plan(skip="identity"))
    with torch.no_grad(), surgery.force(gated, 0.5, seed=3, samples=[0, 1]):
        with surgery.execution(gated, "mask"):
            reference = gated(x)
        with flop_counter() as counter:
            output = gated(x)
        usage = observe(gated, [x])
    torch.testing.assert_close(output, reference)
    costs = state_of(gated).costs
    dense = sites.model_flops * 2
    # rows of one sample are padded to the longest, so the real count is at least the predicted one, and not by much
    predicted = usage.decided.cost(costs)  # no router runs
    assert predicted <= counter.get_total_flops() / dense + 1e-6
    assert counter.get_total_flops() / dense < 0.95


def test_torch_multihead_attention_runs_fewer_queries() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 7, 8)
    sites = surgery.find_sites(model, x).expect(4)
    assert all("token" in site.granularities for site in sites)
    gated = surgery.insert_gates(model, sites)
    with torch.no_grad(), surgery.force(gated, 0.4, seed=1, samples=[0, 1, 2]):
        with surgery.execution(gated, "mask"):
            reference = gated(x)
        torch.testing.assert_close(gated(x), reference)
