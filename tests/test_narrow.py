"""Narrow skip paths: the branch itself with fewer hidden channels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import subject
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Stack, convolution, gate_all, gates, mlp, path_of

import surgery
from surgery import narrowing
from surgery.chain_reading import read_chain
from surgery.chains import Chain
from surgery.errors import CheckpointError, SurgeryError
from surgery.fitting import fit_skip_paths
from surgery.rates import groups_of
from surgery.skip_paths import NarrowSkip, chain_features
from surgery.vetting import vet

C, H = 6, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Inverted(nn.Module):
    """A branch of a MobileNet, BatchNorms with what they could have learned."""

    def __init__(self, channels: int = C, hidden: int = H, norm: bool = True) -> None:
        super().__init__()
        batch = nn.BatchNorm2d if norm else nn.Identity
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=not norm),
            batch(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            batch(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            batch(channels),
        )
        for part in self.body:
            if isinstance(part, nn.BatchNorm2d):
                for value in (part.weight, part.bias, part.running_mean):
                    nn.init.normal_(value)  # type: ignore[arg-type]
                nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


class Bottleneck(nn.Module):
    """A branch of a ResNet-50: a full convolution in the middle, with another width before it than behind it."""

    def __init__(self, channels: int = C, inner: int = 12, hidden: int = H) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        for part in self.body:
            if isinstance(part, nn.BatchNorm2d):
                for value in (part.weight, part.bias, part.running_mean):
                    nn.init.normal_(value, std=0.1)  # type: ignore[arg-type]
                nn.init.uniform_(part.running_var, 0.1, 0.2)  # type: ignore[arg-type]
                nn.init.uniform_(part.weight, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


class FeedForward(nn.Module):
    """A branch written with functions."""

    def __init__(self, act: Any = F.silu) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C, eps=1e-3), nn.Linear(C, H, bias=False), nn.Linear(H, C)
        self.drop, self.act, self.gamma = nn.Dropout(), act, nn.Parameter(torch.randn(C))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.drop(self.act(self.up(self.norm(x)))))) * self.gamma


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


class Squared(nn.Module):
    """An RMSNorm written out, as transformers has it."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(C)), offset

    def forward(self, x: Tensor) -> Tensor:
        made = x.to(torch.float32)
        made = made * torch.rsqrt(made.pow(2).mean(-1, keepdim=True) + 1e-3)
        if self.offset:
            return (made * (self.offset + self.weight.float())).type_as(x)  # as Gemma
        return self.weight * made.to(x.dtype)


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


def rms_norm(channels: int = C) -> nn.RMSNorm:
    norm = nn.RMSNorm(channels)
    nn.init.normal_(norm.weight)
    return norm


class Gated(nn.Module):
    """A branch with a product of two maps; in what order they come differs."""

    def __init__(self, order: str, norm: nn.Module | None = None, channels: int = C, hidden: int = H) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.gate, self.up = nn.Linear(channels, hidden), nn.Linear(channels, hidden, bias=False)
        self.down, self.packed = nn.Linear(hidden, channels), nn.Linear(channels, 2 * hidden)
        self.one = nn.Linear(channels, 1)
        self.order, self.act = order, nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.order == "gate first":
            return self.down(self.act(self.gate(x)) * self.up(x))
        if self.order == "up first":
            up = self.up(x)
            return self.down(up * self.act(self.gate(x)))
        if self.order == "both first":
            gate, up = self.gate(x), self.up(x)
            return self.down(up * self.act(gate))
        one, other = self.packed(x).chunk(2, dim=-1)
        return self.down(self.act(one) * other if self.order == "packed" else one * self.act(other))


PRODUCTS = ("itself", "another input", "stream", "mean of the stream", "both active", "one for all")


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


TOKENS, MAPS = (3, 5, C), (3, C, 5, 7)
FLOAT = torch.finfo(torch.float32).eps


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


@pytest.mark.parametrize("taps", [1, 9])
def test_the_channels_that_matter_are_kept(taps: int) -> None:
    """Channels 1 and 4 make the output; 3 is twice channel 1, so that one of both is enough."""
    x = torch.randn(400, 5, taps)
    x[:, 3] = 2 * x[:, 1] + 1e-3 * torch.randn(400, taps)
    weight = torch.randn(5, taps, 3)
    weight[[0, 2]] = 0
    wanted = torch.einsum("mht,htc->mc", x, weight)
    assert narrowing.narrowest(x, wanted, 2).tolist() in ([1, 4], [3, 4])
    assert narrowing.narrowest(x, wanted, 5).tolist() == [0, 1, 2, 3, 4]


def test_leaving_one_out_costs_what_solving_again_says() -> None:
    """Of 4 channels the one goes without which the error of a new least-squares problem is smallest."""
    x, wanted = torch.randn(200, 4), torch.randn(200, 2)
    wanted = x @ torch.randn(4, 2) * 0.4 + wanted
    errors = []
    for left in range(4):
        some = torch.cat((x[:, [i for i in range(4) if i != left]], torch.ones(200, 1)), 1)
        errors.append(float((some @ torch.linalg.lstsq(some, wanted).solution - wanted).square().sum()))
    expected = [i for i in range(4) if i != min(range(4), key=errors.__getitem__)]
    assert narrowing.narrowest(x[:, :, None], wanted, 3, ridge=1e-9).tolist() == expected


@pytest.mark.parametrize(
    ("branch", "shape"), [(Inverted, MAPS), (FeedForward, TOKENS), (lambda: Gated("gate first", Squared()), TOKENS)]
)
def test_a_branch_with_spare_channels_loses_nothing(branch: Any, shape: tuple[int, ...]) -> None:
    one = branch()
    last = [m for n, m in one.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in ("packed", "one")][
        -1
    ]
    spare = torch.randperm(H)[: H // 2].sort().values
    with torch.no_grad():
        last.weight[:, spare] = 0
    model = Stack(one)
    data = [torch.randn(64, *shape[1:])]
    gated = gate_all(model, data[0][:2], skip="narrow", width=0.5)
    (gate,) = gates(gated)
    assert isinstance(gate.skip_path, NarrowSkip) and gate.skip_path.width == H // 2
    with surgery.force(gated, 0.0), torch.no_grad():
        torch.testing.assert_close(gated(data[0]), data[0])  # it contributes nothing before it is fitted
    left = fit_skip_paths(gated, data)
    assert left[gate.site.name] < 1e-4
    x = torch.randn(4, *shape[1:])
    with surgery.force(gated, 0.0), torch.no_grad():
        torch.testing.assert_close(gated(x), model(x), rtol=1e-2, atol=1e-2)


def test_a_bottleneck_with_spare_channels_on_both_sides_of_its_middle_loses_nothing() -> None:
    one = Bottleneck(inner=8, hidden=H)
    with torch.no_grad():
        one.body[3].weight[:, torch.randperm(8)[:4]] = 0
        one.body[6].weight[:, torch.randperm(H)[: H // 2]] = 0
    model, data = Stack(one), [torch.randn(64, *MAPS[1:])]
    gated = gate_all(model, data[0][:2], skip="narrow", width=0.5)
    (gate,) = gates(gated)
    path = gate.skip_path
    assert isinstance(path, NarrowSkip) and (path.width, path.inner) == (H // 2, 4)
    assert fit_skip_paths(gated, data)[gate.site.name] < 1e-4
    with surgery.force(gated, 0.0), torch.no_grad():
        torch.testing.assert_close(gated(data[0]), model(data[0]), rtol=1e-2, atol=1e-2)
    narrower = gate_all(Stack(one), data[0][:2], skip="narrow", width=0.25)
    assert 0.01 < fit_skip_paths(narrower, data)[gate.site.name] < 1


def test_a_bottleneck_is_as_wide_as_a_share_of_its_compute_allows() -> None:
    model = Stack(*(Bottleneck(32, 8, 8) for _ in range(4))).eval()
    sites = surgery.find_sites(model, torch.randn(2, 32, 8, 8))
    chain = sites[0].chain
    assert chain is not None and chain.flops(32, 8) == pytest.approx(sites[0].flops / 64)
    share = 1 - 0.55 / 0.9  # with nine of ten closed 0.45 is reached
    for planned in sites.plan(budget=0.6).sites:
        assert planned.skip == "narrow"
        assert planned.rank > int(share * 8)  # the convolution in the middle costs the square of its width
        assert path_of("narrow", 32, "NCHW", planned.rank, chain).flops(64) <= share * planned.site.flops
        assert path_of("narrow", 32, "NCHW", planned.rank + 1, chain).flops(64) > share * planned.site.flops


def test_where_only_affine_paths_are_left_narrow_ones_may_be_as_narrow_as_the_budget_asks() -> None:
    model = Stack(*(Bottleneck(32, 8, 8) for _ in range(12)), head=nn.Conv2d(32, 32, 3, padding=1)).eval()
    sites = surgery.find_sites(model, torch.randn(2, 32, 8, 8))
    share = sum(site.share for site in sites)
    assert 0.5 < share < 0.7
    for budget, skip in ((0.9, "narrow"), (0.6, "narrow"), (0.5, "affine")):
        planned = sites.plan(budget=budget).sites
        assert {p.skip for p in planned} == {skip}, budget
    assert 1 - 0.4 / (0.7 * share) < 0.2 < 1 - 0.4 / (0.9 * share)  # else 0.6 would tell nothing


def test_a_second_fit_keeps_the_channels_and_what_was_trained() -> None:
    model = Stack(Inverted())
    data = [torch.randn(64, *MAPS[1:])]
    gated = gate_all(model, data[0][:2], skip="narrow")
    path = gates(gated)[0].skip_path
    fit_skip_paths(gated, data)
    with torch.no_grad():
        path.first.mul_(1.1)  # type: ignore[operator]
    before = {name: p.clone() for name, p in path.named_parameters()}
    fit_skip_paths(gated, [torch.randn(64, *MAPS[1:])])
    assert {n for n, p in path.named_parameters() if not torch.equal(p, before[n])} == {"last", "bias"}


def test_more_channels_leave_less() -> None:
    model = Stack(convolution(8), convolution(8)).eval()
    data = [torch.randn(32, 8, 6, 6)]
    left = []
    for width in (0.25, 0.5, 0.9):
        gated = gate_all(model, data[0][:2], skip="narrow", width=width)
        left.append(sum(fit_skip_paths(gated, data).values()))
    assert left[0] > left[1] > left[2]


def test_plans_take_them_where_a_branch_is_a_chain() -> None:
    model = Stack(Inverted(), Inverted(), nn.Conv2d(C, C, 3, padding=1))
    sites = surgery.find_sites(model.eval(), torch.randn(2, *MAPS[1:]))
    planned = sites.plan(skip="narrow", width=0.3).sites
    assert [(p.skip, p.rank) for p in planned] == [("narrow", 4), ("narrow", 4), (sites.plan().sites[2].skip, 0)]
    for width in (0, 1, 1.5, True, "half"):
        with pytest.raises(SurgeryError, match="width must be"):
            sites.plan(skip="narrow", width=width)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["timm/test_resnet", "timm/vit_pico", "plain/encoder", "transformers/bert", "transformers/llama", "timm/resnet50"],
)
def test_costs_are_what_runs(name: str) -> None:
    one = subject(name)
    chains = [p for p in one.sites.plan().sites if p.site.chain is not None]
    assert chains, name
    for planned in chains[:1]:
        chain = planned.site.chain
        assert chain is not None
        path = path_of("narrow", planned.site.channels, planned.site.layout, chain.width, chain)
        # with all of its channels it costs what the branch costs
        assert path.flops(planned.site.positions) == pytest.approx(planned.site.flops, rel=0.02)


BRANCHES = [
    (lambda: Inverted(8, 32), (8, 6, 6)),
    (lambda: Bottleneck(8, 16, 32), (8, 6, 6)),
    (lambda: mlp(8, 32), (5, 8)),
    (lambda: Gated("packed", rms_norm(8), channels=8, hidden=32), (5, 8)),
]


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_no_gradient_is_lost(branch: Any, shape: tuple[int, ...]) -> None:
    (gate,) = gates(gate_all(Stack(branch()), torch.randn(2, *shape), skip="narrow"))
    path = gate.skip_path
    for parameter in path.parameters():
        nn.init.normal_(parameter)
    path(torch.randn(4, *shape)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in path.parameters())


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_round_trip(tmp_path: Path, branch: Any, shape: tuple[int, ...]) -> None:
    model = Stack(branch(), branch())
    data = [torch.randn(64, *shape)]
    gated = gate_all(model, data[0][:2], skip="narrow")
    assert all(left < 1 for left in fit_skip_paths(gated, data).values())
    surgery.save(gated, tmp_path / "made")
    again = surgery.load(tmp_path / "made", model=model)
    x = torch.randn(3, *shape)
    with surgery.force(gated, 0.0), surgery.force(again, 0.0), torch.no_grad():
        assert torch.equal(gated(x), again(x))
        assert not torch.equal(gated(x), x)


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


def test_a_budget_asks_for_narrow_paths_of_the_width_that_reaches_it() -> None:
    model = Stack(*(convolution(16) for _ in range(4))).eval()
    sites = surgery.find_sites(model, torch.randn(2, 16, 8, 8))
    assert sum(site.share for site in sites) == pytest.approx(1)
    for budget, width in ((0.9, 1 - 0.55 / 0.9), (0.6, 1 - 0.55 / 0.9), (0.35, 1 - 0.65 / 0.9)):
        planned = sites.plan(budget=budget).sites
        assert {(p.skip, p.rank) for p in planned} == {("narrow", int(16 * width))}, budget
    for plan in (sites.plan(), sites.plan(budget=0.2), sites.plan(budget=1.0)):
        assert {p.skip for p in plan.sites} == {
            "depthwise"
        }  # nobody asked, or they would be too narrow, or for nothing
    assert {p.skip for p in sites.plan(budget=0.6, cost="latency").sites} == {"linear"}
    assert {p.skip for p in sites.plan(budget=0.6, skip="depthwise").sites} == {"depthwise"}
    assert {p.rank for p in sites.plan(budget=0.6, skip="narrow", width=0.25).sites} == {4}
    assert {p.rank for p in sites.plan(skip="narrow").sites} == {8}
    head = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)))
    half = Stack(convolution(16), head=head).eval()  # 0.45 would take too narrow paths here
    sites = surgery.find_sites(half, torch.randn(2, 16, 8, 8))
    for budget, skip, width in ((0.8, "narrow", 1 - 0.2 / (0.7 * sites[0].share)), (0.6, "depthwise", 0)):
        assert [(p.skip, p.rank) for p in sites.plan(budget=budget).sites] == [(skip, int(16 * width))]
    tokens = surgery.find_sites(Stack(mlp(8)).eval(), torch.randn(2, 5, 8))
    assert {p.skip for p in tokens.plan(budget=0.6).sites} == {"identity"}
    assert {(p.skip, p.rank) for p in tokens.plan(trained=True, budget=0.4).sites} == {("narrow", 32 // 8)}
    for plan in (tokens.plan(trained=True), tokens.plan(trained=True, budget=0.3)):
        assert "narrow" not in {p.skip for p in plan.sites}
    assert "narrow" not in {p.skip for p in tokens.plan(trained=True, budget=0.6, cost="latency").sites}


def test_a_conversion_looks_at_the_smallest_budget_it_trains_for() -> None:
    model = Stack(*(convolution(16) for _ in range(8)), head=nn.Linear(16, 3), pool=True).eval()
    data = [torch.randn(16, 16, 6, 6) for _ in range(5)]
    for budgets, kind in ((None, "narrow"), ((0.2, 0.9), "depthwise")):
        options = surgery.Options(steps=1, budgets=budgets)
        gated = surgery.convert(model, 0.7, data=data, options=options, samples=64)
        assert {p.skip for p in surgery.context.state_of(gated).plan.sites} == {kind}


def test_narrow_paths_learn_more_slowly() -> None:
    model = Stack(Inverted(), nn.Conv2d(C, C, 3, padding=1)).eval()
    gated = gate_all(model, torch.randn(2, *MAPS[1:]), skip="narrow")
    narrow, other = gates(gated)
    groups = {g["lr"]: g["params"] for g in groups_of((narrow, other), "skip_path", 1.0, by_width=False)}
    assert set(groups) == {0.1, 1.0}
    assert list(map(id, groups[0.1])) == list(map(id, narrow.skip_path.parameters()))
    gated = gate_all(Stack(Gated("gate first")).eval(), torch.randn(2, 5, C), skip="narrow")
    assert [g["lr"] for g in groups_of(gates(gated), "skip_path", 1.0, by_width=False)] == [0.5]


@pytest.mark.parametrize(("branch", "shape"), BRANCHES)
def test_half_precision_is_folded_and_solved_in_more(branch: Any, shape: tuple[int, ...]) -> None:
    model = Stack(branch()).to(torch.bfloat16)
    data = [torch.randn(64, *shape, dtype=torch.bfloat16)]
    gated = gate_all(model, data[0][:2], skip="narrow", width=0.75)
    (gate,) = gates(gated)
    assert fit_skip_paths(gated, data)[gate.site.name] < 0.5
    assert gate.skip_path.first.dtype == torch.float32
    with surgery.force(gated, 0.0), torch.no_grad():
        assert gated(data[0]).dtype == torch.bfloat16


def test_a_branch_that_was_changed_since_is_refused() -> None:
    gated = gate_all(Stack(mlp(8)), torch.randn(2, 5, 8), skip="narrow")
    (holder,) = (m for m in gated.modules() if isinstance(m, nn.Sequential) and isinstance(m[-2], nn.GELU))
    holder[-2] = nn.ReLU()
    with pytest.raises(SurgeryError, match="no longer has the layers"):
        fit_skip_paths(gated, [torch.randn(32, 5, 8)])
