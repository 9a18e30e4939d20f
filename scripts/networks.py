"""Networks of a user's own, as `MODEL` strings take them: `python:scripts/networks.py:resnet56`.

They are written as their authors wrote them, without a thought of this package. Weights are read from the directory
that the environment variable `SURGERY_WEIGHTS` names (`../shared/weights` by default); see `docs/lab/images.md`.

Axis letters: `N` samples, `T` tokens, `C` channels, `H`, `W` height and width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESNET_MEAN, RESNET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT_MEAN, VIT_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut (He et al. 2015): stride-2 slicing, zero-padded channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.pad = (outputs - inputs) // 2

    def shortcut(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> the block's output shape."""
        if self.stride == 1 and self.pad == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> `(N, C', H', W')`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """The 6n+2-layer ResNet for 32x32 images (He et al. 2015)."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, 32, 32)` -> logits `(N, 10)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


class SmallViT(nn.Module):
    """A ViT around torch's own `nn.TransformerEncoder`: 6 post-norm layers, 128 wide, 65 tokens."""

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 8, hidden: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, width))
        layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, 32, 32)` -> logits `(N, 10)`."""
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # N 64 C
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), 1) + self.pos_embed  # N 65 C
        return self.mlp_head(self.transformer(tokens)[:, 0])


def resnet56() -> tuple[nn.Module, Callable[[object], Tensor]]:
    """ResNet-56 for CIFAR-10 with its weights and preprocessing."""
    return _loaded(CifarResNet(9), "resnet56_cifar10.safetensors"), normalise(RESNET_MEAN, RESNET_STD)


def resnet20() -> tuple[nn.Module, Callable[[object], Tensor]]:
    """ResNet-20 for CIFAR-10 with its weights and preprocessing."""
    return _loaded(CifarResNet(3), "resnet20_cifar10.safetensors"), normalise(RESNET_MEAN, RESNET_STD)


def vit6() -> tuple[nn.Module, Callable[[object], Tensor]]:
    """The small ViT for CIFAR-10 with its weights and preprocessing."""
    return _loaded(SmallViT(), "vit6_cifar10.safetensors"), normalise(VIT_MEAN, VIT_STD)


def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[object], Tensor]:
    """A function from a PIL image to a normalised tensor `(3, H, W)`."""
    from torchvision.transforms import v2

    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def _loaded(model: nn.Module, name: str) -> nn.Module:
    from safetensors.torch import load_file

    folder = Path(os.environ.get("SURGERY_WEIGHTS", "../shared/weights"))
    state = load_file(folder / name)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"{folder / name} does not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}"
        )
    return model.eval()
