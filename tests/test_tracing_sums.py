"""Ways of writing a residual sum: which sites are found, and what open and closed gates then compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from subjects import assert_close, assert_equal, outputs
from torch import Tensor, nn
from tracing_toys import Base, C, N, Residual, T, check, convert, maps, mlp, tokens

import surgery


class ResidualSwapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x)) + x


class TorchAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.mlp(self.norm(x)))


class MethodAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.mlp(self.norm(x)))


class NamedTerms(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.mlp(self.norm(x)), alpha=1)


class NamedTerm(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(other=self.mlp(self.norm(x)))


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


@pytest.mark.parametrize("toy", [Residual, ResidualSwapped, TorchAdd, MethodAdd, NamedTerms, NamedTerm, PlusEqual])
def test_plain_sum(toy: type[nn.Module]) -> None:
    x = tokens()
    sites = check(toy(), x, ["mlp"], x)
    assert sites[0].granularities == ("sample", "token")
    assert sites[0].layout == "NTC" and sites[0].channels == C and sites[0].positions == T
    assert sites[0].kind == "mlp" and sites[0].host == ""


class Transposed(nn.Module):
    """A branch whose result lies in memory with channels last, on the left of a sum with maps that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.GroupNorm(1, C), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


def test_the_left_operand_decides_how_a_sum_lies_in_memory() -> None:
    x = maps()
    toy = nn.Sequential(Transposed(), Transposed(), nn.GroupNorm(1, C))
    check(toy, x, ["0", "1"])
    _, gated = convert(toy, x)
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.force(gated, torch.tensor(True)):  # type: ignore[arg-type]
            assert gated[1](x).stride() == toy[1](x).stride() != x.stride()  # type: ignore[index]


@pytest.mark.parametrize("toy", [Residual, ResidualSwapped, TorchAdd, MethodAdd, NamedTerms, NamedTerm, PlusEqual])
def test_a_sum_lies_in_memory_as_the_original_one_does(toy: type[nn.Module]) -> None:
    x = torch.randn(N, C, T).transpose(1, 2)
    _, gated = convert(model := toy(), x)
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.force(gated, 1.0):  # type: ignore[arg-type]
            assert gated(x).stride() == model(x).stride()


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


class Summed(Base):
    """Python's `sum`, which begins with `0 + x`."""

    def __init__(self) -> None:
        super().__init__()
        self.other = mlp()

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return sum([x, self.mlp(n), self.other(n)])  # type: ignore[return-value]


def test_python_sums() -> None:
    x = tokens()
    check(Summed(), x, ["mlp", "other"], x)


class Weights(Parallel):
    """The weights of the attention are read by another branch, behind its sum or before it."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.attn: nn.Module = nn.MultiheadAttention(C, 2, batch_first=True)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        attended, weights = self.attn(n, n, n)
        if self.behind:
            return x + attended + self.mlp(n) * weights.sum(1)[..., None]
        return x + self.mlp(n) * weights.sum(1)[..., None] + attended


@pytest.mark.parametrize(("behind", "expected"), [(True, ["attn", "mlp"]), (False, ["mlp"])])
def test_a_second_output_that_another_branch_reads(behind: bool, expected: list[str]) -> None:
    sites = check(Weights(behind), tokens(), expected)
    assert [r.reason for r in sites.rejections] == [] if behind else ["its further output is read before its sum"]


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


class Modulated(nn.Module):
    """A feature map that is scaled and shifted inside the branch (FiLM): the shift is no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.condition = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.condition(t)[:, :, None, None].chunk(2, 1)
        return x + self.second(torch.relu(self.first(x) * (1 + scale) + shift))


def test_a_shift_inside_a_branch_is_no_residual() -> None:
    toy, x, t = Modulated(), maps(), torch.randn(N, C)
    sites, gated = convert(toy, x=x, t=t)
    assert len(sites) == 1 and set(sites[0].modules) == {"first", "second", "condition"}
    with surgery.force(gated, 1.0):
        assert_equal([gated(x, t)], [toy(x, t)])
    with surgery.force(gated, 0.0):
        assert_equal([gated(x, t)], [x])


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Record:
    a: Tensor
    b: Tensor


class OnPairs(Base):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, pair: Any) -> Any:
        return self.make(pair.a + self.mlp(pair.a), pair.b)


class Pairs(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.first, self.second = make, OnPairs(make), OnPairs(make)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(self.make(x, x))).a
        return found


@pytest.mark.parametrize("make", [Pair, Record])
def test_streams_may_be_parts_of_what_is_passed_on(make: Any) -> None:
    x = tokens()
    check(Pairs(make), x, ["first.mlp", "second.mlp"], closed=x)


class Subtracting(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.mlp(self.norm(x))


class Weighted(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.mlp(self.norm(x)), alpha=0.5)


class Fused(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.mlp(self.norm(x)), self.norm.weight)


class Interpolated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x.lerp(self.mlp(self.norm(x)), 0.5)


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x.sub_(self.mlp(x))


@pytest.mark.parametrize(
    ("toy", "reason"),
    [
        (Weighted, "added with a factor"),
        (Subtracting, "subtracted"),
        (InPlace, "subtracted"),
        (Fused, "added by `addcmul`"),
        (Interpolated, "added by `lerp`"),
    ],
)
def test_sums_of_another_kind_are_reported(toy: type[nn.Module], reason: str) -> None:
    sites = surgery.find_sites(toy(), tokens())
    assert len(sites) == 0 and [r.where for r in sites.rejections] == ["mlp"], sites.rejections
    assert reason in sites.rejections[0].reason


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_are_reported() -> None:
    toy = torch.ao.quantization.quantize_dynamic(Residual(), {nn.Linear}, dtype=torch.qint8)
    sites = surgery.find_sites(toy, tokens())
    assert len(sites) == 0 and "packed" in sites.rejections[0].reason
    assert "no branch is added" not in str(sites)
