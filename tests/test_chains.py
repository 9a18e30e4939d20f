"""Chains: what is read as layers in a row and what is not, and what a plan may not say of one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from branch_toys import MAPS, TOKENS, Bottleneck, C, FeedForward, Gated, H, Inverted, Squared, rms_norm
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Stack, convolution, gate_all, mlp

import surgery
from surgery.chain_reading import read_chain
from surgery.chains import Chain
from surgery.errors import CheckpointError
from surgery.skip_paths import chain_features
from surgery.vetting import vet

PRODUCTS = ("itself", "another input", "stream", "mean of the stream", "both active", "one for all")
FLOAT = torch.finfo(torch.float32).eps


class Written(nn.Module):
    """An MLP that does something else besides, on maps of as many tokens as channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(C, H), nn.Linear(H, C)
        self.tokens, self.norm = nn.Parameter(torch.randn(C, 1)), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        if self.kind == "hidden":
            hidden[:, 0] = 7.0
        value = self.down(hidden)
        if self.kind == "value":
            value[:, 1] = 0
        if self.kind == "per token":
            return value * self.tokens
        return self.norm(value * 2) if self.kind == "tokens as channels" else value


class Other(Squared):
    """What looks like an RMSNorm and is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        squares = x.pow(3 if self.kind == "cubed" else 2).mean(1 if self.kind == "over tokens" else -1, keepdim=True)
        factor = squares.rsqrt() if self.kind == "no epsilon" else (squares + 1e-3).rsqrt()
        made = (factor if self.kind == "another" else x) * factor
        return made * made if self.kind == "twice" else self.weight * made


class Product(Gated):
    """Products that are none of a gated MLP."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.gate(x))
        if self.order == "itself":
            return self.down(hidden * hidden)
        if self.order == "another input":
            return self.down(hidden * self.up(x + 1))
        if self.order == "stream":
            return self.down(hidden) * x
        if self.order == "mean of the stream":
            return self.down(hidden) * x.mean((0, 1))
        if self.order == "one for all":
            return self.down(hidden * self.one(x))
        return self.down(hidden * self.act(self.up(x)))


class Twice(nn.Module):
    """A branch whose hidden channels are mixed once more, which is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(C, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, C))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


class Strided(nn.Module):
    """A convolution that looks past its neighbours, which is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(C, H, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(H, C, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


@pytest.mark.parametrize(
    ("branch", "shape", "chain"),
    [
        (Inverted(), MAPS, Chain(H, None, 1, 3, 1, ("relu6", "relu6"))),
        (Inverted(norm=False), MAPS, Chain(H, None, 1, 3, 1, ("relu6", "relu6"))),
        (convolution(C), MAPS, Chain(C, None, 3, 0, 3, ("relu",))),
        (Bottleneck(), MAPS, Chain(H, None, 1, 3, 1, ("relu", "relu"), inner=12)),
        (FeedForward(), TOKENS, Chain(H, 1e-3, 0, 0, 0, ("silu",))),
        (FeedForward(nn.GELU("tanh")), TOKENS, Chain(H, 1e-3, 0, 0, 0, ("gelu_tanh",))),
        (FeedForward(nn.Hardswish()), TOKENS, Chain(H, 1e-3, 0, 0, 0, ("hardswish",))),
        (mlp(C, H), TOKENS, Chain(H, 1e-5, 0, 0, 0, ("gelu",))),
        (Gated("gate first"), TOKENS, Chain(H, None, 0, 0, 0, ("silu",), gated=True)),
        (Gated("gate first", nn.LayerNorm(C)), TOKENS, Chain(H, 1e-5, 0, 0, 0, ("silu",), gated=True)),
        (Gated("gate first", Squared()), TOKENS, Chain(H, 1e-3, 0, 0, 0, ("silu",), rms=True, gated=True)),
        (Gated("up first", Squared(1.0)), TOKENS, Chain(H, 1e-3, 0, 0, 0, ("silu",), rms=True, gated=True)),
        (Gated("both first", rms_norm()), TOKENS, Chain(H, FLOAT, 0, 0, 0, ("silu",), rms=True, gated=True)),
        (Gated("packed", rms_norm()), TOKENS, Chain(H, FLOAT, 0, 0, 0, ("silu",), rms=True, gated=True)),
        (Gated("packed the other way"), TOKENS, Chain(H, None, 0, 0, 0, ("silu",), gated=True)),
    ],
    ids=[
        "inverted",
        "no norm",
        "basic block",
        "bottleneck",
        "functions",
        "tanh",
        "hardswish",
        "mlp",
        "gated",
        "gated, LayerNorm",
        "gated, RMSNorm written out",
        "gated, with an offset",
        "gated, torch's RMSNorm",
        "packed",
        "packed the other way",
    ],
)
def test_a_chain_is_read_with_everything_folded_in(branch: nn.Module, shape: tuple[int, ...], chain: Chain) -> None:
    branch.eval()
    x = torch.randn(shape)
    weights = read_chain(lambda: branch(x), x)
    assert weights is not None and weights.chain == chain
    seen: list[Tensor] = []
    maps = [
        m for n, m in branch.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in ("packed", "one")
    ]
    hook = maps[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        branch(x)
        made = chain_features(weights, x, "NCHW" if len(shape) == 4 else "NTC")
    hook.remove()
    torch.testing.assert_close(made, seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("branch", "shape"),
    [
        *((Product(order), TOKENS) for order in PRODUCTS),
        *((Written(kind), TOKENS) for kind in ("hidden", "value", "per token", "tokens as channels")),
        (
            nn.Sequential(
                nn.Conv2d(C, 2 * H, 1),
                nn.ReLU(),
                nn.Conv2d(2 * H, H, 3, padding=1, groups=H),
                nn.ReLU(),
                nn.Conv2d(H, C, 1),
            ),
            MAPS,
        ),
        *(
            (Gated("up first", Other(kind)), TOKENS)
            for kind in ("cubed", "over tokens", "no epsilon", "twice", "another")
        ),
        (Twice(), TOKENS),
        (Strided(), MAPS),
        (FeedForward(torch.tanh), TOKENS),
        (nn.Linear(C, C), TOKENS),
        (nn.Sequential(nn.Conv2d(C, H, 1), nn.Hardtanh(-1, 1), nn.Conv2d(H, C, 1)), MAPS),
        (nn.Sequential(nn.Conv2d(C, H, 1), nn.ReLU(), nn.Conv2d(H, C, 1), nn.ReLU()), MAPS),
        (nn.Sequential(nn.Conv2d(C, H, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(H, C, 1)), MAPS),
        (
            nn.Sequential(
                nn.Conv2d(C, H, 1), nn.ReLU(), nn.Conv2d(H, H, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(H, C, 1)
            ),
            MAPS,
        ),
        (nn.Sequential(nn.Conv2d(C, H, 1), nn.ReLU(), nn.Conv2d(H, H, 3, padding=1), nn.Conv2d(H, C, 1)), MAPS),
        (nn.Sequential(nn.Conv2d(C, H, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(H, C, 1)), MAPS),
        (nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, H, 1), nn.ReLU(), nn.Conv2d(H, C, 1)), MAPS),
    ],
)
def test_what_is_no_chain(branch: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, C, C) if isinstance(branch, Written) else torch.randn(shape)
    assert read_chain(lambda: branch.eval()(x), x) is None


def test_an_rms_norm_without_an_epsilon_has_that_of_float32_in_half_precision() -> None:
    branch, x = (
        Gated("gate first", rms_norm()).to(torch.bfloat16).eval(),
        0.05 * torch.randn(TOKENS, dtype=torch.bfloat16),
    )
    weights = read_chain(lambda: branch(x), x)
    assert weights is not None and weights.chain.norm == FLOAT
    seen: list[Tensor] = []
    branch.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        branch(x)
        made = chain_features(weights, x, "NTC")
    torch.testing.assert_close(made, seen[0], rtol=0.05, atol=0.05)


def test_maps_and_factors_made_of_the_stream_and_norms_over_tokens_are_no_chain() -> None:
    one = torch.randn(1, 1, C)  # as many numbers as channels
    assert read_chain(lambda: Product("stream").eval()(one), one) is None
    rows, last = torch.randn(H, C), torch.randn(C, H)
    assert read_chain(lambda: F.linear(F.linear(rows, rows).relu(), last), rows) is None
    assert read_chain(lambda: F.linear(F.linear(rows, rows.clone()).relu(), last), rows) is None
    assert read_chain(lambda: F.linear(F.linear(rows, torch.randn(H, C)).relu(), last), rows) is not None
    branch = nn.Sequential(nn.Linear(C, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, C)).eval()
    tokens = torch.randn(3, H, C)  # as many tokens as hidden channels
    assert read_chain(lambda: branch(tokens), tokens) is None
    assert read_chain(lambda: branch(rows), rows) is not None


def test_calls_that_do_not_read_the_stream_do_not_matter() -> None:
    branch, x = Written("").eval(), torch.randn(3, C, C)
    assert read_chain(lambda: branch(x), x) is not None
    weight = torch.randn(C)

    def scaled() -> Tensor:
        made: Tensor = branch(x) * (1 + weight.tanh())
        return made

    assert read_chain(scaled, x) is not None


def test_training_statistics_are_no_chain() -> None:
    branch, x = convolution(C).train(), torch.randn(MAPS)
    assert read_chain(lambda: branch(x), x) is None
    branch = FeedForward().train()
    x = torch.randn(TOKENS)
    assert read_chain(lambda: branch(x), x) is None  # its dropout drops


def test_another_input_than_the_stream_is_no_chain() -> None:
    branch, x = mlp(C).eval(), torch.randn(TOKENS)
    assert read_chain(lambda: branch(x), x) is not None
    assert read_chain(lambda: branch(x * 2), x) is None
    assert read_chain(lambda: branch(x) + 1, x) is None


def test_a_plan_of_impossible_layers_is_refused() -> None:
    gated = gate_all(Stack(Inverted()), torch.randn(2, *MAPS[1:]), skip="narrow")
    plan = surgery.context.state_of(gated).plan
    planned = plan.sites[0]
    assert planned.site.chain is not None
    vet(plan)
    changes = (
        {"first": 999},
        {"middle": 33},
        {"width": 0},
        {"activations": ()},
        {"gated": True},
        {"rms": True},
        {"inner": -1},
        {"inner": 4, "middle": 5},
        {"norm": 1e-5},
        {"first": 0},
        {"last": 0},
    )
    for change in changes:
        chain = replace(planned.site.chain, **change)
        with pytest.raises(CheckpointError, match="chain"):
            vet(replace(plan, sites=(replace(planned, site=replace(planned.site, chain=chain)),)))
    tokens = surgery.context.state_of(gate_all(Stack(mlp(8)), torch.randn(2, 5, 8), skip="narrow")).plan
    vet(tokens)
    assert tokens.sites[0].site.chain is not None
    for change in (
        {"norm": math.inf},
        {"norm": -1.0},
        {"middle": 3, "activations": ("relu", "relu")},
        {"first": 1, "last": 1},
    ):
        site = replace(tokens.sites[0].site, chain=replace(tokens.sites[0].site.chain, **change))
        with pytest.raises(CheckpointError, match="chain"):
            vet(replace(tokens, sites=(replace(tokens.sites[0], site=site),)))
    with pytest.raises(CheckpointError, match="narrow"):
        vet(replace(plan, sites=(replace(planned, rank=H + 1),)))
    with pytest.raises(CheckpointError, match="narrow"):
        vet(replace(plan, sites=(replace(planned, site=replace(planned.site, chain=None)),)))
