"""A lab page: is it worth it that an MLP's router reads what the router of its layer's attention made?

    python -m surgery.scripts.routers_trial python:scripts/networks.py:vit6 --data ../shared/data/cifar10/train.parquet
    python -m surgery.scripts.routers_trial --time

The first converts twice, with `routers="own"` and `"shared"`, and compares on other training data at equal realised cost:
thresholds are set on what is scored, for both. The second takes the CPU time of all routers of a call, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.running import note

if TYPE_CHECKING:
    from torch import nn

KINDS = ("own", "shared")


@dataclass(frozen=True, slots=True)
class Row:
    """One conversion at one budget.

    Args:
        kind: own or shared.
        seed: Of data and routers.
        cost: Realised, as a fraction of dense.
        divergence: Mean KL divergence from the dense model.
        agreement: Share of inputs (or of tokens, padding included) with the same largest logit.
    """

    kind: str
    seed: int
    budget: float
    cost: float
    divergence: float
    agreement: float


def main(
    model: Annotated[str | None, typer.Argument(help="MODEL: a classifier or language model.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data.")] = None,
    limit: options.FitLimit = 1500,
    held: options.Held = 500,
    batch_size: options.BatchSize = 50,
    budgets: options.TrialBudgets = None,
    seeds: options.Seeds = 1,
    granularity: options.Grain = "auto",
    tune: options.TrialTune = "oneshot",
    epochs: Annotated[int, typer.Option(help="Of training.")] = 3,
    timed: Annotated[bool, typer.Option("--time", help="Take times instead.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed pairs.")] = 200,
    threads: options.Threads = 1,
) -> None:
    """Print a table."""
    options.set_up(threads, 0)
    if timed:
        typer.echo(
            "| network | granularity | shared by own (middle half) | own, us of CPU a call | gates |\n|---|---|---|---|---|"
        )
        for name, grain, build in timed_networks():
            typer.echo(f"| {name} | {grain} | {time_routers(build, repeats)} |")
        return
    if model is None or data is None:
        raise typer.BadParameter("MODEL and --data are needed without --time")
    typer.echo("| routers | seed | budget | cost | KL | agreement |\n|---|---|---|---|---|---|")
    settings = {"granularity": granularity, "tune": tune}
    for seed in range(seeds):
        for row in compare(model, data, (limit, held, batch_size), budgets or [0.75, 0.6, 0.5], seed, epochs, settings):
            cells = (
                f"{row.kind} | {row.seed} | {row.budget} | {row.cost:.3f} | {row.divergence:.4f} | {row.agreement:.3f}"
            )
            typer.echo(f"| {cells} |")


def compare(
    model: str,
    data: str,
    sizes: tuple[int, int, int],
    budgets: list[float],
    seed: int,
    epochs: int,
    settings: dict[str, Any],
) -> Iterator[Row]:
    """Convert with each kind of routers, and score on inputs that nothing was fitted on."""
    import torch

    import surgery
    from surgery.adapters import load_data, load_model
    from surgery.calibration import calibrate
    from surgery.choosing import distances_from_dense
    from surgery.context import state_of
    from surgery.costs import observe

    limit, held, size = sizes
    loaded = load_model(model)
    common = {"batch_size": size, "limit": limit + held, "seed": seed, "shuffle": True, "whole_texts": True}
    rows = list(load_data(data, loaded, split="train", **common))  # type: ignore[arg-type]
    fit, other = rows[: limit // size], rows[limit // size :]
    for kind in KINDS:
        started = time.process_time()
        more: Any = {**settings, "routers": kind, "options": surgery.Options(epochs=epochs)}
        gated = surgery.convert(loaded.model, min(budgets), data=fit, second_look=False, seed=seed, **more)
        state = state_of(gated)
        share = sum(site.router for site in state.costs.sites.values()) / state.costs.dense
        widths = sorted({planned.hidden for planned in state.plan.sites})
        note(f"{kind}: {time.process_time() - started:.0f} s of CPU, routers of width {widths} {share:.4f} of dense")
        for budget in budgets:
            calibrate(gated, other, budget, grid=())
            state.policy = "routed"
            usage = observe(gated, other)
            with surgery.execution(gated, "dense"):
                dense = observe(gated, other).outputs
            alike = [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(usage.outputs, dense, strict=True)]
            same = float(torch.cat(alike).double().mean())
            cost = usage.decided.cost(state.costs)
            yield Row(kind, seed, budget, cost, float(distances_from_dense(gated, other, usage).mean()), same)


# -- times ------------------------------------------------------------------------------------------------------------

Timed = tuple["nn.Module", Callable[[], Any]]
"""A gated model, and one call of it (or of a part)."""


def timed_networks() -> Iterator[tuple[str, str, Callable[[str], Timed]]]:
    """Name, granularity, and what builds the network with one kind of routers."""

    def deit(grain: Any) -> Callable[[str], Timed]:
        def build(kind: Any) -> Timed:
            import timm
            import torch

            import surgery

            torch.manual_seed(0)
            model = timm.create_model("deit_small_patch16_224").eval()
            x = torch.randn(1, 3, 224, 224)
            plan = surgery.find_sites(model, torch.randn(2, 3, 224, 224)).plan(
                granularity=grain, skip="identity", routers=kind
            )
            gated = surgery.insert_gates(model, plan)
            return gated, lambda: gated(x)

        return build

    def llama(kind: Any) -> Timed:
        from surgery.scripts.decoder_speed import LAYER, build, decode

        gated = build(LAYER, 1, 64, routers=kind)[1]
        return gated, decode(gated)

    yield "deit_small, N = 1", "sample", deit("sample")
    yield "deit_small, N = 1", "token", deit("token")
    yield "Llama-like layer, one token", "token", llama


def time_routers(build: Callable[[str], Timed], repeats: int) -> str:
    """CPU time of all decisions of a call with shared routers by that with own ones: cells of a table."""
    import torch

    from surgery import execution
    from surgery.context import override, state_of

    pairs = [build(kind) for kind in KINDS]
    found: list[list[int]] = [[], []]
    with torch.no_grad(), deciding(pairs[0][0]) as own, deciding(pairs[1][0]) as shared:
        for index in range(repeats + 5):
            for one in ((0, 1), (1, 0))[index % 2]:
                gated, call = pairs[one]
                with override(state_of(gated), thresholds=-1e9), execution(gated, "skip"):
                    call()
            for times, spent in zip(found, (own, shared), strict=True):
                if index >= 5:
                    times.append(spent[0])
                spent[0] = 0
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*found, strict=True)], n=4, method="inclusive")
    count = len(state_of(pairs[0][0]).names)
    return f"{middle:.2f}x ({low:.2f} … {high:.2f}) | {statistics.median(found[0]) / 1000:.0f} | {count}"


@contextmanager
def deciding(gated: nn.Module) -> Iterator[list[int]]:
    """Nanoseconds of CPU time that gates spend on deciding."""
    from surgery.gates import Gate, iter_gates

    spent = [0]

    def watch(gate: Gate) -> None:
        original = gate.decide

        def decide(*args: Any) -> Any:
            start = time.process_time_ns()
            result = original(*args)
            spent[0] += time.process_time_ns() - start
            return result

        gate.__dict__["decide"] = decide

    gates = [gate for _, gate in iter_gates(gated)]
    for gate in gates:
        watch(gate)
    try:
        yield spent
    finally:
        for gate in gates:
            del gate.__dict__["decide"]


if __name__ == "__main__":
    typer.run(main)
