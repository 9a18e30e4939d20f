"""Images: how a picture becomes a model's input, and synthetic pictures with the statistics of natural ones.

Synthetic pictures stand in for data when a model is converted without any. They combine what is known to matter in
natural images: spectra that fall as 1/f, correlated colours, and occlusion by objects of all sizes ("dead leaves", Lee,
Mumford and Huang 2001).

Axis letters: `N` samples, `C` channels, `H` rows, `W` columns, `K` leaves.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery.adapters.base import Row, library
from surgery.errors import DataError

LEAVES = 24
_MOST_16_BITS = 2**16 - 1
# square root of the covariance of colours in photographs: mostly brightness, then blue-yellow, then green-magenta
COLOUR = ((0.94, 0.26, 0.10), (0.96, -0.02, -0.17), (0.93, -0.31, 0.09))


@dataclass(frozen=True, slots=True)
class ImagePreprocess:
    """Resize the shorter side, crop the centre, scale to [0, 1], normalise: for models that bring no preprocessing.

    Args:
        mean: Per channel; None leaves values in [0, 1].
        std: Per channel.
        size: Rows and columns; None keeps the picture's own.
        channels: 1 for grey, 3 for colour, None for as it is.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    channels: int | None = None
    needs: tuple[str, ...] = ("image",)

    def __call__(self, row: Row) -> Tensor:
        """`(C, H, W)`."""
        image = to_tensor(row["image"], self.channels)
        if self.size is not None:
            image = _resize_and_crop(image, self.size)
        if self.mean is None:
            return image
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


def to_pil(value: Any, *, colour: bool = True) -> Any:
    """A PIL image from a PIL image, encoded bytes, a `{"bytes", "path"}` record, an array or a tensor `(C, H, W)`.

    Args:
        value: One of these.
        colour: Whether to make it RGB; what is then done with other depths than 8 bits says `in_8_bits`.

    Raises:
        DataError: If it is none of these or cannot be decoded.
    """
    module = library("PIL.Image", "pillow")
    image = value
    try:
        if isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path")):
            image = module.open(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])
        elif isinstance(value, (bytes, bytearray)):
            image = module.open(io.BytesIO(value))
        elif isinstance(value, str):
            image = module.open(value)
        elif isinstance(value, Tensor):
            array = (value.clamp(0, 1) * 255).round().to(torch.uint8) if value.is_floating_point() else value
            image = _from_array(array[0].numpy() if array.shape[0] == 1 else array.permute(1, 2, 0).numpy())
        elif hasattr(value, "__array_interface__") and not isinstance(value, module.Image):
            image = _from_array(value)
        if isinstance(image, module.Image):
            return in_8_bits(image).convert("RGB") if colour else image
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"an image cannot be decoded: {error}") from error
    raise DataError(f"expected an image (PIL, encoded bytes or an array), got {type(value).__name__}")


def in_8_bits(image: Any) -> Any:
    """Grey of 16 bits (modes `I;16` and `I`) scaled to 8, where PIL itself cuts values off at 255; other images as they are.

    Raises:
        DataError: If it holds floating-point numbers (mode `F`) or whole numbers outside of 16 bits: their range is unknown.
    """
    if image.mode == "F":
        raise DataError("an image of floating-point numbers (mode F) has no known range; scale it to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    low, high = image.getextrema()
    if low < 0 or high > _MOST_16_BITS:
        raise DataError(f"a grey image holds values from {low} to {high}, expected 0 to {_MOST_16_BITS}")
    numpy = library("numpy", "numpy")
    return library("PIL.Image", "pillow").fromarray((numpy.asarray(image) / 257).round().astype(numpy.uint8))


def _from_array(array: Any) -> Any:
    image = library("PIL.Image", "pillow").fromarray(array)
    if image.mode == "I":
        raise DataError("an array of int32 has no known range; give uint8, or uint16")
    return image


def to_tensor(value: Any, channels: int | None = None) -> Tensor:
    """`(C, H, W)` in [0, 1] from anything that `to_pil` reads; tensors pass through exactly."""
    if isinstance(value, Tensor) and value.is_floating_point():
        image = value
    else:
        numpy = library("numpy", "numpy")
        picture = in_8_bits(to_pil(value, colour=False))
        if picture.mode not in ("L", "RGB"):
            picture = picture.convert("RGB")
        array = torch.from_numpy(numpy.array(picture))
        image = (array[None] if array.dim() == 2 else array.permute(2, 0, 1)).float() / 255
    if channels is None or channels == image.shape[0]:
        return image
    if channels == 1:
        return image.mean(0, keepdim=True)
    return image[:1].expand(channels, -1, -1).clone()


def _resize_and_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = image.shape[-2:]
    scale = max(size[0] / rows, size[1] / columns)
    if scale != 1:
        new = (max(size[0], round(rows * scale)), max(size[1], round(columns * scale)))
        image = functional.interpolate(image[None], new, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (image.shape[-2] - size[0]) // 2, (image.shape[-1] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def natural_images(
    count: int, size: Sequence[int], *, mean: Sequence[float], std: Sequence[float], seed: int
) -> Tensor:
    """Synthetic pictures, normalised as the model expects.

    Args:
        count: Number of pictures `N`.
        size: `(C, H, W)`.
        mean: Of the normalisation, per channel or one for all.
        std: Of the normalisation, per channel or one for all.
        seed: The same seed gives the same pictures.

    Returns:
        `(N, C, H, W)`.
    """
    channels, rows, columns = size
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator)

    roughness = uniform(0.9, 1.8)  # amplitude spectra of photographs fall as f^-1 to f^-2, edges included
    noise = coloured_noise((count, 3, rows, columns), generator, roughness)  # N 3 H W
    grain = torch.einsum("dc,nchw->ndhw", torch.tensor(COLOUR), noise)
    palette = torch.randn(count, 3, generator=generator) @ torch.tensor(COLOUR).T  # pictures have a colour of their own
    image = _paint_leaves(uniform(0.2, 0.9) * grain, grain, generator)
    image = uniform(0.6, 1.5) * image + 0.5 * palette[:, :, None, None] - 0.2
    image = torch.sigmoid(1.6 * image)
    if channels == 1:
        image = image.mean(1, keepdim=True)
    elif channels != 3:
        image = image[:, torch.arange(channels) % 3]
    shift, scale = (torch.tensor(tuple(map(float, values))).view(1, -1, 1, 1) for values in (mean, std))
    return (image - shift) / scale


def coloured_noise(shape: Sequence[int], generator: torch.Generator, exponent: float | Tensor) -> Tensor:
    """Noise whose amplitude spectrum falls as `f ** -exponent` over the last two axes; mean 0, variance 1."""
    rows, columns = shape[-2:]
    fy = torch.fft.fftfreq(rows)[:, None] * rows
    fx = torch.fft.rfftfreq(columns)[None] * columns
    radius = (fy.square() + fx.square()).sqrt().clamp_min(1.0)
    spectrum = torch.fft.rfft2(torch.randn(*shape, generator=generator)) * radius ** (-exponent)
    noise = torch.fft.irfft2(spectrum, s=(rows, columns))
    noise = noise - noise.mean((-2, -1), keepdim=True)
    return noise / noise.std((-2, -1), keepdim=True).clamp_min(1e-6)


def _paint_leaves(image: Tensor, grain: Tensor, generator: torch.Generator) -> Tensor:
    """Paint ellipses and rectangles of all sizes, each with a colour, a gradient and a texture, some striped."""
    count, _, rows, columns = image.shape
    y = torch.linspace(-1, 1, rows)[None, :, None]
    x = torch.linspace(-1, 1, columns)[None, None]

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return torch.empty(LEAVES, count, 1, 1, *more).uniform_(low, high, generator=generator)

    # radii with density r^-2 between the limits, largest painted first so that small ones stay visible
    low, high = 0.07, 1.2
    radius = 1 / (1 / high + uniform(0, 1) * (1 / low - 1 / high))
    radius = radius.sort(dim=0, descending=True).values
    centre_x, centre_y = uniform(-1.1, 1.1), uniform(-1.1, 1.1)
    angle, stretch = uniform(0, math.pi), uniform(-0.7, 0.7).exp()
    round_ = uniform(0, 1) < 0.6
    soft = 2.0 / min(rows, columns) * uniform(0.5, 2.5)
    texture, shift = uniform(0, 0.6), torch.randint(0, max(rows, columns), (LEAVES, 2), generator=generator)
    colour = torch.randn(LEAVES, count, 3, generator=generator) @ torch.tensor(COLOUR).T
    stripes, period = uniform(0, 0.5), uniform(math.log(0.05), math.log(0.4)).exp()
    slope = 0.5 * torch.randn(2, LEAVES, count, 1, 1, generator=generator)

    for k in range(LEAVES):
        dx, dy = x - centre_x[k], y - centre_y[k]  # N H W
        along = (dx * angle[k].cos() + dy * angle[k].sin()) / stretch[k]
        across = (dy * angle[k].cos() - dx * angle[k].sin()) * stretch[k]
        distance = torch.where(round_[k], torch.hypot(along, across), torch.maximum(along.abs(), across.abs()))
        cover = ((radius[k] - distance) / soft[k]).clamp(0, 1)[:, None]  # N 1 H W
        shade = (slope[0, k] * dx + slope[1, k] * dy)[:, None] / radius[k, :, None]
        surface = colour[k, :, :, None, None] + 0.5 * shade
        surface = surface + texture[k, :, None] * grain.roll(tuple(shift[k].tolist()), (-2, -1))
        if k % 3 == 0:
            surface = surface + (stripes[k] * torch.sin(2 * math.pi / period[k] * along))[:, None]
        image = torch.lerp(image, surface, cover)
    return image
