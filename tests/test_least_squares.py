"""Closed forms against numpy and against numbers worked out by hand."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from surgery import least_squares


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    x = torch.randn(50, 4, dtype=torch.float64) + torch.tensor([3.0, -1.0, 0.0, 10.0], dtype=torch.float64)
    return x, x @ torch.randn(4, 4, dtype=torch.float64) + torch.randn(50, 4, dtype=torch.float64)


def test_affine_by_hand() -> None:
    x = torch.tensor([[0.0, -1.0], [1.0, 1.0], [2.0, -1.0], [3.0, 1.0]])
    y = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 0.0], [7.0, 4.0]])  # 2 x + 1; mean 1.5, covariance 1.5, variance 1
    scale, shift = least_squares.affine(x, y, ridge=0)
    assert scale.tolist() == pytest.approx([2.0, 1.5]) and shift.tolist() == pytest.approx([1.0, 1.5])
    assert scale.dtype == torch.float64


def test_affine_ridge_is_relative_to_the_mean_variance() -> None:
    x = torch.tensor([[0.0, -1.0], [1.0, 1.0], [2.0, -1.0], [3.0, 1.0]])
    y = torch.stack((2 * x[:, 0] + 1, x[:, 1]), 1)
    # variances 1.25 and 1, mean 1.125; covariances 2.5 and 1
    scale, shift = least_squares.affine(x, y, ridge=2)
    assert scale.tolist() == pytest.approx([2.5 / (1.25 + 2.25), 1 / (1 + 2.25)])
    assert shift.tolist() == pytest.approx([4 - 1.5 * 2.5 / 3.5, 0.0])


def test_affine_of_a_constant_channel_is_its_mean() -> None:
    x = torch.tensor([[5.0, 1.0], [5.0, 2.0], [5.0, 3.0]])
    y = torch.tensor([[1.0, 1.0], [2.0, 2.0], [6.0, 3.0]])
    scale, shift = least_squares.affine(x, y)
    assert scale[0] == 0 and shift[0] == pytest.approx(3.0)
    assert torch.isfinite(least_squares.affine(torch.ones(3, 2), y)[0]).all()


def test_linear_is_lstsq(rows: tuple[Tensor, Tensor]) -> None:
    x, y = rows
    weight, bias = least_squares.linear(x, y[:, :3], ridge=0)
    ones = numpy.concatenate((x.numpy(), numpy.ones((50, 1))), 1)
    expected = numpy.linalg.lstsq(ones, y[:, :3].numpy(), rcond=None)[0]
    assert weight.shape == (3, 4)
    numpy.testing.assert_allclose(weight.numpy(), expected[:4].T, atol=1e-10)
    numpy.testing.assert_allclose(bias.numpy(), expected[4], atol=1e-9)


def test_linear_ridge_by_augmented_rows(rows: tuple[Tensor, Tensor]) -> None:
    x, y = rows
    centred, target = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    strength = 0.3 * centred.var(0).mean() * len(x)
    augmented = numpy.concatenate((centred, numpy.sqrt(strength) * numpy.eye(4)))
    expected = numpy.linalg.lstsq(augmented, numpy.concatenate((target, numpy.zeros((4, 4)))), rcond=None)[0]
    weight, _ = least_squares.linear(x, y, ridge=0.3)
    numpy.testing.assert_allclose(weight.numpy(), expected.T, atol=1e-10)


def test_ridge_pulls_towards_the_mean(rows: tuple[Tensor, Tensor]) -> None:
    x, y = rows
    norms = [float(least_squares.linear(x, y, ridge)[0].norm()) for ridge in (0.0, 0.1, 1.0, 10.0)]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.3 * norms[0]
    weight, bias = least_squares.linear(x, y, 1e9)
    assert weight.abs().max() < 1e-6
    torch.testing.assert_close(bias, y.mean(0), atol=1e-4, rtol=0)


def test_linear_with_fewer_rows_than_channels_is_finite() -> None:
    x = torch.randn(3, 8)
    weight, bias = least_squares.linear(x, x)
    torch.testing.assert_close(x.double() @ weight.T + bias, x.double(), atol=1e-2, rtol=0)


def test_fits_in_float64_whatever_comes_in() -> None:
    x = torch.randn(1000, 2) * 1e-3 + 1e3  # the variance drowns in float32
    weight, _ = least_squares.linear(x, 2 * x, ridge=1e-9)
    torch.testing.assert_close(weight, 2 * torch.eye(2, dtype=torch.float64), atol=1e-3, rtol=0)


def test_full_rank_is_linear(rows: tuple[Tensor, Tensor]) -> None:
    x, y = rows
    weight, bias = least_squares.linear(x, y)
    down, up, shift = least_squares.low_rank(x, y, 4)
    torch.testing.assert_close(up @ down, weight)
    torch.testing.assert_close(shift, bias)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_keeps_the_leading_directions_of_the_predictions(rows: tuple[Tensor, Tensor], rank: int) -> None:
    x, y = rows
    down, up, bias = least_squares.low_rank(x, y, rank, ridge=0)
    assert down.shape == (rank, 4) and up.shape == (4, rank)
    weight, _ = least_squares.linear(x, y, ridge=0)
    left, values, right = numpy.linalg.svd(((x - x.mean(0)) @ weight.T).numpy(), full_matrices=False)
    expected = (left[:, :rank] * values[:rank]) @ right[:rank] + y.mean(0).numpy()
    numpy.testing.assert_allclose((x @ down.T @ up.T + bias).numpy(), expected, atol=1e-9)


def test_low_rank_of_a_low_rank_map_is_exact() -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64) + 3
    down, up, bias = least_squares.low_rank(x, y, 2, ridge=0)
    torch.testing.assert_close(x @ down.T @ up.T + bias, y)


def test_depthwise_finds_the_map_it_was_made_from() -> None:
    kernel, weight = torch.randn(3, 9, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    kernel[:, 4] += 4  # the middle leads, as the start assumes
    x = torch.randn(400, 3, 9, dtype=torch.float64)
    y = (x * kernel).sum(2) @ weight.T + torch.tensor([1.0, -2.0])
    found, mapped, bias = least_squares.depthwise(x, y, rounds=200, ridge=0)
    # a kernel and its column of the map share one scale that nothing determines
    torch.testing.assert_close(mapped[:, :, None] * found, weight[:, :, None] * kernel, atol=1e-3, rtol=0)
    assert bias.tolist() == pytest.approx([1.0, -2.0], abs=1e-3)


def test_depthwise_turns_against_numpy(rows: tuple[Tensor, Tensor]) -> None:
    """One channel and one output: the product of kernel and map is ordinary least squares on the neighbourhood."""
    x, y = rows
    kernel, weight, bias = least_squares.depthwise(x[:, None, :3], y[:, :1], rounds=1, ridge=0)
    ones = numpy.concatenate((x[:, :3].numpy(), numpy.ones((50, 1))), 1)
    expected = numpy.linalg.lstsq(ones, y[:, :1].numpy(), rcond=None)[0][:, 0]
    numpy.testing.assert_allclose((weight[0, 0] * kernel[0]).numpy(), expected[:3], atol=1e-8)
    assert float(bias) == pytest.approx(expected[3])


def test_depthwise_without_rounds_is_linear_in_the_middle(rows: tuple[Tensor, Tensor]) -> None:
    x, y = rows
    around = torch.stack((torch.randn_like(x), x, torch.randn_like(x)), 2)
    kernel, weight, bias = least_squares.depthwise(around, y, rounds=0)
    expected = least_squares.linear(x, y)
    torch.testing.assert_close((weight, bias), expected)
    assert kernel.tolist() == [[0, 1, 0]] * 4
