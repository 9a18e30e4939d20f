"""A lab page: what should routers be fitted to, and do auxiliary targets in training keep them from collapse?

    python -m surgery.scripts.harm_trial python:scripts/networks.py:vit6 --data ../shared/data/cifar10/train.parquet \
        --setting first_order --setting leave_one_out
    python -m surgery.scripts.harm_trial hf:../shared/weights/minilm-sst2 --data ../shared/data/sst2/train.parquet \
        --tune train --setting first_order --setting first_order:0.1:0 --setting first_order:0:0.1

Converted once, one-shot; for every setting `LABELS[:HARM_WEIGHT:DIVERSITY_WEIGHT]` routers are then fitted anew, and trained with
skip paths if asked for. Scored on other training data at equal realised cost: thresholds are set on these inputs, for all alike,
and routers decide whether they pay or not. The first rows are of the static policy with the same fitted skip paths.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.running import note

if TYPE_CHECKING:
    from torch import nn

    from surgery.calling import Batch


@dataclass(frozen=True, slots=True)
class Row:
    """One training at one budget.

    Args:
        cost: Realised, as a fraction of dense.
        divergence: Mean KL divergence from the dense model.
        shuffled: The same, with decisions given to other inputs.
        agreement: Share of inputs (or of tokens, padding included) with the same largest logit.
        entropy: Of a gate's mean decision, in bits, mean over gates.
        policies: Distinct sets of decisions.
        information: Mutual information of policy and input, in bits.
        decided: What decisions were made for, and how many.
    """

    cost: float
    divergence: float
    shuffled: float
    agreement: float
    entropy: float
    policies: int
    information: float
    decided: str


def main(
    model: Annotated[str, typer.Argument(help="MODEL: a classifier or language model.")],
    data: Annotated[str, typer.Option(help="Training data.")],
    settings: Annotated[
        list[str], typer.Option("--setting", help="Repeatable: LABELS[:HARM_WEIGHT:DIVERSITY_WEIGHT].")
    ],
    limit: options.FitLimit = 1500,
    held: options.Held = 500,
    batch_size: options.BatchSize = 50,
    budgets: options.TrialBudgets = None,
    seeds: options.Seeds = 1,
    granularity: options.Grain = "auto",
    tune: options.TrialTune = "oneshot",
    epochs: Annotated[int, typer.Option(help="Of training.")] = 3,
    samples: Annotated[int, typer.Option(help="Inputs to label.")] = 2048,
    augment: options.Augment = False,
    threads: options.Threads = 1,
) -> None:
    """Print a table."""
    from surgery.adapters import load_data, load_model
    from surgery.calling import batches

    options.set_up(threads, 0)
    asked, how = budgets or [0.75, 0.6, 0.5], (granularity, tune, epochs, samples)
    typer.echo(
        "| labels, harm, diversity | seed | budget | cost | KL | KL, shuffled | agreement | entropy | policies | bits |"
    )
    typer.echo("|---|---|---|---|---|---|---|---|---|---|")
    for seed in range(seeds):
        loaded = load_model(model)
        common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "shuffle": True}
        read = load_data(data, loaded, split="train", limit=limit + held, whole_texts="auto", **common)
        rows = list(batches(read))
        fit: Any = rows[: limit // batch_size]
        other = rows[limit // batch_size :]
        if augment:
            fit = load_data(data, loaded, split="train", limit=limit, whole_texts="auto", augment=True, **common)
        for setting, budget, row in compare(loaded.model, fit, other, settings, asked, seed, how):
            numbers = (
                f"{row.cost:.3f} | {row.divergence:.4f} | {row.shuffled:.4f} | {row.agreement:.3f} | {row.entropy:.2f} | "
                f"{row.policies:,} for {row.decided} | {row.information:.2f}"
            )
            typer.echo(f"| {setting.replace(':', ', ')} | {seed} | {budget} | {numbers} |")


def compare(
    model: nn.Module,
    fit: Any,
    other: Sequence[Batch],
    settings: Sequence[str],
    budgets: Sequence[float],
    seed: int,
    how: tuple[Any, str, int, int],
) -> Iterator[tuple[str, float, Row]]:
    """Fit and train for each setting, and score on inputs that nothing was fitted on."""
    import surgery
    from surgery.calibration import calibrate
    from surgery.context import state_of

    granularity, tune, epochs, samples = how
    start = surgery.convert(
        model,
        min(budgets),
        data=fit,
        granularity=granularity,
        tune="oneshot",
        second_look=False,
        samples=samples,
        seed=seed,
    )

    def scored(gated: nn.Module, policy: str) -> Iterator[tuple[float, Row]]:
        for budget in budgets:
            calibrate(gated, other, budget, grid=())
            state_of(gated).policy = policy
            yield budget, score(gated, other)

    yield from (("static", *row) for row in scored(copy.deepcopy(start), "static"))
    for setting in settings:
        labels, harm, diversity, *_ = (*setting.split(":"), "0", "0")
        training = surgery.Options(epochs=epochs, harm_weight=float(harm), diversity_weight=float(diversity))
        gated, began = copy.deepcopy(start), time.process_time()
        state_of(gated).policy = "routed"
        surgery.regress_routers(gated, fit, samples=samples, seed=seed, labels=labels)  # type: ignore[arg-type]
        if tune == "train":
            calibrate(gated, list(fit)[:10], min(budgets))
            surgery.train_routers(gated, fit, budget=min(budgets), options=training, seed=seed)
        note(f"{setting}: {time.process_time() - began:.0f} s of CPU")
        yield from ((setting, *row) for row in scored(gated, "routed"))


def score(gated: nn.Module, data: Sequence[Batch]) -> Row:
    """Run ours, the dense model, and ours with its decisions given to other inputs."""
    import torch

    import surgery
    from surgery.auditing import audit
    from surgery.calling import read_output
    from surgery.context import state_of, tape
    from surgery.costs import Decided, place, run
    from surgery.objectives import divergence
    from surgery.policies import decided, shuffled

    state = state_of(gated)
    far, mixed, alike, decisions = [], [], [], []
    with torch.no_grad():
        for index, batch in enumerate(place(one, gated) for one in data):
            with surgery.execution(gated, "dense"):
                dense = read_output(run(gated, batch))
            with tape(gated) as events:
                output = read_output(run(gated, batch))
            with decided(gated, shuffled(events, index)):
                other = read_output(run(gated, batch)) if state.policy == "routed" else output
            far.append(divergence(output, dense, batch, values=state.gives_values))
            mixed.append(divergence(other, dense, batch, values=state.gives_values))
            alike.append((output.argmax(-1) == dense.argmax(-1)).flatten())
            decisions.append(Decided.of(events, state.units, batch.size))
    found = audit(gated, data, noise=0)
    entropy = sum(site.entropy for site in found.sites) / len(found.sites)
    means = [float(torch.cat(values).double().mean()) for values in (far, mixed, alike)]
    cost = Decided.joined(decisions).cost(state.costs)
    return Row(cost, means[0], means[1], means[2], entropy, found.policies, found.input_information, found.decided)


if __name__ == "__main__":
    typer.run(main)
