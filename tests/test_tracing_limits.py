"""What is no site, only a part of one, or one for whole samples alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_equal, outputs
from torch import Tensor, nn
from toys import Stack
from tracing_toys import Base, C, Residual, T, check, convert, maps, tokens

import surgery


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


class AcrossSamples(nn.Module):
    """The branch compares each sample with the others: it cannot run on a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x - x.mean(0))


def test_branch_that_mixes_samples_is_rejected() -> None:
    sites = surgery.find_sites(AcrossSamples().eval(), tokens())
    assert len(sites) == 0
    assert [rejection.reason for rejection in sites.rejections] == ["a sample's result depends on its batch mates"]


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


class Checked(nn.Module):
    """`forward` reads a value, so it cannot be traced; the module around it can still skip it as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) > 1e6:
            raise ValueError("too large")
        return self.map(x)


class Conditional(nn.Module):
    """Its sign depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x) if float(x.sum()) > 0 else -self.map(x)


class Around(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        return x + self.odd(x)


def test_untraceable_child_is_a_leaf() -> None:
    x, toy = tokens(), Around(Checked()).eval()
    sites = surgery.find_sites(toy, x)
    assert sites.names == ("odd",)
    gated = surgery.insert_gates(toy, sites.plan(skip="identity", granularity="sample"))
    decisions = torch.arange(len(x)) % 2 == 0
    expected = torch.where(decisions[:, None, None], toy(x), x)
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.force(gated, {"odd": decisions}):  # type: ignore[arg-type]
            assert_close(outputs(gated, x), [expected.detach()], 1e-6)


def test_untraceable_child_that_mixes_samples_is_rejected() -> None:
    sites = surgery.find_sites(Around(Conditional()).eval(), tokens())
    assert len(sites) == 0
    assert [rejection.reason for rejection in sites.rejections] == ["a sample's result depends on its batch mates"]


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


class Assuming(Base):
    """Takes it that an argument has a class, which nothing has in a trace."""

    def __init__(self, checks: bool) -> None:
        super().__init__()
        self.checks = checks

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        if isinstance(cache, set):
            scale = 1.0
        elif self.checks:
            raise LookupError("no cache")
        return x + self.mlp(self.norm(x)) * scale


@pytest.mark.parametrize(("checks", "error"), [(True, "no cache"), (False, "local variable")])
def test_whatever_a_trace_runs_into_is_reported(checks: bool, error: str) -> None:
    sites = surgery.find_sites(Assuming(checks), (tokens(), {1}))
    assert any("cannot be traced" in rejection.reason and error in rejection.reason for rejection in sites.rejections)


def filled(forward: Any) -> Any:
    """Fills in an argument by name, as transformers' decorators do."""

    @functools.wraps(forward)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("scale", 2.0)
        return forward(self, *args, **kwargs)

    return inner


class Filled(Untraceable):
    """The decorator's argument comes by position in a trace."""

    @filled
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return x + self.map(x) if x.sum() > 0 else x - self.map(x)


class FilledAlone(Filled):
    """Without a scale where all arguments are given by name, with one in a call: no graph of either is safe."""

    @filled
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return x + self.map(x) * (1.0 if scale is None else scale)


@pytest.mark.parametrize(("toy", "reason"), [(Filled, "control flow"), (FilledAlone, "multiple values")])
def test_what_a_decorator_fills_in_hides_no_reason(toy: type[nn.Module], reason: str) -> None:
    sites = surgery.find_sites(toy(), {"x": tokens(), "scale": None})
    assert len(sites) == 0
    assert any(reason in rejection.reason for rejection in sites.rejections), sites.rejections


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


class Scaled(Base):
    """What a layer is called with decides what is in its branch."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.mlp(self.norm(x))
        return x + (y if scale is None else y * scale)


class SharedInTwoWays(nn.Module):
    """One layer used twice, in different ways, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = Scaled(), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.shared(self.shared(x), x.mean()))


def test_a_block_that_is_shared_in_two_ways_leaves_others_alone() -> None:
    sites = surgery.find_sites(SharedInTwoWays(), tokens())
    assert sites.names == ("own",), str(sites)
    assert any("several times per call" in rejection.reason for rejection in sites.rejections), sites.rejections


class WritesIntoItsArgument(nn.Module):
    """Calls a block for what it writes into the stream, and drops what it returns."""

    class Block(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.mlp(self.norm(x)))

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        self.block(x)
        return x


def test_a_block_that_cannot_be_gated_leaves_others_alone() -> None:
    model = nn.Sequential(Residual(), WritesIntoItsArgument(), Residual())
    sites = check(model, tokens(), ["0", "2"])
    assert [(r.where, r.reason) for r in sites.rejections] == [
        ("1.block", "its traced forward does not give the same result")
    ]


class Drawing(Residual):
    """Reads its input in an order that it draws, as ViLT reads the patches of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, torch.randperm(x.shape[1])])


def test_sites_are_found_where_a_network_draws_random_numbers() -> None:
    sites = surgery.find_sites(nn.Sequential(Drawing(), Residual()), tokens())
    assert len(sites) == 2, str(sites)


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


class Detector(nn.Module):
    """A model that takes a list of images, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, C, 3), Stack(nn.Conv2d(C, C, 3, padding=1)))
        self.mean = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.backbone(torch.stack([image - self.mean for image in images]))


def test_a_list_of_samples_is_no_batch() -> None:
    detector, images = Detector().eval().requires_grad_(False), [torch.randn(3, 8, 8) for _ in range(2)]
    dense = detector(images)
    sites = surgery.find_sites(detector, (images,))
    assert len(sites) == 0 and [r.where for r in sites.rejections] == ["backbone.1.blocks.0"]
    assert "first sample repeated (The size of tensor a" in sites.rejections[0].reason
    sites = surgery.find_sites(detector.backbone, torch.stack(images))
    assert sites.names == ("1.blocks.0.inner",)
    detector.backbone = surgery.insert_gates(detector.backbone, sites)
    with surgery.force(detector.backbone, 1.0):
        assert torch.equal(detector(images), dense)
    with surgery.force(detector.backbone, 0.0):
        assert not torch.equal(detector(images), dense)
