"""The real runs of docs/results.md: `python -m surgery.scripts.real_runs --shared ../shared --out out/real`.

Each network is converted once, for 0.60 of its dense compute, and scored at several budgets on test data that nothing
was fitted, tuned or calibrated on. A run writes one JSON file per network; `--write docs/results.md` replaces the
tables there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.3)
START, END = "<!-- real runs: begin -->", "<!-- real runs: end -->"


@dataclass(frozen=True)
class Run:
    """One network and its data."""

    name: str
    title: str
    spec: str
    data: str
    limit: int
    batch_size: int
    speed: tuple[int, ...]
    augment: bool = False
    epochs: int = 2
    budget: float = 0.6
    lowest: float | None = None


MOBILENET = (
    "timm:mobilenetv2_100?pad_type=same&mean=0.5&std=0.5&crop_pct=0.986&pretrained=false"
    "&checkpoint={weights}/mobilenetv2_100_imagenet.safetensors"
)
RUNS = (
    Run(
        "vit6",
        "small ViT (nn.TransformerEncoder), CIFAR-10",
        "vit6",
        "cifar10",
        15000,
        50,
        (1, 64),
        augment=True,
        epochs=16,
    ),
    Run(
        "minilm",
        "MiniLM (BERT, 6 layers), SST-2",
        "weights/minilm-sst2",
        "sst2",
        12000,
        32,
        (1, 32),
        epochs=6,
        lowest=0.3,
    ),
    Run("resnet56", "ResNet-56, CIFAR-10", "resnet56", "cifar10", 15000, 50, (1, 256), augment=True, epochs=5),
    Run(
        "mobilenetv2",
        "mobilenetv2_100, ImageNet subset",
        MOBILENET,
        "imagenet",
        1000,
        25,
        (1, 32),
        augment=True,
        epochs=6,
        budget=0.85,
    ),
)


def main(
    shared: Annotated[Path, typer.Option(help="Directory with weights/ and data/.")] = Path("../shared"),
    out: Annotated[Path, typer.Option(help="Where to write checkpoints and JSON.")] = Path("out/real"),
    only: Annotated[list[str] | None, typer.Option(help="Names of the runs; all by default.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use at most that many samples, for a quick look.")] = None,
    test_limit: Annotated[int | None, typer.Option(help="Score on the first so many test inputs.")] = None,
    write: Annotated[Path | None, typer.Option(help="Markdown page whose tables are replaced.")] = None,
) -> None:
    """Convert and score the real networks."""
    import torch

    torch.set_num_threads(threads)
    os.environ["SURGERY_WEIGHTS"] = str(shared / "weights")
    out.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        if only and run.name not in only:
            continue
        result = perform(run, shared, out, seed, limit, test_limit or limit)
        (out / f"{run.name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        typer.echo(markdown([result]))
    if write is not None:
        results = [
            json.loads((out / f"{r.name}.json").read_text("utf-8")) for r in RUNS if (out / f"{r.name}.json").exists()
        ]
        text = write.read_text(encoding="utf-8")
        before, rest = text.split(START, 1)
        write.write_text(f"{before}{START}\n\n{markdown(results)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def perform(run: Run, shared: Path, out: Path, seed: int, limit: int | None, test_limit: int | None) -> dict[str, Any]:
    """Convert one network and score it at every budget."""
    from surgery import Options, convert, measure, save, set_budget
    from surgery.adapters import load_data, load_model
    from surgery.calibration import budget_range
    from surgery.context import state_of
    from surgery.scripts.bars import progress_bars
    from surgery.training import HIGHEST

    loaded = load_model(_spec(run, shared))
    common: dict[str, Any] = {"batch_size": run.batch_size, "seed": seed}
    train = load_data(
        str(shared / "data" / run.data / "train.parquet"), loaded, split="train", shuffle=True, augment=run.augment,
        limit=limit or run.limit, whole_texts="auto", group_by_length=True, **common,
    )  # fmt: skip
    test = load_data(str(shared / "data" / run.data / "test.parquet"), loaded, split="test", limit=test_limit, **common)
    started = time.perf_counter()
    training = Options(epochs=run.epochs, budgets=None if run.lowest is None else (run.lowest, HIGHEST))
    with progress_bars() as progress:
        gated = convert(loaded.model, run.budget, data=train, options=training, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    save(gated, out / run.name, overwrite=True, spec=_spec(run, shared))
    low, high = budget_range(gated)
    reports = {}
    for budget in BUDGETS:
        if not low - 0.01 <= budget <= high + 0.01:
            continue
        set_budget(gated, budget)
        timed = run.speed if budget == run.budget else ()
        reports[str(budget)] = measure(gated, test, dense=loaded.model, speed=timed, seed=seed).to_dict()
    return {
        "name": run.name,
        "title": run.title,
        "seconds": seconds,
        "samples": train.samples,
        "policy": state_of(gated).policy,
        "notes": state_of(gated).notes,
        "reports": reports,
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The tables of docs/results.md."""
    lines = []
    for result in results:
        first = next(iter(result["reports"].values()))
        metric = next(iter(first["metric"]), "agreement")
        dense = first["dense_metric"].get(metric, 1.0)
        lines += [
            f"### {result['title']}",
            "",
            f"Dense: {metric} {dense:.4f} on {first['data']}. Converted in {result['seconds']:.0f} s with "
            f"{result['samples']} training inputs, whose labels were not used. Policy that runs: {result['policy']}.",
            "",
            "| budget | cost | submodules | gated | agreement | static | random | shuffled | ours - static (95 %) | time |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for budget, report in result["reports"].items():
            peers = {p["name"]: p for p in report["peers"]}
            cells = [
                f"{peers[n]['metric']:.4f} @{peers[n]['cost']:.3f}" if n in peers else ""
                for n in ("static", "random", "shuffled")
            ]
            static = peers.get("static")
            gap = f"{static['difference']:+.4f} [{static['low']:+.4f}, {static['high']:+.4f}]" if static else ""
            speed = ", ".join(
                f"N={n}: {r['median']:.2f}x [{r['q1']:.2f}, {r['q3']:.2f}]" for n, r in report["speed"].items()
            )
            value = report["metric"].get(metric, report["agreement"])
            lines.append(
                f"| {budget} | {report['cost']:.3f} | {report['submodules']:.3f} | {value:.4f} | {report['agreement']:.4f} "
                f"| {' | '.join(cells)} | {gap} | {speed} |"
            )
        lines += ["", *(f"- {note}" for note in result["notes"]), ""]
    return "\n".join(lines)


def _spec(run: Run, shared: Path) -> str:
    if run.spec.startswith("timm:"):
        return run.spec.format(weights=shared / "weights")
    if "/" in run.spec:
        return str(shared / run.spec)
    return f"python:{Path(__file__).with_name('networks.py')}:{run.spec}"


if __name__ == "__main__":
    typer.run(main)
