"""What small pieces cost in plain torch, without a gate: `python -m surgery.scripts.rows_speed --what mlp`.

`mlp`: skipping tokens makes matrices shorter, and their weights have to be read all the same: the two linear maps of an MLP
at some numbers of rows. `attention`: some queries with keys and values of every token. `skip`: skip paths of a feature map and
their parts, beside one 3x3 convolution of what they replace. Each call of a layer has other weights, as in a network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor


class What(str, Enum):
    """What is timed."""

    mlp = "mlp"
    attention = "attention"
    skip = "skip"


def main(
    what: Annotated[What, typer.Option(help="What is timed.")] = What.mlp,
    channels: Annotated[int, typer.Option(help="Width of the network; 16 is that of ResNet-56's first stage.")] = 384,
    hidden: Annotated[int, typer.Option(help="Width of its MLPs.")] = 1536,
    heads: Annotated[int, typer.Option(help="Heads of its attention.")] = 12,
    rows: Annotated[int, typer.Option(help="Tokens of one call, or pixels along a side.")] = 25,
    batch_size: Annotated[int, typer.Option(help="Feature maps of one call.")] = 1,
    layers: Annotated[int, typer.Option(help="Layers, each with weights of its own.")] = 18,
    repeats: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 30,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print a table: what was run, milliseconds per layer, and the share of the first row's time."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if what is What.skip:
        steps = skip_steps(channels, rows, batch_size, layers)
    else:
        counts = [max(1, round(share * rows)) for share in (1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0)]
        make = mlp_step(channels, hidden, layers) if what is What.mlp else attention_step(channels, heads, rows, layers)
        steps = {f"{count} of {rows} rows": make(count) for count in counts}
    times: dict[str, list[float]] = {name: [] for name in steps}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - started) / layers)
    middles = {name: statistics.median(taken) for name, taken in times.items()}
    whole = next(iter(middles.values()))
    typer.echo("| | ms | time |\n|---|---|---|")
    for name, middle in middles.items():
        typer.echo(f"| {name} | {middle * 1e3:.3f} | {middle / whole:.2f} |")


def mlp_step(channels: int, hidden: int, layers: int) -> Callable[[int], Callable[[], None]]:
    """Two linear maps per layer, at a number of rows."""
    import torch
    from torch.nn import functional as F

    weights = [(torch.randn(hidden, channels), torch.randn(channels, hidden)) for _ in range(layers)]

    def at(count: int) -> Callable[[], None]:
        x = torch.randn(count, channels)

        def step() -> None:
            for up, down in weights:
                F.linear(F.linear(x, up), down)

        return step

    return at


def attention_step(channels: int, heads: int, rows: int, layers: int) -> Callable[[int], Callable[[], None]]:
    """Attention of one sample per layer, at a number of active queries, which are gathered and put back."""
    import torch
    from torch.nn import functional as F

    weights = [[torch.randn(channels, channels) / channels**0.5 for _ in range(4)] for _ in range(layers)]
    x = torch.randn(1, rows, channels)

    def split(value: Tensor) -> Tensor:
        return value.view(1, -1, heads, channels // heads).transpose(1, 2)

    def at(count: int) -> Callable[[], None]:
        active = torch.randperm(rows)[:count].sort().values

        def step() -> None:
            for query, key, value, output in weights:
                some = x if count == rows else x.index_select(1, active)
                keys, values = split(F.linear(x, key)), split(F.linear(x, value))
                made = F.scaled_dot_product_attention(split(F.linear(some, query)), keys, values)
                made = F.linear(made.transpose(1, 2).reshape(1, count, channels), output)
                _ = x + made if count == rows else x.index_add(1, active, made)

        return step

    return at


def skip_steps(channels: int, side: int, batch: int, layers: int) -> Mapping[str, Callable[[], None]]:
    """One 3x3 convolution, and skip paths with their parts."""
    import torch
    from torch.nn import functional as F

    x = torch.randn(batch, channels, side, side)
    flat = x.flatten(2)
    whole = [torch.randn(channels, channels, 3, 3) for _ in range(layers)]
    kernels = [torch.randn(channels, 1, 3, 3) for _ in range(layers)]
    mixing = [torch.randn(channels, channels, 1, 1) for _ in range(layers)]

    def each(step: Callable[[int], object]) -> Callable[[], None]:
        def steps() -> None:
            for layer in range(layers):
                step(layer)

        return steps

    def depthwise(layer: int) -> Tensor:
        return F.conv2d(x, kernels[layer], padding=1, groups=channels)

    return {
        "one 3x3 convolution": each(lambda layer: F.conv2d(x, whole[layer], padding=1)),
        "depthwise skip path": each(lambda layer: F.conv2d(depthwise(layer), mixing[layer])),
        "its depthwise convolution": each(depthwise),
        "1x1 convolution": each(lambda layer: F.conv2d(x, mixing[layer])),
        "the same as a product": each(
            lambda layer: torch.bmm(mixing[layer][None, :, :, 0, 0].expand(batch, -1, -1), flat)
        ),
    }


if __name__ == "__main__":
    typer.run(main)
