"""Memory of a conversion's training beside the dense model's: `python -m surgery.scripts.training_memory NETWORK --data …`.

Each measurement runs in a process of its own: the growth of its peak resident memory over one step, with activations kept
for the backward pass. `dense` is a training forward and backward of the dense model itself, all weights trained, on the same
batch; `routers` and `skip paths` are steps of `surgery.train_routers` and `surgery.nesting.train_skip_paths`.
"""

from __future__ import annotations

from multiprocessing import get_context
from typing import Annotated

import typer


def main(
    network: Annotated[str, typer.Argument(help="MODEL, as for surgery convert.")],
    data: Annotated[str, typer.Option(help="Data, as for surgery convert.")],
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print a table of peaks."""
    context = get_context("spawn")
    peaks = {}
    for what in ("dense", "routers", "skip paths"):
        with context.Pool(1) as pool:
            peaks[what] = pool.apply(peak, (what, network, data, batch_size, threads))
    typer.echo("| step | MiB | of dense |\n|---|---|---|")
    for what, size in peaks.items():
        typer.echo(f"| {what} | {size / 2**20:.0f} | {size / peaks['dense']:.2f} |")


def peak(what: str, network: str, data: str, batch_size: int, threads: int) -> int:
    """Bytes by which two steps raise this process's peak."""
    import torch

    from surgery import Options, find_sites, insert_gates, train_routers
    from surgery.adapters import load_data, load_model
    from surgery.calibration import calibrate
    from surgery.calling import as_batch, call, read_output
    from surgery.cutting import cut_order
    from surgery.nesting import train_skip_paths

    torch.set_num_threads(threads)
    loaded = load_model(network)
    source = load_data(data, loaded, split="train", batch_size=batch_size, limit=2 * batch_size)
    batches = [as_batch(batch) for batch in source]
    small = [batch.rows(torch.arange(4)) for batch in batches]
    if what == "dense":
        model = loaded.model.train()
        for parameter in model.parameters():
            parameter.requires_grad_()
        before = _resident()
        for batch in batches:
            read_output(call(model, batch)).float().square().mean().backward()
        return _resident() - before
    gated = insert_gates(loaded.model, find_sites(loaded.model, small[0]).plan(trained=True))
    options = Options(steps=2)
    if what == "routers":
        calibrate(gated, small, 0.7)
        before = _resident()
        train_routers(gated, batches, budget=0.7, options=options)
    else:
        cut_order(gated, small)
        before = _resident()
        train_skip_paths(gated, batches, options=options)
    return _resident() - before


def _resident() -> int:
    """Peak resident memory of this process so far, in bytes."""
    import resource
    import sys

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


if __name__ == "__main__":
    typer.run(main)
