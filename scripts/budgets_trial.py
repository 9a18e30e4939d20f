"""A lab page: does one checkpoint serve every budget as well as a checkpoint that was trained for that budget alone?

    python -m surgery.scripts.budgets_trial MODEL --data TRAIN --test TEST --budget 0.75 --budget 0.6 --budget 0.5

MODEL is converted once, as by default, and once more for every budget, with `Options(budgets=(budget, budget))`. Both are
scored on labelled data that nothing was fitted on; differences are in points, with paired bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.seeds import against, dense_score, score_at

if TYPE_CHECKING:
    from surgery.scripts.seeds import Scored


def main(
    model: Annotated[str, typer.Argument(help="MODEL: a classifier.")],
    data: Annotated[str, typer.Option(help="Training data.")],
    test: Annotated[str, typer.Option(help="Labelled data to score on.")],
    budget: Annotated[list[float], typer.Option(help="Repeatable.")],
    shared_budget: Annotated[float, typer.Option(help="What the checkpoint for all budgets is converted for.")] = 0.6,
    limit: Annotated[int | None, typer.Option(help="Inputs to convert with.")] = None,
    test_limit: Annotated[int | None, typer.Option(help="Inputs to score on, drawn with seed 0.")] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per batch.")] = 32,
    epochs: Annotated[int, typer.Option(help="Of every training.")] = 2,
    augment: Annotated[bool, typer.Option("--augment", help="Flip and shift pictures at random.")] = False,
    seed: options.Seed = 0,
    threads: options.Threads = 1,
) -> None:
    """Print a table."""
    import surgery
    from surgery.adapters import load_data
    from surgery.calling import batches
    from surgery.scripts.loading import Machine

    loaded = Machine(threads=threads, seed=seed).load(model)
    rows = load_data(
        data,
        loaded,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        shuffle=True,
        augment=augment,
        whole_texts="auto",
        group_by_length=True,
    )
    read = load_data(
        test, loaded, split="test", batch_size=batch_size, limit=test_limit, seed=0, shuffle=test_limit is not None
    )
    inputs = list(batches(read))
    dense, outputs, metric = dense_score(loaded.model, inputs)
    typer.echo(f"dense: {metric} {dense.mean:.4f} on {len(dense.values):,} inputs")

    def converted(wanted: float, budgets: tuple[float, float] | None) -> Any:
        training = surgery.Options(epochs=epochs, budgets=budgets)
        return surgery.convert(loaded.model, wanted, data=rows, second_look=False, options=training, seed=seed)

    shared = converted(shared_budget, None)
    typer.echo("| budget | cost, one for all | score | cost, own | score | one for all minus own (95 %) |")
    typer.echo("|---|---|---|---|---|---|")
    for one in budget:
        ours = score_at(shared, one, loaded.model, inputs, outputs)
        own = score_at(converted(one, (one, one)), one, loaded.model, inputs, outputs)
        typer.echo(row(one, ours, own))


def row(budget: float, ours: Scored, own: Scored) -> str:
    """A line of the table."""
    mean, low, high = (100 * value for value in against(ours.scores, own.scores))
    cells: Sequence[str] = (
        f"{budget:.2f}",
        f"{ours.cost:.3f}",
        f"{ours.scores.mean:.4f}",
        f"{own.cost:.3f}",
        f"{own.scores.mean:.4f}",
        f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
