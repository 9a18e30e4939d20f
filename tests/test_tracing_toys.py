"""One small network per graph pattern: which sites are found, and what open and closed gates then compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subjects import assert_close, assert_equal, outputs
from torch import Tensor, nn

import surgery
from surgery.gates import iter_gates
from surgery.vetting import vet

N, T, C = 3, 5, 8


def convert(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[surgery.Sites, nn.Module]:
    """Sites of a toy, and the toy with gates whose skip paths are the identity."""
    model.eval().requires_grad_(False)  # as the gated copy's: see `Entry.build`
    sites = surgery.find_sites(model, kwargs if kwargs else args if len(args) > 1 else args[0])
    return sites, surgery.insert_gates(model, sites.plan(skip="identity"))


def check(model: nn.Module, x: Any, expected: list[str], closed: Tensor | None = None) -> surgery.Sites:
    """The sites are `expected`; open is the original, closed is `closed`, and `skip` is `mask`."""
    sites, gated = convert(model, x)
    assert list(sites.names) == expected, str(sites)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, x), outputs(model, x))
    for mode in ("skip", "mask"):
        if closed is not None:
            with surgery.execution(gated, mode), surgery.force(gated, 0.0):  # type: ignore[arg-type]
                assert_close(outputs(gated, x), [closed], 1e-6)
    for seed in range(4):
        found = []
        for mode in ("skip", "mask"):
            with surgery.execution(gated, mode), surgery.force(gated, 0.5, seed):  # type: ignore[arg-type]
                found.append(outputs(gated, x))
        assert_close(*found, 1e-5)
    return sites


def tokens() -> Tensor:
    return torch.randn(N, T, C)


def maps() -> Tensor:
    return torch.randn(N, C, 6, 6)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))


class Base(nn.Module):
    """A norm and an MLP, for toys that add them up in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.mlp = mlp()


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class ResidualSwapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x)) + x


class TorchAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.mlp(self.norm(x)))


class MethodAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.mlp(self.norm(x)))


class PlusEqual(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(x))
        y += x
        return y


class PlusEqualOnStream(Base):
    """The stream itself is written to; it was made here, so the caller's tensor is safe."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x += self.mlp(x)
        return x


@pytest.mark.parametrize("toy", [Residual, ResidualSwapped, TorchAdd, MethodAdd, PlusEqual])
def test_plain_sum(toy: type[nn.Module]) -> None:
    x = tokens()
    sites = check(toy(), x, ["mlp"], x)
    assert sites[0].granularities == ("sample", "token")
    assert sites[0].layout == "NTC" and sites[0].channels == C and sites[0].positions == T
    assert sites[0].kind == "mlp" and sites[0].host == ""


def test_in_place_sum_on_the_stream() -> None:
    x, toy = tokens(), PlusEqualOnStream()
    check(toy, x, ["mlp"], toy.norm(x))


def test_flops_and_parameters_of_a_branch() -> None:
    """By hand: two maps of C x 2C and 2C x C, T tokens, 2 per multiply-add; norms count 0 FLOPs."""
    sites = check(Residual(), tokens(), ["mlp"])
    assert sites[0].flops == 2 * T * (C * 2 * C + 2 * C * C)
    assert sites[0].parameters == sum(p.numel() for p in Residual().parameters())
    assert sites[0].share == 1.0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)  # N H T D
        weights = (q @ k.transpose(-2, -1) * (channels // 2) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, channels))


class Parallel(nn.Module):
    """GPT-NeoX, Phi: x + attention(n) + mlp(n)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.attn = Attention()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.attn(n) + self.mlp(n)


class ParallelGrouped(Parallel):
    """The branches are added to each other first; the order of the sums decides the rounding."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return self.mlp(n) + self.attn(n) + x


@pytest.mark.parametrize("toy", [Parallel, ParallelGrouped])
def test_parallel_branches(toy: type[nn.Module]) -> None:
    x = tokens()
    sites, gated = convert(toy(), x)
    assert sorted(sites.names) == ["attn", "mlp"]
    assert sites["attn"].granularities == sites["mlp"].granularities == ("sample", "token")
    model = surgery.remove(gated)
    check(model, x, list(sites.names), x)
    sites, gated = convert(model, x)
    n = model.norm(x)
    for site, branch in (("attn", model.mlp), ("mlp", model.attn)):
        with surgery.force(gated, {site: False, ({"attn", "mlp"} - {site}).pop(): True}):
            assert_close(outputs(gated, x), [x + branch(n)], 1e-6)


class ParallelDropped(Parallel):
    """Falcon: a functional dropout, which does nothing in eval, stands between the two sums."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        branches = self.mlp(n)
        branches += self.attn(n)
        return x + torch.nn.functional.dropout(branches, p=0.5, training=self.training)


def test_dropout_between_sums_is_seen_through() -> None:
    x = tokens()
    check(ParallelDropped(), x, ["mlp", "attn"], x)


class Projection(nn.Module):
    """A strided block: both terms start from x, the cheaper one is the skip side."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, 2 * C, 3, 2, 1)
        self.conv2 = nn.Conv2d(2 * C, 2 * C, 3, 1, 1)
        self.downsample = nn.Sequential(nn.Conv2d(C, 2 * C, 1, 2), nn.BatchNorm2d(2 * C))
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu())
        return self.downsample(x) + y if self.swapped else y + self.downsample(x)


@pytest.mark.parametrize("swapped", [False, True])
def test_projection_shortcut(swapped: bool) -> None:
    x, toy = maps(), Projection(swapped).eval()
    sites = check(toy, x, ["conv2"], toy.downsample(x).detach())
    assert sites[0].channels == 2 * C and sites[0].layout == "NCHW" and sites[0].kind == "block"
    assert sites[0].modules == ("conv1", "conv2")


class SelfOutput(nn.Module):
    """BERT: the residual arrives as an argument, so the sum is open here."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + residual)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.output = SelfOutput()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x), x)


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_open_residual_is_inlined_into_its_parent() -> None:
    x, toy = tokens(), Stack(Layer).eval()
    sites = check(
        toy,
        x,
        ["layers.0", "layers.1"],
        toy.layers[1].output.norm(toy.layers[0].output.norm(x)).detach(),
    )
    assert [site.host for site in sites] == ["layers.0", "layers.1"]
    assert sites[0].modules == ("layers.0.attention", "layers.0.output.dense")


class Escaping(Base):
    """The branch's output is also returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mlp(self.norm(x))
        return x + y, y


class EscapingInside(Base):
    """Only the norm and the first map are used elsewhere; the rest of the branch can be skipped."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.mlp[0](self.norm(x))
        return x + self.mlp[2](self.mlp[1](hidden)), hidden


def test_escaping_output_is_rejected() -> None:
    x = tokens()
    sites = surgery.find_sites(Escaping(), x)
    assert len(sites) == 0
    assert any("outside" in rejection.reason for rejection in sites.rejections), sites.rejections


def test_region_shrinks_to_what_is_its_own() -> None:
    x, toy = tokens(), EscapingInside()
    sites, gated = convert(toy, x)
    assert sites[0].modules == ("mlp.1", "mlp.2") and len(sites) == 1
    with surgery.force(gated, 0.0):
        closed = outputs(gated, x)
    assert_equal(closed, [x, toy.mlp[0](toy.norm(x)).detach()])


class Optional(Base):
    """An argument that defaults to None and changes the path."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.mlp(self.norm(x))
        if mask is not None:
            y = y * mask[..., None]
        return x + y * scale


@pytest.mark.parametrize("probed_with_mask", [False, True])
def test_none_default_keeps_one_graph_per_pattern(probed_with_mask: bool) -> None:
    x, toy = tokens(), Optional().eval()
    mask = (torch.rand(N, T) > 0.5).float()
    with_mask, without = {"x": x, "mask": mask}, {"x": x}
    _, gated = convert(toy, **(with_mask if probed_with_mask else without))
    for example in (
        with_mask,
        without,
        {"x": x, "mask": mask, "scale": 2.0},
        {"x": x, "mask": None},
        {"x": x, "scale": 0.5},
    ):
        with surgery.force(gated, 1.0):
            assert_equal(outputs(gated, example), outputs(toy, example))
        with surgery.force(gated, 0.0):
            assert_equal(outputs(gated, example), [x])
        found = []
        for mode in ("skip", "mask"):
            with (
                surgery.execution(gated, mode),
                surgery.force(gated, {gated_name(gated): torch.tensor([True, False, True])}),
            ):  # type: ignore[arg-type]
                found.append(outputs(gated, example))
        assert_close(*found, 1e-6)
    with surgery.force(gated, 1.0):  # positional as well
        assert_equal([gated(x, mask).detach()], [toy(x, mask).detach()])


def gated_name(gated: nn.Module) -> str:
    return next(iter(iter_gates(gated)))[0]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor, *, gain: float = 1.0, shift: Tensor | None = None) -> Tensor:
        y = self.map(x) * gain
        return y if shift is None else y + shift


class Keywords(nn.Module):
    """Transformers layers hand their **kwargs down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.inner(x, **kwargs)


def test_keyword_arguments_pass_through() -> None:
    x, toy = tokens(), Keywords().eval()
    sites, gated = convert(toy, x)
    assert sites.names == ("inner",)
    shift = torch.randn(N, T, C)
    for extra in ({}, {"gain": 2.0}, {"shift": shift}, {"gain": 0.5, "shift": shift}):
        with surgery.force(gated, 1.0):
            assert_equal([gated(x, **extra).detach()], [toy(x, **extra).detach()])
        with surgery.force(gated, 0.0):
            assert_equal([gated(x, **extra).detach()], [x])
        found = []
        for mode in ("skip", "mask"):
            with surgery.execution(gated, mode), surgery.force(gated, {"inner": torch.tensor([True, False, True])}):  # type: ignore[arg-type]
                found.append([gated(x, **extra).detach()])
        assert_close(*found, 1e-6)


class InPlaceOnStream(Base):
    """What follows the sum writes into it; a skipped branch must not write into the caller's tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(self.norm(x))
        return y.relu_()


class InPlaceModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)


@pytest.mark.parametrize(("toy", "make"), [(InPlaceOnStream, tokens), (InPlaceModule, maps)])
def test_in_place_after_the_sum(toy: type[nn.Module], make: Any) -> None:
    x = make()
    before = x.clone()
    check(toy(), x, ["mlp" if toy is InPlaceOnStream else "conv"], before.relu())
    assert torch.equal(x, before)


class InPlaceInBranch(nn.Module):
    """The branch starts with an in-place activation on the stream itself, which the sum then reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(C, C, 1)
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x.relu_())
        return x + y


def test_branch_that_writes_into_the_stream_is_rejected() -> None:
    x = maps()
    sites = surgery.find_sites(InPlaceInBranch(), x)
    assert len(sites) == 0
    assert [rejection.reason for rejection in sites.rejections] == ["it changes its input in place"]


class Cache(nn.Module):
    """Keys are written to a store that the caller reads later."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(C, C)
        self.query = nn.Linear(C, C)
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor, store: list[Tensor]) -> Tensor:
        key = self.key(x)
        store.append(key)
        weights = (self.query(x) @ key.transpose(1, 2)).softmax(-1)
        return x + self.out(weights @ x)


def test_side_effects_stay_outside_the_branch() -> None:
    x, toy = tokens(), Cache().eval()
    sites, gated = convert(toy, x, [])
    assert len(sites) == 1
    assert "key" not in sites[0].modules and {"query", "out"} <= set(sites[0].modules)
    for mode in ("skip", "mask"):
        for rate in (0.0, 0.5, 1.0):
            store: list[Tensor] = []
            with surgery.execution(gated, mode), surgery.force(gated, rate):  # type: ignore[arg-type]
                y = gated(x, store)
            assert_equal(store, [toy.key(x)])
            if rate == 0.0:
                assert torch.equal(y, x)


class Scaled(Base):
    """Layer scale and stochastic depth belong to the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(C))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.gamma * self.mlp(self.norm(x)))


def test_layer_scale_and_drop_belong_to_the_branch() -> None:
    x, toy = tokens(), Scaled()
    sites = check(toy, x, ["mlp"], x)
    assert sites[0].parameters == sum(p.numel() for p in toy.parameters())
    assert set(sites[0].modules) == {"norm", "mlp", "drop"}


class Shapes(nn.Module):
    """The branch reads the stream's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(T, T)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        y = self.mix(x.transpose(1, 2).reshape(B * D, L)).reshape(B, D, -1)
        return x + y.transpose(1, 2).reshape(x.size(0), L, D)


def test_shape_reads_are_the_branchs_own() -> None:
    """B is read from the branch's own input, so fewer samples give a smaller B; tokens are mixed, so sample only."""
    x = tokens()
    sites = check(Shapes(), x, ["mix"], x)
    assert sites[0].granularities == ("sample",)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


def test_batch_norm_in_the_branch() -> None:
    x, toy = maps(), Normed()
    toy.bn.running_mean.normal_()  # type: ignore[union-attr, operator]
    sites = check(toy, x, names(toy, x), x)
    assert set(sites[0].modules) == {"conv", "bn"} and sites[0].granularities == ("sample",)


def names(model: nn.Module, x: Tensor) -> list[str]:
    return list(surgery.find_sites(model.eval(), x).names)


class AcrossSamples(nn.Module):
    """The branch compares each sample with the others: it cannot run on a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x - x.mean(0))


def test_branch_that_mixes_samples_is_restricted_or_rejected() -> None:
    x, toy = tokens(), AcrossSamples().eval()
    sites = surgery.find_sites(toy, x)
    if not len(sites):
        assert any("sample" in rejection.reason for rejection in sites.rejections)
        return
    assert "sample" in sites[0].restriction
    gated = surgery.insert_gates(toy, sites.plan(skip="identity"))
    decisions = torch.tensor([True, False, True])
    expected = torch.where(decisions[:, None, None], toy(x), x).detach()
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.force(gated, {sites[0].name: decisions}):  # type: ignore[arg-type]
            assert_close(outputs(gated, x), [expected], 1e-6)


class TokenMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(T, T)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


class Shift(nn.Module):
    """Every token reads its left neighbour: equal on constant inputs, not on real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x.roll(1, 1))


class Positional(nn.Module):
    """Each token has its own gain: separable, but the gain has a token axis."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)
        self.gain = nn.Parameter(torch.randn(1, T, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x * self.gain)


@pytest.mark.parametrize("toy", [TokenMixing, Shift, Positional])
def test_branch_that_needs_all_tokens_is_not_per_token(toy: type[nn.Module]) -> None:
    x = tokens()
    sites = check(toy(), x, ["mix" if toy is TokenMixing else "map"], x)
    assert sites[0].granularities == ("sample",)


class Conditional(nn.Module):
    """`forward` reads a value, so it cannot be traced; the module around it can still skip it as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x) if float(x.sum()) > 0 else -self.map(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Conditional()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.odd(x)


def test_untraceable_child_is_a_leaf() -> None:
    """Its sign depends on the whole batch, so it may not run on a part of it."""
    x, toy = tokens(), Around().eval()
    sites = surgery.find_sites(toy, x)
    if not len(sites):
        assert sites.rejections
        return
    gated = surgery.insert_gates(toy, sites.plan(skip="identity"))
    for example in (x, -x):
        with surgery.force(gated, 1.0):
            assert_equal(outputs(gated, example), outputs(toy, example))


class Untraceable(nn.Module):
    """The sum itself is in a `forward` that reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.map(x)
        return x - self.map(x)


def test_untraceable_forward_is_reported() -> None:
    sites = surgery.find_sites(Untraceable(), tokens())
    assert len(sites) == 0
    assert any(rejection.reason for rejection in sites.rejections), sites.rejections


class Shared(nn.Module):
    """One block used three times: a decision could not be told from that of another use."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


def test_shared_block_is_rejected() -> None:
    sites = surgery.find_sites(Shared(), tokens())
    assert len(sites) == 0
    assert any("several times per call" in rejection.reason for rejection in sites.rejections), sites.rejections


class Functional(nn.Module):
    """No submodule at all: the site is named after its host."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight)


def test_branch_without_modules_is_named_after_its_host() -> None:
    x = tokens()
    sites = surgery.find_sites(Stack(Functional), x)
    assert [site.host for site in sites] == ["layers.0", "layers.1"]
    assert sites.names == ("layers.0#0", "layers.1#0") or all(s.name.startswith(s.host) for s in sites)
    check(Stack(Functional), x, list(sites.names), x)


class Nothing(nn.Module):
    """Sums that are no residual: a bias, a position table, two unrelated inputs, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(C, C)
        self.right = nn.Linear(C, C)
        self.positions = nn.Parameter(torch.randn(1, T, C))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = self.left(x) + self.right(z)
        return torch.cat((y + self.positions, y + 1.0), -1)


def test_sums_that_are_not_residual() -> None:
    sites = surgery.find_sites(Nothing(), (tokens(), tokens()))
    assert len(sites) == 0, str(sites)


class Vector(nn.Module):
    """A residual MLP on plain vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_vectors() -> None:
    x = torch.randn(N, C)
    sites = check(Vector(), x, ["mlp"], x)
    assert sites[0].layout == "NC" and sites[0].granularities == ("sample",)


class Hook(Base):
    """A deep chain through containers that hold lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(C, C), "b": nn.Linear(C, C)})

    def forward(self, x: Tensor) -> Tensor:
        for name, part in self.parts.items():
            x = x + part(x) if name == "a" else x - part(x)
        return x


def test_loops_over_containers() -> None:
    x, toy = tokens(), Hook().eval()
    check(toy, x, ["parts.a"], (x - toy.parts["b"](x)).detach())


class Windowed(nn.Module):
    """A branch whose program depends on the size of the map (TinyViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        if height % 4:
            padded = nn.functional.pad(x, (0, 0, 0, 4 - height % 4))
            return x + self.conv(padded)[:, :, :height]
        return x + self.conv(x)


def test_sizes_that_decide_what_is_computed_belong_to_the_call_pattern() -> None:
    x = maps()
    model = Windowed()
    sites = check(model, x, ["conv"], closed=x)
    assert sites.patterns[""] == [[[f"sized:4:{C},6,6"], [], []]]
    vet(sites.plan())  # a checkpoint may hold such a pattern
    _, gated = convert(model, x)
    other = torch.randn(N, C, 8, 6)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, other), outputs(model, other))
    with surgery.force(gated, 0.0):
        assert_equal(outputs(gated, other), [other])


def test_endless_sizes_run_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("surgery.programs.MOST", 2)
    model = Windowed()
    _, gated = convert(model, maps())
    with surgery.force(gated, 0.0):
        for height in (8, 9, 10):
            x = torch.randn(N, C, height, 6)
            assert_equal(outputs(gated, x), [x] if height == 8 else outputs(model, x))
    assert caplog.text.count("further ones run dense") == 1


class Rest(nn.Module):
    """A module whose further outputs are passed on as a tuple, `outputs[1:]` (MPNet)."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(C, C)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.map(x),)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Rest.Inner()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            found = self.inner(x)
            return (found[0] + x,) + found[1:]  # noqa: RUF005  (as MPNet writes it)

    def __init__(self) -> None:
        super().__init__()
        self.outer = Rest.Outer()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.outer(x)
        assert len(outputs) == 1
        return outputs[0].relu()


def test_the_rest_of_a_tuple_is_empty_where_the_branch_is_skipped() -> None:
    x = tokens()
    check(Rest(), x, ["outer.inner"], closed=x.relu())
