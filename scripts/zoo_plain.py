"""The part of the zoo without a model library: torchvision, torch's own transformer, and networks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.scripts.zoo import Entry, images, texts


class AttentionLayer(nn.Module):
    """A user's own transformer layer on `nn.MultiheadAttention`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(N, T, C)` to the same."""
        n = self.norm1(x)
        attended, _ = self.attention(n, n, n, key_padding_mask=mask, need_weights=False)
        x = x + attended
        return x + self.mlp(self.norm2(x))


class OwnViT(nn.Module):
    """A user's own ViT, layers in a plain loop."""

    def __init__(self, channels: int = 32, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 16, channels))
        self.layers = nn.ModuleList(AttentionLayer(channels) for _ in range(depth))
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, 3, 32, 32)`."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions  # (N, T, C)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(1))


class EncoderViT(nn.Module):
    """A user's own ViT on `nn.TransformerEncoder`."""

    def __init__(self, channels: int = 32, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 16, channels))
        layer = nn.TransformerEncoderLayer(
            channels, 4, 2 * channels, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(channels), enable_nested_tensor=False)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, 3, 32, 32)`."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions  # (N, T, C)
        return self.head(self.encoder(tokens).mean(1))


class Translator(nn.Module):
    """A user's own translator on `nn.Transformer` as torch builds it by default: `(T, N, C)` inside."""

    def __init__(self, channels: int = 16, depth: int = 2, vocabulary: int = 100) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, channels)
        self.positions = nn.Parameter(torch.zeros(32, 1, channels))
        self.transformer = nn.Transformer(channels, 2, depth, depth, 2 * channels, dropout=0.0, activation="gelu")
        self.head = nn.Linear(channels, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Logits `(N, S, vocabulary)` of sources `(N, T)` and the targets so far `(N, S)`."""
        source, target = (
            self.embed(ids).transpose(0, 1) + self.positions[: ids.shape[1]] for ids in (input_ids, decoder_input_ids)
        )
        causal = nn.Transformer.generate_square_subsequent_mask(len(target), device=target.device, dtype=target.dtype)
        padding = attention_mask == 0
        made = self.transformer(
            source, target, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        logits: Tensor = self.head(made.transpose(0, 1))
        return logits


class PlusEqual(nn.Module):
    """A block that adds in place and returns early views of nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same."""
        shortcut = x
        out = self.conv2(F.relu(self.norm(self.conv1(x)), inplace=True))
        out += shortcut
        return F.relu(out, inplace=True)


class ThreeTerms(nn.Module):
    """Two parallel branches in one sum, in an unusual order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.narrow = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same."""
        return self.norm(self.wide(x)) + x + self.narrow(x)


class Optional(nn.Module):
    """Arguments that default to None and change the path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, mask: Tensor | None = None, gain: float | None = None) -> Tensor:
        """`(N, T, C)` to the same; `mask` `(N, T)` zeroes tokens of the branch."""
        y = self.scale * self.mlp(self.norm(x))
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        if gain is not None:
            y = y * gain
        return x + y


class Dual(nn.Module):
    """Two streams side by side, joined by concatenation: nothing here is residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)
        self.right = nn.Conv2d(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same."""
        left, right = x.chunk(2, dim=1)
        return torch.cat([self.left(left), F.silu(self.right(right))], dim=1)


class Shortcut(nn.Module):
    """A block with a strided projection on the skip side."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.project = nn.Conv2d(channels, out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, out, H/2, W/2)`."""
        return torch.add(self.conv2(F.relu(self.norm1(self.conv1(x)))), self.project(x))


class Waves(nn.Module):
    """A user's own convolutional network on signals `(N, 1, T)`."""

    def __init__(self, channels: int = 8, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 5)
        self.blocks = nn.ModuleList(Wave(channels) for _ in range(depth))
        self.head = nn.Linear(channels, classes)

    def forward(self, signals: Tensor) -> Tensor:
        """Logits `(N, classes)`."""
        x = self.stem(signals)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(2))


class Wave(nn.Module):
    """A residual block of two convolutions along one axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolve = nn.Sequential(
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Conv1d(channels, 4 * channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(4 * channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T)` to the same."""
        return x + self.convolve(x)


class Odd(nn.Module):
    """Many habits in one network: in-place sums, dual paths, None defaults, keyword-only calls, shape reads."""

    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.plus = nn.ModuleList(PlusEqual(channels) for _ in range(2))
        self.three = ThreeTerms(channels)
        self.dual = Dual(channels)
        self.shortcut = Shortcut(channels, 2 * channels)
        self.masked = Optional(2 * channels)
        self.unmasked = Optional(2 * channels)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, images: Tensor, *, weights: Tensor | None = None, return_features: bool = False) -> Any:
        """Logits `(N, classes)`, or a dict of logits and features."""
        x = self.stem(images)
        for block in self.plus:
            x = block(x)
        x = self.shortcut(self.dual(self.three(x)))
        tokens = x.flatten(2).transpose(1, 2)  # (N, T, C)
        tokens = self.masked(tokens, mask=tokens[..., 0] > 0, gain=0.5)
        tokens = self.unmasked(tokens)
        if weights is None:
            pooled = tokens.mean(1)
        else:
            pooled = (tokens * weights[..., None]).sum(1)
        logits = self.head(pooled)
        return {"logits": logits, "features": tokens} if return_features else logits


def _torchvision(build: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return build(torchvision.models)

    return make


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "torchvision/resnet50",
        _torchvision(lambda models: models.resnet50(num_classes=10)),
        images(64),
        (("Bottleneck", 1),),
    ),
    Entry(
        "torchvision/vit_b_16",
        _torchvision(lambda models: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)),
        images(32),
        (("EncoderBlock", 2),),
        "its class, with two layers",
    ),
    Entry(
        "torchvision/swin_t",
        _torchvision(
            lambda models: models.SwinTransformer([2, 2], 16, [2, 2], [2, 4], window_size=[4, 4], num_classes=10)
        ),
        images(32),
        (("SwinTransformerBlock", 2),),
        "its class, with two stages",
    ),
    Entry("plain/own_vit", OwnViT, images(32), (("AttentionLayer", 2),), "written by hand, on nn.MultiheadAttention"),
    Entry(
        "plain/encoder", EncoderViT, images(32), (("TransformerEncoderLayer", 2),), "torch's own nn.TransformerEncoder"
    ),
    Entry(
        "plain/translator",
        Translator,
        texts(10, decoder_input_ids=7),
        (("TransformerEncoderLayer", 2), ("TransformerDecoderLayer", 3)),
        "torch's own nn.Transformer, samples on the second axis",
    ),
    Entry(
        "plain/waves",
        Waves,
        lambda samples: torch.randn(samples, 1, 44),
        (("Wave", 1),),
        "written by hand, convolutions along one axis",
    ),
    Entry(
        "plain/odd",
        Odd,
        images(32),
        (("PlusEqual", 1), ("ThreeTerms", 2), ("Shortcut", 1), ("Optional", 1)),
        "written by hand, with odd habits",
    ),
)
