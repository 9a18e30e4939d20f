"""The network of `surgery demo`: a small timm vision transformer, trained on scikit-learn's digits in under a minute.

Axis letters: `N` samples, `T` tokens, `C` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 16
"""Rows and columns of the images: the 8x8 digits, doubled."""
EPOCHS = 30
BATCH = 64
PEAK_RATE = 1.5e-3


class Stem(nn.Module):
    """Two strided convolutions instead of one patch embedding: with 1,297 images they learn faster."""

    def __init__(
        self, img_size: int = SIZE, patch_size: int = 4, in_chans: int = 1, embed_dim: int = 64, **_: Any
    ) -> None:
        super().__init__()
        side = img_size // patch_size
        self.grid_size, self.patch_size, self.num_patches = (side, side), (patch_size, patch_size), side * side
        self.first = nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1)
        self.second = nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=patch_size // 2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """`(N, 1, 16, 16)` -> `(N, 16, C)`."""
        return self.second(functional.gelu(self.first(images))).flatten(2).transpose(1, 2)


def build() -> nn.Module:
    """Six blocks of width 64 on 16 patches and a class token; random weights."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=6,
        num_heads=4,
        embed_layer=Stem,
    )


def trained(weights: str) -> nn.Module:
    """The network with weights that `save` wrote: `python:surgery.scripts.digits_model:trained?weights=FILE`."""
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict(load_file(weights))
    return model.eval()


def save(model: nn.Module, weights: Path) -> None:
    """Write what `trained` reads."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)


def train(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    epochs: int = EPOCHS,
    make: Callable[[], nn.Module] = build,
    progress: Callable[[str, int, int], None],
) -> nn.Module:
    """Train from scratch with AdamW, one cycle of the learning rate, and shifts by one pixel.

    Args:
        images: `(N, 1, 16, 16)`.
        labels: `(N,)`.
        seed: Of the initial weights and the order of the images.
        epochs: Passes over the images.
        make: Builds the network.
        progress: Called after every epoch.
    """
    torch.manual_seed(seed)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for chosen in order[: steps * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(shifted(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        progress("training the dense network", epoch + 1, epochs)
    return model.eval()


def shifted(images: Tensor, most: int = 1) -> Tensor:
    """Move every image by up to `most` pixels in each direction; what comes in is background."""
    count, _, rows, columns = images.shape
    padded = functional.pad(images, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, count))
    row = down[:, None] + torch.arange(rows)  # N H
    column = right[:, None] + torch.arange(columns)  # N W
    return padded[torch.arange(count)[:, None, None], 0, row[:, :, None], column[:, None, :]][:, None]
