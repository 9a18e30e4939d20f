"""Skip paths: every way to compute a map gives the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import path_of

import surgery
from surgery import skip_paths
from surgery.context import state_of
from surgery.errors import SurgeryError
from surgery.skip_paths import LinearSkip


def drawn(kind: Any, channels: int = 8) -> Any:
    torch.manual_seed(0)
    path = path_of(kind, channels, "NCHW", 2)
    for parameter in path.parameters():
        nn.init.normal_(parameter)
    return path


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map_of_a_feature_map_is_a_1x1_convolution(count: int, dtype: torch.dtype) -> None:
    path, x = drawn("linear"), torch.randn(count, 8, 6, 7).to(dtype)
    weight, bias = path.weight.detach().to(dtype), path.bias.detach().to(dtype)
    expected = F.conv2d(x.float(), weight.float()[:, :, None, None], bias.float())
    for made in (path(x), path(x.contiguous(memory_format=torch.channels_last)), trained(path, x)):
        assert made.dtype == dtype
        torch.testing.assert_close(made.float(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=5e-2)


def trained(path: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        made: torch.Tensor = path(x)
    assert made.requires_grad
    return made.detach()


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", ["affine", "linear", "low-rank", "depthwise"])
@pytest.mark.parametrize("count", [1, 300])
def test_what_is_added_in_one_pass_is_the_sum(kind: str, count: int) -> None:
    path, x = drawn(kind), torch.randn(count, 8, 6, 6)
    assert (count == 300) == (x.numel() >= skip_paths._LARGE)
    weights = [parameter.clone() for parameter in path.parameters()]
    torch.testing.assert_close(path(x, added=True), x + path(x), rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(a, b) for a, b in zip(weights, path.parameters(), strict=True)
    )  # the identity is not left in


def test_large_maps_take_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    product = skip_paths._product
    monkeypatch.setattr(skip_paths, "_product", lambda *args: (calls.append("product"), product(*args))[1])
    path = LinearSkip(8, "NCHW")
    for x, expected in (
        (torch.randn(2, 8, 4, 4), 1),
        (torch.randn(300, 8, 6, 6), 1),
        (torch.randn(1, 8, 4, 4), 0),
        (torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), 0),
    ):
        calls.clear()
        path(x, added=True)
        assert len(calls) == expected, x.shape


def test_gradients_reach_inputs_and_weights() -> None:
    path, x = drawn("linear"), torch.randn(4, 8, 3, 3)
    with torch.enable_grad():
        x.requires_grad_()
        path(x, added=True).sum().backward()
    torch.testing.assert_close(path.bias.grad, torch.full((8,), 36.0))
    torch.testing.assert_close(x.grad[0, :, 0, 0], 1 + path.weight.sum(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def test_feature_maps_get_depthwise_paths_for_flops_and_linear_ones_for_time() -> None:
    model = nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()
    sites = surgery.find_sites(model, torch.randn(2, 16, 8, 8))
    assert {planned.skip for planned in sites.plan().sites} == {"depthwise"}
    assert {planned.skip for planned in sites.plan(cost="latency").sites} == {"linear"}
    assert {planned.skip for planned in sites.plan(cost="latency", skip="depthwise").sites} == {"depthwise"}
    with pytest.raises(SurgeryError, match="cost must be"):
        sites.plan(cost="time")  # type: ignore[arg-type]
    data = [torch.randn(16, 16, 8, 8) for _ in range(10)]
    with torch.enable_grad():
        gated = surgery.convert(model, 1.0, data=data, tune="oneshot", cost="latency")
    assert {planned.skip for planned in state_of(gated).plan.sites} == {"linear"}


@pytest.mark.parametrize("limit", [1, 8 * 36, 3 * 8 * 36, 4 * 8 * 36 + 1])
def test_a_large_map_goes_through_a_depthwise_path_in_parts(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = drawn("depthwise"), torch.randn(10, 8, 6, 6)
    expected, calls = path(x), []
    monkeypatch.setattr(skip_paths, "_CACHED", limit)
    one = path._one
    monkeypatch.setattr(path, "_one", lambda part: (calls.append(len(part)), one(part))[1])
    torch.testing.assert_close(path(x), expected, rtol=1e-5, atol=1e-5)
    assert sum(calls) == 10 and max(calls) == max(1, limit // (8 * 36))
