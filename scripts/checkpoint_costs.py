"""Size of what a conversion adds, and seconds to save and load it: `python -m surgery.scripts.checkpoint_costs`.

Weights are random, since neither size nor time depends on them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

NETWORKS = ("resnet50", "deit_small_patch16_224", "mobilenetv2_100")


def main(
    networks: Annotated[list[str] | None, typer.Argument(help="Architectures of timm.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 5,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
) -> None:
    """Print a row of a table for each network; times are medians in one process."""
    import torch

    torch.set_num_threads(threads)
    typer.echo(
        "| network | gates | base, MB | ours, MB | share | save, s | load base, s | load gated, s | overhead, s |"
    )
    typer.echo("|---|---|---|---|---|---|---|---|---|")
    for name in networks or NETWORKS:
        typer.echo(_row(name, repeats))


def _row(name: str, repeats: int) -> str:
    import timm

    import surgery
    from surgery.adapters import load_model

    loaded = load_model(f"timm:{name}?pretrained=false")
    example = loaded.adapter.example(loaded.model)
    gated = surgery.insert_gates(loaded.model, surgery.find_sites(loaded.model, example).plan(skip="affine"))
    with tempfile.TemporaryDirectory() as temporary:
        ours, whole = Path(temporary) / "ours", Path(temporary) / "whole"
        save = _median(lambda: surgery.save(gated, ours, overwrite=True), repeats)
        surgery.save(gated, whole, base=True)
        base = _median(lambda: timm.create_model(f"local-dir:{whole}", pretrained=True), repeats)
        both = _median(lambda: surgery.load(whole), repeats)
        added = sum(file.stat().st_size for file in ours.iterdir())
        weights = (whole / "model.safetensors").stat().st_size
    gates = len(surgery.status(gated).sites)
    return (
        f"| {name} | {gates} | {weights / 1e6:.1f} | {added / 1e6:.2f} | {100 * added / weights:.2f} % "
        f"| {save:.2f} | {base:.2f} | {both:.2f} | {both - base:.2f} |"
    )


def _median(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    typer.run(main)
