"""Closed-form least squares for skip paths, in float64 with a ridge.

Axis letters: `M` rows, `C` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4
"""Ridge, relative to the mean variance of the inputs."""


def affine(x: Tensor, y: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Per-channel `scale`, `shift` that minimise `|x * scale + shift - y|^2 + ridge`.

    Args:
        x: `(M, C)`.
        y: `(M, C)`.
        ridge: Relative to the mean variance of `x`.

    Returns:
        Two float64 tensors `(C,)`.
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    variance = (x - mean_x).square().mean(0)
    covariance = ((x - mean_x) * (y - mean_y)).mean(0)
    scale = covariance / (variance + ridge * variance.mean() + 1e-30)
    return scale, mean_y - scale * mean_x


def linear(x: Tensor, y: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """`weight`, `bias` that minimise `|x @ weight.T + bias - y|^2 + ridge`.

    Args:
        x: `(M, C)`.
        y: `(M, C')`.
        ridge: Relative to the mean variance of `x`.

    Returns:
        float64 `(C', C)` and `(C',)`.
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred / len(x)
    scale = gram.diagonal().mean() + 1e-30
    gram.diagonal().add_(ridge * scale)
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y) / len(x)).T
    return weight, mean_y - weight @ mean_x


def low_rank(x: Tensor, y: Tensor, rank: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank regression (Izenman 1975): the linear map, projected on the leading directions of its predictions.

    Returns:
        float64 `down` `(R, C)`, `up` `(C', R)`, `bias` `(C',)`.
    """
    weight, _ = linear(x, y, ridge)
    x, y = x.double(), y.double()
    predicted = (x - x.mean(0)) @ weight.T
    _, vectors = torch.linalg.eigh(predicted.T @ predicted)
    up = vectors[:, -rank:]
    down = up.T @ weight
    return down, up, y.mean(0) - up @ (down @ x.mean(0))


def depthwise(x: Tensor, y: Tensor, rounds: int = 3, ridge: float = RIDGE) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel per channel and a linear map after it, each solved exactly while the other is fixed, in turns.

    Everything comes from second moments of the neighbourhoods, so that rounds cost nothing per row. Starts from kernels
    that look at the middle only, which is `linear`; no round makes the fit worse by more than the ridge.

    Args:
        x: Neighbourhoods `(M, C, K)`, the middle at `K // 2`.
        y: `(M, C')`.
        rounds: How often kernels are solved.
        ridge: Relative to the mean diagonal of each problem.

    Returns:
        float64 `kernel` `(C, K)`, `weight` `(C', C)`, `bias` `(C',)`.
    """
    rows, channels, size = x.shape
    x, y = x.flatten(1).double(), y.double()  # M C*K
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram, cross = x.T @ x / rows, x.T @ y / rows  # C*K C*K, C*K C'
    moments = gram.view(channels, size, channels, size)
    kernel = torch.zeros(channels, size, dtype=torch.float64, device=x.device)
    kernel[:, size // 2] = 1

    def mapped() -> Tensor:
        inner = torch.einsum("ck,ckdl,dl->cd", kernel, moments, kernel)
        return _ridged(inner, torch.einsum("ck,cko->co", kernel, cross.view(channels, size, -1)), ridge).T

    weight = mapped()
    for _ in range(rounds):
        normal = (moments * (weight.T @ weight)[:, None, :, None]).reshape(gram.shape)
        wanted = (cross.view(channels, size, -1) * weight.T[:, None]).sum(2)  # C K
        kernel = _ridged(normal, wanted.reshape(-1, 1), ridge).view(channels, size)
        weight = mapped()
    return kernel, weight, mean_y - weight @ (kernel * mean_x.view(channels, size)).sum(1)


def _ridged(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solve `(gram + ridge) solution = cross`."""
    gram = gram.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-30)
    return torch.linalg.solve(gram, cross)
