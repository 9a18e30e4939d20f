"""A small timm ResNet of bottleneck blocks, trained on scikit-learn's digits in two minutes, to try skip paths on:

    python -m surgery.scripts.digits_bottleneck --out out/bottleneck.safetensors
    python -m surgery.scripts.skips_trial "python:surgery.scripts.digits_bottleneck:trained?weights=out/bottleneck.safetensors" \
        --data digits:16 --limit 1000 --held 250 --no-augment --kind affine --kind narrow:0.5
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from surgery.scripts import digits_model, options
from surgery.scripts.running import note


def build() -> nn.Module:
    """Eleven blocks in four stages, 64 to 512 channels, no stride before the second stage; random weights."""
    from timm.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, (3, 3, 3, 2), num_classes=10, in_chans=1, channels=(16, 32, 64, 128))  # type: ignore[arg-type]
    model.conv1, model.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()  # type: ignore[assignment]
    return model


def trained(weights: str) -> nn.Module:
    """The network with weights that `main` wrote."""
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict(load_file(weights))
    return model.eval()


def main(
    out: Annotated[Path, typer.Option(help="Where to write the weights.")],
    epochs: Annotated[int, typer.Option(help="Passes over 1,297 images.")] = 12,
    seed: options.Seed = 0,
    threads: options.Threads = 1,
) -> None:
    """Train and write the weights."""
    import torch

    from surgery.adapters import digits

    options.set_up(threads, seed)
    images, labels = digits("train", size=digits_model.SIZE)
    model = digits_model.train(
        images, labels, seed=seed, epochs=epochs, make=build, progress=lambda what, step, total: note(f"{what}: {step}")
    )
    held, truth = digits("test", size=digits_model.SIZE)
    with torch.no_grad():
        note(f"{float((model(held).argmax(1) == truth).double().mean()):.3f} of 500 other images are right")
    out.parent.mkdir(parents=True, exist_ok=True)
    digits_model.save(model, out)


if __name__ == "__main__":
    typer.run(main)
