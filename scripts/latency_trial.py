"""Whether budgets in time hold by the clock: `python -m surgery.scripts.latency_trial`.

A timm network with random weights is converted one-shot and calibrated for a share of the dense model's time on this
device (`cost="latency"`), then timed beside the dense model on inputs that it was not calibrated on. Run it on an idle
machine: the calibration and the check both read the clock.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import typer

from surgery.scripts.running import show

BUDGETS = (0.8, 0.7, 0.6)


def main(
    network: Annotated[
        str, typer.Option(help="Name of a timm vision transformer or convolutional network.")
    ] = "deit_tiny_patch16_224",
    size: Annotated[int, typer.Option(help="Height and width of its images.")] = 96,
    batch_size: Annotated[int, typer.Option(help="Images per call.")] = 8,
    budget: Annotated[
        list[float] | None, typer.Option(help="Budgets, as a fraction of the dense model's time.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Checks, of which the mean counts.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Calibrate for budgets in time and check them by the clock."""
    import timm
    import torch
    from rich.table import Table

    from surgery import calibrate, convert
    from surgery.calling import as_batch
    from surgery.errors import BudgetError
    from surgery.latency import measure_ratio

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    sized: dict[str, Any] = {} if network.startswith("resnet") else {"img_size": size}
    model = timm.create_model(network, **sized).eval()
    data, held, fresh = (pictures(count, batch_size, size, seed + i) for i, count in enumerate((12, 8, 3)))
    gated = convert(
        model,
        0.7,
        data=data,
        validation=held,
        tune="oneshot",
        skip="affine",
        samples=12 * batch_size,
        second_look=False,
        seed=seed,
    )
    table = Table(
        "budget", "calibrated", "by the clock, other inputs", "off", title=f"{network}, {batch_size} of {size} px"
    )
    for goal in budget or BUDGETS:
        try:
            point = calibrate(gated, held, goal, cost="latency", grid=(0.9, 0.5))
        except BudgetError as error:
            table.add_row(f"{goal:g}", str(error), "", "")
            continue
        ratio = statistics.mean(measure_ratio(gated, [as_batch(one) for one in fresh]) for _ in range(rounds))
        table.add_row(f"{goal:g}", f"{point.cost:.3f}", f"{ratio:.3f}", f"{ratio - goal:+.3f}")
    show(table)


def pictures(count: int, size: int, pixels: int, seed: int) -> list[Any]:
    """Batches of noise of varying grain and contrast, so that routers tell inputs apart."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        rows = []
        for _ in range(size):
            grain = int(torch.randint(4, pixels // 2, (1,), generator=generator))
            contrast = 0.3 + 1.4 * float(torch.rand(1, generator=generator))
            rows.append(contrast * F.interpolate(torch.randn(1, 3, grain, grain, generator=generator), pixels)[0])
        made.append(torch.stack(rows))
    return made


if __name__ == "__main__":
    typer.run(main)
