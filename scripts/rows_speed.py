"""What few rows cost: `python -m surgery.scripts.rows_speed`.

Skipping tokens makes matrices shorter, and their weights have to be read all the same. This times the two linear maps of an
MLP at some numbers of rows, each call with other weights, as the layers of a network do, and compares with all rows.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import typer


def main(
    channels: Annotated[int, typer.Option(help="Width of the network.")] = 384,
    hidden: Annotated[int, typer.Option(help="Width of its MLPs.")] = 1536,
    rows: Annotated[int, typer.Option(help="Tokens of one call.")] = 25,
    layers: Annotated[int, typer.Option(help="MLPs, each with weights of its own.")] = 18,
    repeats: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 30,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print a table: active rows, milliseconds per MLP, and their share of the time and of the work of all rows."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weights = [(torch.randn(hidden, channels), torch.randn(channels, hidden)) for _ in range(layers)]
    shares = (1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0)
    counts = [max(1, round(share * rows)) for share in shares]
    inputs = [torch.randn(count, channels) for count in counts]
    times: list[list[float]] = [[] for _ in counts]
    with torch.inference_mode():
        for _ in range(repeats):
            for x, taken in zip(inputs, times, strict=True):
                started = time.perf_counter()
                for up, down in weights:
                    F.linear(F.linear(x, up), down)
                taken.append((time.perf_counter() - started) / layers)
    whole = statistics.median(times[0])
    typer.echo("| active rows | ms | time | work |\n|---|---|---|---|")
    for count, taken in zip(counts, times, strict=True):
        middle = statistics.median(taken)
        typer.echo(f"| {count} of {rows} | {middle * 1e3:.3f} | {middle / whole:.2f} | {count / rows:.2f} |")


if __name__ == "__main__":
    typer.run(main)
