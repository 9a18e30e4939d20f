"""Streams `(T, N, C)`, which torch's transformer layers have by default: gates see `(N, T, C)`, and results are those of the same
network built with `batch_first=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import context
from surgery.sites import RegionInput

C, T = 16, 6


class Encoder(nn.Module):
    """Torch's own encoder, in either order of axes."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, 2, 4 * C, dropout=0.0, batch_first=batch_first, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(C, 5)
        self.turns = not batch_first

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        made = self.layers(x.transpose(0, 1) if self.turns else x, src_key_padding_mask=padding)
        logits: Tensor = self.head(made.mean(0 if self.turns else 1))
        return logits


def inputs(seed: int, samples: int = 16, tokens: int = T) -> Tensor:
    return torch.randn(samples, tokens, C, generator=torch.Generator().manual_seed(seed))


DATA = [inputs(seed) for seed in range(8)]


@pytest.fixture(scope="module")
def turned() -> nn.Module:
    torch.manual_seed(0)
    return Encoder(batch_first=False).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def plain(turned: nn.Module) -> nn.Module:
    model = Encoder(batch_first=True).eval().requires_grad_(False)
    model.load_state_dict(turned.state_dict())
    return model


@pytest.fixture(scope="module")
def gated(turned: nn.Module) -> Iterator[nn.Module]:
    yield surgery.convert(turned, 0.6, data=DATA, options=surgery.Options(steps=4))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, T])
@pytest.mark.parametrize("samples", [2, 3])
def test_sites_are_those_of_samples_first(tokens: int, samples: int, turned: nn.Module, plain: nn.Module) -> None:
    """Also where there are as many tokens as samples."""
    x = inputs(0, samples, tokens)
    found, expected = surgery.find_sites(turned, x), surgery.find_sites(plain, x)
    assert found.names == expected.names and len(found) == 4
    for mine, other in zip((*found, *found.heads), (*expected, *expected.heads), strict=True):
        assert mine.sequence_first and not other.sequence_first
        assert (mine.kind, mine.granularities, mine.layout) == (other.kind, other.granularities, other.layout)
        assert (mine.flops, mine.positions, mine.channels) == (other.flops, tokens, C)
        assert (mine.chain, mine.query) == (other.chain, other.query)
        assert mine.inputs == (RegionInput(mine.inputs[0].name, 0, 1, sequence_first=True),)


def test_the_same_policy_as_samples_first(turned: nn.Module, plain: nn.Module) -> None:
    """Converted alike, both give the same, up to the rounding of products whose rows lie in another order."""
    made = [surgery.convert(model, 0.6, data=DATA, tune="oneshot") for model in (turned, plain)]
    taped = []
    for model in made:
        with surgery.tape(model) as events:
            taped.append((model(DATA[0]), [event.decisions for event in events]))
    (first, mine), (second, other) = taped
    assert torch.allclose(first, second, atol=1e-4)
    assert all(a.shape == b.shape == (16, T) for a, b in zip(mine, other, strict=True))
    assert sum(int((a != b).sum()) for a, b in zip(mine, other, strict=True)) <= 2


def test_laws_of_a_trained_conversion(turned: nn.Module, gated: nn.Module, tmp_path: Path) -> None:
    assert {planned.granularity for planned in context.state_of(gated).plan.sites} == {"token"}
    assert "narrow" in {planned.skip for planned in context.state_of(gated).plan.sites}
    padding = torch.zeros(16, T, dtype=torch.bool)
    padding[3:, -2:] = True
    with torch.no_grad():
        for arguments in ((DATA[0],), (DATA[0], padding)):
            routed = gated(*arguments)
            assert not torch.allclose(routed, turned(*arguments), atol=1e-4)
            with surgery.execution(gated, "mask"):
                assert torch.allclose(routed, gated(*arguments), atol=1e-5)
            with surgery.force(gated, 1.0):
                assert torch.equal(gated(*arguments), turned(*arguments))
            alone = torch.cat([gated(*(a[row : row + 1] for a in arguments)) for row in range(16)])
            assert torch.allclose(routed, alone, atol=1e-5)
        assert torch.allclose(gated(DATA[0]), surgery.pin(gated, DATA[0])(DATA[0]), atol=1e-5)
        surgery.save(gated, tmp_path / "saved")
        assert torch.equal(gated(DATA[0]), surgery.load(tmp_path / "saved", model=copy.deepcopy(turned))(DATA[0]))


def test_the_order_in_memory_stays(turned: nn.Module, gated: nn.Module) -> None:
    """How a sum lies in memory decides how later layers round, so it is the dense one's."""
    found: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].stride())

    for model in (turned, gated):
        handle = model.get_submodule("layers.layers.1.norm2").register_forward_pre_hook(note)
        with torch.no_grad(), surgery.force(gated, 1.0):
            model(DATA[0])
        handle.remove()
    assert found == [found[0]] * 2


def test_heads_and_queries(turned: nn.Module) -> None:
    for chosen, granularity in (("heads", "sample"), ("attention", "token"), ("attention", "sample")):
        model = surgery.convert(turned, 0.9, data=DATA, sites=[chosen], granularity=granularity, tune="oneshot")
        with torch.no_grad():
            with surgery.execution(model, "skip"):
                routed = model(DATA[0])
            assert not torch.equal(routed, turned(DATA[0]))
            with surgery.execution(model, "mask"):
                assert torch.allclose(routed, model(DATA[0]), atol=1e-5)


class Wide(nn.Module):
    """Channels on the second axis and samples last, which no layer of torch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Conv1d(T, 4 * T, 1), nn.GELU(), nn.Conv1d(4 * T, T, 1))

    def forward(self, x: Tensor) -> Tensor:
        turned = x.permute(2, 1, 0)  # C T N, channels of the convolution second
        made: Tensor = turned + self.mix(turned)
        return made.permute(2, 1, 0).mean(1)


def test_other_orders_are_left_alone() -> None:
    sites = surgery.find_sites(Wide().eval(), inputs(0, 3))
    assert len(sites) == 0 and "rows are not samples" in sites.rejections[0].reason
