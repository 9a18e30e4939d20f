"""Would spatial positions do as tokens in a convolutional network? `python -m surgery.scripts.spatial_probe MODEL --data …`

Every residual block on feature maps runs at some positions of every image only: those where its branch, computed everywhere, is
largest. No router can know that, so this is a bound from above. Elsewhere a linear map of the position's own channels and of
the mean around it stands for the branch, fitted in closed form on other images. A branch with a 3x3 convolution inside needs its
first half at the neighbours of active positions as well: their share is what such a block costs at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-3


@dataclass
class Positions:
    """One block that runs at some positions.

    Args:
        share: Of the positions that run; at 1 the block is left as it is.
        fitting: Whether sums for the linear map are collected.
    """

    share: float = 1.0
    fitting: bool = False
    sums: list[Any] = field(default_factory=lambda: [0, 0])
    weights: Any = None
    near: list[float] = field(default_factory=list)

    def __call__(self, module: Any, inputs: Sequence[Any], output: Tensor) -> Tensor | None:
        """Forward hook: the block's output, with the branch at active positions alone."""
        import torch
        from torch.nn import functional as F

        if self.share >= 1:
            return None
        x = inputs[0]
        branch = output - x
        size = branch.pow(2).sum(1)  # N H W
        count = max(1, round(self.share * size[0].numel()))
        threshold = size.flatten(1).topk(count, 1).values[:, -1]
        active = (size >= threshold[:, None, None])[:, None]  # N 1 H W
        around = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        features = torch.cat((x, around, torch.ones_like(x[:, :1])), 1).movedim(1, -1)  # N H W F
        if self.fitting:
            rest = ~active[:, 0]
            left, right = features[rest].double(), branch.movedim(1, -1)[rest].double()
            self.sums = [self.sums[0] + left.T @ left, self.sums[1] + left.T @ right]
            return None
        self.near.append(float(F.max_pool2d(active.float(), 3, 1, 1).mean()))
        return torch.where(active, output, x + (features @ self.weights).movedim(-1, 1))

    def solve(self) -> None:
        """Fit the linear map."""
        import torch

        gram, mixed = self.sums
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.weights, self.sums, self.near = torch.linalg.solve(gram + ridge, mixed).float(), [0, 0], []


def main(
    model: Annotated[str, typer.Argument(help="MODEL, as in `surgery convert`.")],
    data: Annotated[str, typer.Option(help="Training images, to fit on and to compare on.")],
    share: Annotated[list[float], typer.Option(help="Of the positions that run; repeatable.")],
    fit: Annotated[int, typer.Option(help="Images to fit on.")] = 300,
    held: Annotated[int, typer.Option(help="Other images to compare on.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images per call.")] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Print how often the network agrees with itself, and which share of the positions blocks look at."""
    import torch

    import surgery
    from surgery.adapters import load_data
    from surgery.calling import batches, call
    from surgery.scripts.loading import Machine

    loaded = Machine(threads=threads, seed=seed).load(model)
    network = loaded.model
    read = load_data(
        data, loaded, split="train", batch_size=batch_size, limit=fit + held, seed=seed, shuffle=True, augment=False
    )
    inputs = list(batches(read))
    held_out, fitted = inputs[: held // batch_size], inputs[held // batch_size :]
    sites = [s for s in surgery.find_sites(network, inputs[0].rows(torch.arange(2))) if s.layout == "NCHW"]
    blocks = {site.name: Positions() for site in sites}
    for name, block in blocks.items():
        network.get_submodule(name).register_forward_hook(block)
    typer.echo(
        f"{len(blocks)} blocks hold {sum(s.flops for s in sites) / loaded_flops(network, inputs[0]):.1%} of the FLOPs"
    )
    with torch.no_grad():
        reference = [call(network, batch).argmax(1) for batch in held_out]
        typer.echo(
            "| share of positions | agreement with dense | positions that the first half of a branch needs |\n|---|---|---|"
        )
        for one in share:
            for block in blocks.values():
                block.share, block.fitting = one, True
            for batch in fitted:
                call(network, batch)
            for block in blocks.values():
                block.fitting = False
                block.solve()
            same = [call(network, b).argmax(1) == r for b, r in zip(held_out, reference, strict=True)]
            near = [sum(block.near) / len(block.near) for block in blocks.values()]
            typer.echo(f"| {one:.2f} | {float(torch.cat(same).float().mean()):.3f} | {sum(near) / len(near):.3f} |")


def loaded_flops(network: Any, batch: Any) -> float:
    """FLOPs of one image; one multiply-add = 2."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from surgery.calling import call

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call(network, batch.rows(torch.arange(1)))
    return float(counter.get_total_flops())


if __name__ == "__main__":
    typer.run(main)
