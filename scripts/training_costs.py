"""Memory and time of a conversion's training beside the dense model's: `python -m surgery.scripts.training_costs MODEL --data …`.

Each measurement runs in a process of its own, in turns, and the medians are printed: the growth of its peak resident memory,
with activations kept for the backward pass, and the CPU time of a step once the first one is over. `dense` is a training
forward and backward of the dense model itself, all weights trained, on the same batches; `routers` and `skip paths` are steps of
`surgery.train_routers` and `surgery.nesting.train_skip_paths`; `closed form` is one whole `surgery.fit_skip_paths` on its 512
inputs. Each also runs with freed memory kept (`surgery.scripts.memory`), as `surgery convert` does.
"""

from __future__ import annotations

import itertools
import statistics
import time
from multiprocessing import get_context
from typing import Annotated

import typer

STEPS = 4
FITTED = 512
WHAT = ("dense", "routers", "skip paths", "closed form")


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for surgery convert.")],
    data: Annotated[str, typer.Option(help="Data, as for surgery convert.")],
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 50,
    repeats: Annotated[int, typer.Option(help="Processes for each measurement.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print a table of peaks and times."""
    context = get_context("spawn")
    found: dict[tuple[str, bool], list[tuple[int, float]]] = {
        (what, kept): [] for what in WHAT for kept in (False, True)
    }
    for _ in range(repeats):
        for (what, kept), costs in found.items():
            with context.Pool(1) as pool:
                costs.append(pool.apply(measure, (what, kept, model, data, batch_size, threads)))
    dense, plain = (statistics.median(column) for column in zip(*found["dense", False], strict=True))
    typer.echo("| step | freed memory kept | MiB | of dense | seconds of CPU | of dense |\n|---|---|---|---|---|---|")
    for (what, kept), costs in found.items():
        size, seconds = (statistics.median(column) for column in zip(*costs, strict=True))
        row = (what, "yes" if kept else "no", f"{size / 2**20:.0f}", f"{size / dense:.2f}")
        typer.echo(f"| {' | '.join((*row, f'{seconds:.2f}', f'{seconds / plain:.2f}'))} |")


def measure(what: str, kept: bool, model: str, data: str, batch_size: int, threads: int) -> tuple[int, float]:
    """Bytes by which a few steps raise this process's peak, and the median CPU time of all steps but the first, or of the fit."""
    import torch

    from surgery import Options, find_sites, fit_skip_paths, insert_gates, train_routers
    from surgery.adapters import load_data, load_model
    from surgery.calibration import calibrate
    from surgery.calling import as_batch, call, read_output
    from surgery.cutting import cut_order
    from surgery.nesting import train_skip_paths
    from surgery.scripts.memory import keep_freed_memory

    if kept:
        keep_freed_memory()
    torch.set_num_threads(threads)
    loaded = load_model(model)
    count = FITTED if what == "closed form" else STEPS * batch_size
    source = load_data(data, loaded, split="train", batch_size=batch_size, limit=count)
    batches = [as_batch(batch) for batch in source]
    small = [batch.rows(torch.arange(4)) for batch in batches]
    options, ended = Options(steps=STEPS), []

    def progress(phase: str, *_: object) -> None:
        if phase.startswith("training"):
            ended.append(time.process_time())

    if what == "dense":
        network = loaded.model.train()
        for parameter in network.parameters():
            parameter.requires_grad_()
        before = _resident()
        for batch in batches:
            read_output(call(network, batch)).float().square().mean().backward()
            progress("training")
    else:
        gated = insert_gates(loaded.model, find_sites(loaded.model, small[0]).plan(trained=True, budget=0.6))
        if what == "routers":
            calibrate(gated, small, 0.7)
            before = _resident()
            train_routers(gated, batches, budget=0.7, options=options, progress=progress)
        elif what == "closed form":
            before = _resident()
            progress("training")
            fit_skip_paths(gated, batches)
            progress("training")
        else:
            cut_order(gated, small)
            before = _resident()
            train_skip_paths(gated, batches, options=options, progress=progress)
    return _resident() - before, statistics.median(b - a for a, b in itertools.pairwise(ended))


def _resident() -> int:
    """Peak resident memory of this process so far, in bytes."""
    import resource
    import sys

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


if __name__ == "__main__":
    typer.run(main)
