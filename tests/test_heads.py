"""Sites of kind `heads`: active heads alone, per sample, as the whole attention with the others read as zeros."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import _gap, assert_close, assert_equal, enliven, outputs, rows
from test_queries import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.context import state_of, tape
from surgery.costs import observe
from surgery.counting import flop_counter
from surgery.errors import ForceError, NoSites, PinError, PlanMismatch
from surgery.gates import iter_gates
from surgery.head_finding import find_heads
from surgery.heads import ActiveHeads, HeadRoles, WeighedHeads, zeroed
from surgery.scripts.zoo import find
from surgery.state import BudgetPoint

ZOO = (
    "timm/vit_pico",
    "transformers/bert",
    "transformers/roberta",
    "transformers/distilbert",
    "transformers/vit",
    "transformers/llama",
    "transformers/qwen3",
    "transformers/phi",
    "plain/own_vit",
)


class Grouped(nn.Module):
    """Attention with four query heads, grouped by `groups` key/value heads; norms or rotation may come in between."""

    def __init__(self, groups: int = 4, *, norm: str = "", bias: bool = True, gate: bool = False) -> None:
        super().__init__()
        self.groups, self.norm, self.gate = groups, norm, gate
        self.q, self.k, self.v = (nn.Linear(16, size) for size in (16, 4 * groups, 4 * groups))
        self.o = nn.Linear(16, 16, bias=bias)
        self.scale = nn.Parameter(torch.randn(16 if norm == "all" else 4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm == "all":
            q = F.rms_norm(q, (16,), self.scale)
        q, k, v = (part.view(n, t, -1, 4).transpose(1, 2) for part in (q, k, v))  # N H T D
        if self.norm == "each":
            q, k = F.rms_norm(q, (4,), self.scale), F.rms_norm(k, (4,), self.scale)
        k, v = (part.repeat_interleave(4 // self.groups, 1) for part in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(n, t, 16)
        return self.o(heads * heads.sigmoid() if self.gate else heads)


class Windows(nn.Module):
    """Attention inside windows of four tokens, with a bias per head and a mask per window, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(fused=True, causal=False)
        self.bias = nn.Parameter(torch.randn(1, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        windows = x.view(n * t // 4, 4, c)
        q, k, v = self.attn.qkv(windows).view(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = self.bias + torch.arange(t // 4).float().repeat(n).view(-1, 1, 1, 1).tril()
        heads = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(-1, 4, c)
        return self.attn.proj(heads).view(n, t, c)


@pytest.fixture(scope="module")
def toy() -> tuple[nn.Module, Tensor, nn.Module]:
    """A block with four heads, its example, and its gated copy."""
    torch.manual_seed(1)
    block = Block(fused=True, causal=False).eval()
    block.attn = Grouped()
    model, x = nn.Sequential(block).eval(), torch.randn(3, 6, 16)
    block.norm = nn.LayerNorm(16)
    sites = surgery.find_sites(model, x)
    return model, x, enliven(surgery.insert_gates(model, sites.filter(kind="heads")))


@pytest.mark.parametrize(
    ("make", "count", "moves"),
    [
        (lambda: Attention(fused=True, causal=False), 2, True),
        (lambda: Attention(fused=False, causal=True), 2, True),
        (lambda: Attention(fused=True, causal=False, interleaved=True), 2, True),
        (lambda: Grouped(4), 4, True),
        (lambda: Grouped(2), 2, True),
        (lambda: Grouped(2, norm="each", bias=False), 2, False),
        (Windows, 2, True),
    ],
)
@pytest.mark.parametrize("keep_keys", [False, True])
def test_active_heads_equal_the_others_read_as_zeros(make: Any, count: int, moves: bool, keep_keys: bool) -> None:
    torch.manual_seed(0)
    attention = make().eval()
    x = torch.randn(4, 8, 16 if isinstance(attention, Grouped) else 8)
    parameters = dict(attention.named_parameters())
    with torch.no_grad():
        roles = find_heads(lambda: attention(x), attention(x), parameters, keep_keys=keep_keys)
        assert isinstance(roles, HeadRoles), roles
        assert (roles.count, roles.moves) == (count, moves)
        own = [parameters[name] for name in roles.names]
        for decisions in itertools.product([False, True], repeat=count):
            each = torch.tensor([decisions, decisions[::-1], (False,) * count, (True,) * count])
            with WeighedHeads(roles, own, zeroed(each), 4):
                expected = attention(x)
            with ActiveHeads(roles, own, each, keep_keys=keep_keys):
                found = attention(x)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Grouped(1), "one key/value head serves all queries"),
        (lambda: Grouped(4, norm="all"), "its queries depend on those of other heads (a norm over all heads)"),
        (
            lambda: Grouped(4, gate=True),
            "something stands between the attention product and the output projection (a norm or a gate)",
        ),
    ],
)
def test_what_cannot_be_decided_says_why(make: Any, reason: str) -> None:
    attention, x = make().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        found = find_heads(lambda: attention(x), attention(x), dict(attention.named_parameters()), keep_keys=False)
    assert found == reason


def test_written_out_attention_is_named_in_the_table() -> None:
    model, example = find("timm/swin_pico").build()
    sites = surgery.find_sites(model, example)
    assert not sites.heads and len(sites.heads_rejections) == 4
    assert "attention product is written out" in str(sites)
    with pytest.raises(NoSites, match="written out"):
        sites.filter(kind="heads")


def test_every_subset_of_four_heads(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    model, x, gated = toy
    name = state_of(gated).names[0]
    assert name == "0.heads" and state_of(gated).units == tuple(f"0.heads.{i}" for i in range(4))
    with torch.no_grad():
        bias = x + model[0].attn.o.bias
    for active in itertools.product([False, True], repeat=4):
        decisions = {name: torch.tensor([active, active[1:] + active[:1], (False,) * 4])}
        found = {}
        for mode in ("skip", "mask"):
            with surgery.execution(gated, mode), surgery.force(gated, decisions):
                found[mode] = outputs(gated, x)
        assert_close(found["skip"], found["mask"])
        torch.testing.assert_close(found["skip"][0][2], bias[2])  # no head: what is left is the output bias
    with surgery.force(gated, 0.0):
        torch.testing.assert_close(outputs(gated, x)[0], bias)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, x), outputs(model, x))


@pytest.mark.parametrize("name", ZOO)
def test_laws_over_the_zoo(name: str) -> None:
    entry = find(name)
    model, example = entry.build()
    sites = surgery.find_sites(model, example)
    heads = sites.filter(kind="heads")
    assert len(heads) == sum(site.kind == "attention" for site in sites) > 0 and not sites.heads_rejections
    gated = enliven(surgery.insert_gates(model, heads))
    other = entry.example(3, seed=7)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, other), outputs(model, other))
    options: dict[str, Any] = {"seed": 3, "samples": [0, 1, 2]}
    found = {}
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.force(gated, 0.5, **options):
            found[mode] = outputs(gated, other)
    assert_close(found["skip"], found["mask"])
    assert _gap(found["skip"][0], outputs(model, other)[0]) > 1e-3
    for index in range(3):
        with surgery.force(gated, 0.5, seed=3, samples=[index]):
            alone = outputs(gated, rows(other, [index]))
        assert_close(alone, [t[index : index + 1] if t.shape[:1] == (3,) else t for t in found["skip"]])
    if name == "timm/vit_pico":
        return  # two heads per layer; the others have four or more
    with surgery.execution(gated, "skip"), tape(gated) as events:
        outputs(gated, other)
    assert {event.decisions.shape for event in events} == {(3, heads[0].heads.count)}  # type: ignore[union-attr]


@pytest.mark.parametrize("masked", [False, True])
def test_torch_multihead_attention(masked: bool) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, padding = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    more = {"key_padding_mask": padding, "attn_mask": torch.ones(5, 5).triu(1).bool()} if masked else {}
    decisions = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)
    with torch.no_grad():

        def run() -> Tensor:
            return attention(x, x, x, need_weights=False, **more)[0]

        roles = find_heads(run, run(), dict(attention.named_parameters()), keep_keys=False)
        assert isinstance(roles, HeadRoles) and roles.moves and roles.query.weight == "in_proj_weight", roles
        own = [dict(attention.named_parameters())[name] for name in roles.names]
        with WeighedHeads(roles, own, zeroed(decisions), 3):
            expected = run()
        with ActiveHeads(roles, own, decisions):
            torch.testing.assert_close(run(), expected)
    torch.testing.assert_close(expected[1], attention.out_proj.bias.expand(5, 16))


def test_torch_encoder_layers() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True).eval()
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(3, 5, 16)
    gated = surgery.insert_gates(model, surgery.find_sites(model, x).filter(kind="heads").expect(2))
    found = {}
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.force(gated, 0.5, seed=1, samples=[0, 1, 2]):  # type: ignore[arg-type]
            found[mode] = outputs(gated, x)
    assert_close(found["skip"], found["mask"])


def test_cost_is_what_runs(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    _, x, gated = toy
    state = state_of(gated)
    # 4 columns each of queries, keys, values from 16 channels, at 6 tokens: 6 * 3 * 4 * 16 * 2 = 2304; the product
    # 6 * 6 * 4 * 2 * 2 = 576; the output projection 6 * 4 * 16 * 2 = 768
    assert {state.costs.sites[unit].branch for unit in state.units} == {2304 + 576 + 768}
    with torch.no_grad(), surgery.force(gated, 0.5, seed=1, samples=[0, 1, 2]):
        usage = observe(gated, [x])
    with torch.no_grad(), surgery.force(gated, 0.5, seed=1, samples=[0, 1, 2]), flop_counter() as counter:
        gated(x)
    counted = counter.get_total_flops() / 3
    assert counted == pytest.approx(usage.decided.cost(state.costs) * state.costs.dense), "no router runs"
    assert counted < 0.8 * state.costs.dense


def test_a_gate_knows_the_mean_rate_of_its_heads(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    _, _, gated = toy
    gated = copy.deepcopy(gated)
    state = state_of(gated)
    rates = {name: index / len(state.units) for index, name in enumerate(state.units)}
    state.table = [BudgetPoint(0.5, 0.4, dict.fromkeys(rates, 0.0)), BudgetPoint(0.1, 0.8, rates)]
    surgery.set_budget(gated, 0.6)
    for _, gate in iter_gates(gated):
        assert gate.active_rate == pytest.approx(
            sum(rates[unit] for unit in gate.site.units) / len(gate.site.units) / 2
        )


def test_a_branch_gate_gives_way_to_its_heads(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    model, x, _ = toy
    sites = surgery.find_sites(model, x)
    assert sites.names == ("0",) and [site.name for site in sites.heads] == ["0.heads"]
    assert sites.filter(kind=["attention", "heads"]).names == ("0.heads",)
    assert sites.filter("*.heads").names == ("0.heads",) and sites.filter("0*").names == ("0",)
    assert sites["0.heads"].units[2] == "0.heads.2"


def test_forced_decisions_have_one_per_head(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    _, x, gated = toy
    with surgery.force(gated, {"0.heads": torch.tensor([True, False, True])}), tape(gated) as events:
        outputs(gated, x)
    assert events[0].decisions.tolist() == [[True] * 4, [False] * 4, [True] * 4]
    with (
        pytest.raises(ForceError, match=r"shape \(3, 5\), expected \(3, 4\) or \(3,\)"),
        surgery.force(gated, {"0.heads": torch.ones(3, 5, dtype=torch.bool)}),
    ):
        outputs(gated, x)


def test_pin_refuses_heads_by_name(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    with pytest.raises(PinError, match=r"0\.heads"):
        surgery.pin(toy[2], toy[1])


def test_a_wrapped_projection_is_refused(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    gated = copy.deepcopy(toy[2])
    gated[0].attn.o = nn.Sequential(nn.Linear(16, 16))
    with (
        pytest.raises(PlanMismatch, match="its output projection did not run as a plain linear map"),
        surgery.force(gated, 0.5),
    ):
        outputs(gated, toy[1])


def test_gradients_fall_back_to_the_reference(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    _, x, gated = toy
    x = x.clone().requires_grad_()
    with surgery.force(gated, 0.5, seed=1):
        gated(x).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_convert_save_load_measure(tmp_path: Path) -> None:
    """Bright pictures and dark ones: the whole pipeline with decisions per head."""
    model, _ = find("timm/vit_pico").build()
    generator = torch.Generator().manual_seed(0)
    size = tuple(find("timm/vit_pico").example(1).shape[1:])
    data = [torch.randn(8, *size, generator=generator) + torch.randint(0, 3, (8, 1, 1, 1)) for _ in range(10)]
    gated = surgery.convert(
        model, 0.92, data=data, sites=["heads"], options=surgery.Options(steps=4), samples=64, output_dir=tmp_path / "t"
    )
    state = state_of(gated)
    assert set(state.costs.sites) == set(state.units) and len(state.units) == 4
    rates = observe(gated, data).decided.costs(state.costs)
    assert abs(float(rates.mean()) - 0.92) < 0.05
    report = surgery.measure(gated, data, speed=(), resamples=10)
    assert {peer.name for peer in report.peers} == {
        "static",
        "static+look",
        "frozen",
        "random",
        "shuffled",
        "importance",
    }
    assert [row.kind for row in surgery.status(gated).sites] == ["heads", "heads"]
    surgery.save(gated, tmp_path / "saved")
    loaded = surgery.load(tmp_path / "saved", model=model)
    assert_equal(outputs(loaded, data[0]), outputs(gated, data[0]))
    with surgery.execution(gated, "static"), surgery.execution(loaded, "static"):
        assert_equal(outputs(loaded, data[0]), outputs(gated, data[0]))


def test_training_reaches_every_score(toy: tuple[nn.Module, Tensor, nn.Module]) -> None:
    gated = copy.deepcopy(toy[2])
    data = [torch.randn(8, 6, 16) for _ in range(3)]
    surgery.calibrate(gated, data, 0.8)
    before = {name: gate.router.up.weight.clone() for name, gate in iter_gates(gated)}
    surgery.train_routers(gated, data, budget=0.8, options=surgery.Options(steps=3))
    for name, gate in iter_gates(gated):
        assert bool((gate.router.up.weight != before[name]).any(1).all())
