"""The real runs of docs/results.md, tables and picture: `python -m surgery.scripts.real_runs --shared ../shared --out out/real`.

Each network is converted for one budget, once per seed, and scored at several on test data that nothing was fitted, tuned or
calibrated on. Beside the default (routers and skip paths trained) stand two other columns of the first seed: routers alone, and
the default healed. What is already in `--out` is kept, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.scripts import real_page, real_tables

if TYPE_CHECKING:
    from surgery.adapters import Loaded
    from surgery.calling import Batch

STORIES = "Story writer (Llama, 5 layers), TinyStories"
STAGES = ("convert", "score", "columns", "peers", "time", "write")
MOBILENET = (
    "timm:mobilenetv2_100?pad_type=same&mean=0.5&std=0.5&crop_pct=0.986&pretrained=false"
    "&checkpoint={weights}/mobilenetv2_100_imagenet.safetensors"
)


@dataclass(frozen=True)
class Run:
    """One network and its data.

    Args:
        name: Of its directories and its JSON file.
        title: Over its table.
        source: `MODEL` string; `{shared}`, `{weights}`, `{out}` and `{networks}` are filled in.
        data: Directory in `data/`.
        limit: Training inputs, or None for all.
        batch_size: Of training and scoring.
        times: Batch sizes that are timed.
        budgets: Scored.
        targets: Budget -> what was aimed at.
        epochs: Of the default column.
        routers_epochs: Of the column of routers alone.
        heal: Kind, rate and steps of the healed column.
        augment: Whether pictures are flipped and shifted, and texts spliced.
        budget: Converted for.
        lowest: Smallest budget that is trained for.
        second_look: What `convert` is told.
        granularity: What `convert` is told.
        skip: Kind of skip path, likewise.
        test_limit: Test inputs, drawn with seed 0, or None for all.
        texts: Whether inputs are texts, whose lengths differ.
        prepare: Directory of the dense model that `surgery.scripts.news_head` writes, if it is that one.
    """

    name: str
    title: str
    source: str
    data: str
    limit: int | None
    batch_size: int
    times: tuple[int, ...]
    budgets: tuple[float, ...]
    targets: dict[float, str]
    epochs: int
    routers_epochs: int = 3
    heal: tuple[Literal["norms", "lora"], float, int] = ("lora", 3e-4, 200)
    augment: bool = False
    budget: float = 0.6
    lowest: float | None = None
    second_look: Literal["auto"] | bool = "auto"
    granularity: Literal["auto", "sample"] = "auto"
    skip: Literal["auto", "linear", "depthwise"] = "auto"
    test_limit: int | None = None
    texts: bool = False
    prepare: str = ""


RUNS = (
    Run(
        "resnet56", "ResNet-56, CIFAR-10", "python:{networks}:resnet56", "cifar10", 15000, 50, (1, 256), (0.75, 0.6, 0.5, 0.4),
        {0.75: "0.928", 0.6: "0.913", 0.5: "0.890"}, epochs=5, heal=("norms", 1e-3, 200), augment=True,
    ),
    Run(
        "resnet56-depthwise", "ResNet-56 with depthwise skip paths, CIFAR-10", "python:{networks}:resnet56", "cifar10", 15000,
        50, (1, 256), (0.75, 0.6, 0.5), {0.75: "0.928", 0.6: "0.913", 0.5: "0.890"}, epochs=5, heal=("norms", 1e-3, 200),
        augment=True, skip="depthwise",
    ),
    Run(
        "resnet56-linear", "ResNet-56 with linear skip paths, CIFAR-10", "python:{networks}:resnet56", "cifar10", 15000, 50,
        (1, 256), (0.75, 0.6, 0.5, 0.4), {0.75: "0.928", 0.6: "0.913", 0.5: "0.890"}, epochs=5, heal=("norms", 1e-3, 200),
        augment=True, skip="linear",
    ),
    Run(
        "minilm", "MiniLM (BERT, 6 layers), SST-2", "hf:{weights}/minilm-sst2", "sst2", None, 32, (1, 32),
        (0.75, 0.6, 0.5, 0.4, 0.3), {0.75: "100 %", 0.6: "100 %", 0.5: "99.8 %", 0.4: "98.5 %", 0.3: "96 %"}, epochs=6,
        lowest=0.3, second_look=False, texts=True,
    ),
    Run(
        "minilm-default", "MiniLM, SST-2, as `convert` does by itself", "hf:{weights}/minilm-sst2", "sst2", None, 32, (1, 32),
        (0.75, 0.6, 0.5), {0.75: "100 %", 0.6: "100 %", 0.5: "99.8 %"}, epochs=3, texts=True,
    ),
    Run(
        "minilm-sample", "MiniLM, SST-2, decided per text", "hf:{weights}/minilm-sst2", "sst2", None, 32, (1, 32),
        (0.75, 0.6, 0.5, 0.4, 0.3), {0.75: "100 %", 0.6: "100 %", 0.5: "99.8 %", 0.4: "98.5 %", 0.3: "96 %"}, epochs=6,
        lowest=0.3, granularity="sample", texts=True,
    ),
    Run(
        "agnews", "MiniLM features and a linear head, AG News", "hf:{out}/agnews-dense", "agnews", 5000, 32, (1, 32),
        (0.75, 0.6, 0.5, 0.4, 0.3), {0.75: "100 %", 0.6: "99.8 %", 0.5: "99.3 %", 0.4: "98.5 %", 0.3: "97 %"}, epochs=3,
        lowest=0.3, test_limit=1500, texts=True, prepare="agnews-dense",
    ),
    Run(
        "agnews-sample", "AG News, decided per text", "hf:{out}/agnews-dense", "agnews", 5000, 32, (1, 32),
        (0.75, 0.6, 0.5, 0.4), {0.75: "100 %", 0.6: "99.8 %", 0.5: "99.3 %", 0.4: "98.5 %"}, epochs=3, lowest=0.3,
        granularity="sample", test_limit=1500, texts=True, prepare="agnews-dense",
    ),
    Run(
        "vit6", "small ViT (nn.TransformerEncoder), CIFAR-10", "python:{networks}:vit6", "cifar10", 15000, 50, (1, 64),
        (0.85, 0.75, 0.6, 0.5, 0.4), {0.85: "100 %", 0.75: "99.5 %", 0.6: "97 %", 0.5: "93 %"}, epochs=16, routers_epochs=4,
        augment=True,
    ),
    Run(
        "mobilenetv2", "MobileNetV2, ImageNet subset", MOBILENET, "imagenet", 1000, 25, (1, 32), (0.9, 0.85, 0.8),
        {0.85: "96 %"}, epochs=8, heal=("norms", 1e-3, 40), augment=True, budget=0.85,
    ),
)  # fmt: skip


def main(
    shared: Annotated[Path, typer.Option(help="Directory with weights/ and data/.")] = Path("../shared"),
    out: Annotated[Path, typer.Option(help="Where to write checkpoints and JSON.")] = Path("out/real"),
    only: Annotated[list[str] | None, typer.Option(help="Names of the runs; all by default.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(STAGES)}; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Conversions per network.")] = 3,
    columns: Annotated[bool, typer.Option(help="Also routers alone, and healed.")] = True,
    policies: Annotated[
        bool, typer.Option(help="Also static cuts and shuffled decisions, which take most of a score.")
    ] = True,
    peer_inputs: Annotated[int, typer.Option(help="Test inputs for policies that ignore the input.")] = 1000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    limit: Annotated[int | None, typer.Option(help="Use at most that many samples, for a quick look.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Markdown page whose tables of these networks are replaced.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw of the page's tables.")] = None,
) -> None:
    """Convert and score the real networks."""
    import torch

    if picture is not None and write is None:
        raise typer.BadParameter("--picture is drawn of the tables of --write PAGE")
    torch.set_num_threads(threads)
    os.environ["SURGERY_WEIGHTS"] = str(shared / "weights")
    out.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in RUNS if not only or run.name in only]
    wanted = [name for name in STAGES if not stage or name in stage]
    for run in chosen:
        work = Work(run, shared, out, seeds, columns, threads, limit)
        for name in wanted:
            if name == "convert":
                work.convert()
            elif name == "score":
                work.score(policies=policies)
            elif name == "columns" and columns:
                work.score_columns()
            elif name == "peers":
                work.peers(peer_inputs)
            elif name == "time":
                work.time()
        typer.echo(real_tables.markdown(work.load()))
    if not only or "stories" in only:
        tell_stories(shared, out / "stories", wanted, seeds, columns, limit)
        typer.echo(stories_told(shared, out / "stories"))
    if "write" in wanted and write is not None:
        works = [Work(run, shared, out, seeds, columns, threads, limit) for run in chosen]
        sections = {work.run.title: real_tables.markdown(work.load()) for work in works if work.known}
        told = stories_told(shared, out / "stories") if not only or "stories" in only else ""
        real_page.replace(write, sections | ({STORIES: told} if told else {}))
        if picture is not None:
            real_page.draw(picture, write)


def tell_stories(shared: Path, out: Path, wanted: list[str], seeds: int, columns: bool, limit: int | None) -> None:
    """The story writer: converted and scored in every way that is not there yet, and timed."""
    from surgery.scripts import stories

    out.mkdir(parents=True, exist_ok=True)
    setting = stories.Setting(shared, out, limit or 600, min(limit or 100, 100), epochs=3)
    for variant in stories.VARIANTS:
        if variant.granularity == "prefill":
            continue  # it was never run to the end
        if "convert" in wanted:
            stories.tell_all(setting, variant, seeds, columns=columns)
        if "time" in wanted:
            stories.clock(setting, variant)


def stories_told(shared: Path, out: Path) -> str:
    """The story writer's tables, and what it writes; "" before it has written."""
    from surgery.scripts import stories

    setting = stories.Setting(shared, out, 0, 0, 0)
    tables = stories.markdown({variant.name: setting.load(variant) for variant in stories.VARIANTS})
    return f"### {STORIES}\n\n{tables}\n" if tables else ""


@dataclass
class Work:
    """One run's directories, and its JSON file, which every stage adds to."""

    run: Run
    shared: Path
    out: Path
    seeds: int
    columns: bool
    threads: int
    limit: int | None

    @property
    def spec(self) -> str:
        """The dense model as a `MODEL` string."""
        networks = Path(__file__).with_name("networks.py")
        weights = self.shared / "weights"
        return self.run.source.format(shared=self.shared, weights=weights, out=self.out, networks=networks)

    @property
    def known(self) -> bool:
        """Whether it was scored."""
        return "trained" in self.load()

    @property
    def trained(self) -> list[Path]:
        """Conversions with trained routers and skip paths, one per seed."""
        return [self.out / f"{self.run.name}-{seed}" for seed in range(self.seeds)]

    def load(self) -> dict[str, Any]:
        """What is known so far."""
        file = self.out / f"{self.run.name}.json"
        found = json.loads(file.read_text("utf-8")) if file.exists() else {}
        return {"name": self.run.name, "title": self.run.title, **found}

    def keep(self, **more: Any) -> None:
        """Add to what is known."""
        text = json.dumps(self.load() | more, indent=1)
        (self.out / f"{self.run.name}.json").write_text(text, encoding="utf-8")

    def convert(self) -> None:
        """Make what is not there yet."""
        from surgery.scripts import news_head

        if self.run.prepare and not (self.out / self.run.prepare).exists():
            news_head.main(self.shared, self.out / self.run.prepare, self.limit, self.threads, 0)
        for seed, directory in enumerate(self.trained):
            self._make(directory, partial(self._convert, "train", self.run.epochs, seed))
        if self.columns:
            routers, healed = (self.out / f"{self.run.name}-{column}" for column in ("routers", "healed"))
            self._make(routers, partial(self._convert, "routers", self.run.routers_epochs, 0))
            self._make(healed, self._heal)

    def _make(self, directory: Path, make: Callable[[], Any]) -> None:
        from surgery import save

        if not directory.exists():
            typer.echo(f"{directory} …", err=True)
            save(make(), directory, spec=self.spec)

    def _convert(self, tune: Literal["train", "routers"], epochs: int, seed: int) -> Any:
        from surgery import Options, convert
        from surgery.options import HIGHEST
        from surgery.scripts.bars import progress_bars

        loaded, run = self._dense(), self.run
        options = Options(epochs=epochs, budgets=None if run.lowest is None else (run.lowest, HIGHEST))
        train = self._train(loaded, seed)
        with progress_bars() as progress:
            return convert(
                loaded.model,
                run.budget,
                data=train,
                tune=tune,
                options=options,
                second_look=run.second_look,
                granularity=run.granularity,
                skip=run.skip,
                seed=seed,
                progress=progress,
            )

    def _heal(self) -> Any:
        from surgery import Options
        from surgery.budgets import set_budget
        from surgery.conversion import heal_converted

        kind, rate, steps = self.run.heal
        gated, loaded = self._gated(self.trained[0])
        set_budget(gated, self.run.budget)
        heal_converted(gated, self._train(loaded, 0), kind, options=Options(steps=steps, heal_rate=rate))
        return gated

    def score(self, *, policies: bool) -> None:
        """The default column at all budgets, on all test inputs; with static cuts and shuffled decisions if asked for."""
        from surgery.context import state_of

        pairs = [self._gated(directory) for directory in self.trained]
        models = [gated for gated, _ in pairs]
        dense, metric, points = self._points(pairs[0][1], models, peers=policies)
        self.keep(
            dense=dense.mean,
            metric=metric,
            inputs=len(dense.values),
            targets={str(budget): text for budget, text in self.run.targets.items()},
            policy=[state_of(gated).policy for gated in models],
            looks=[bool(state_of(gated).looks) for gated in models],
            trained=points,
        )

    def score_columns(self) -> None:
        """Routers alone, and healed, at all budgets."""
        from surgery.context import state_of

        for column in ("routers", "healed"):
            gated, loaded = self._gated(self.out / f"{self.run.name}-{column}")
            undone = column == "healed" and state_of(gated).healing is None
            self.keep(**{column: None if undone else self._points(loaded, [gated], peers=False)[2]})

    def _points(
        self, loaded: Loaded, models: list[Any], *, peers: bool
    ) -> tuple[Any, str | None, list[dict[str, Any]]]:
        """Scores of the dense model, the metric, and all models at every budget."""
        from surgery.scripts.seeds import dense_score, score_all

        inputs = self._test(loaded)
        dense, outputs, metric = dense_score(loaded.model, inputs)
        common = (models, loaded.model, inputs, dense, outputs)
        return dense, metric, [asdict(score_all(budget, *common, peers=peers)) for budget in self.run.budgets]

    def peers(self, count: int) -> None:
        """Policies that ignore the input beside the first seed's conversion, the second look on top of static among them."""
        from surgery.budgets import set_budget
        from surgery.measurement import measure

        gated, loaded = self._gated(self.trained[0])
        test = self._test(loaded, count)
        found = {}
        for budget in self.run.budgets:
            set_budget(gated, budget)
            report = measure(gated, test, dense=loaded.model, speed=())
            found[str(budget)] = [asdict(peer) for peer in report.peers]
        self.keep(peers=found, peer_inputs=min(count, sum(batch.size for batch in test)))

    def time(self) -> None:
        """The first seed's conversion by the clock, on training inputs that the test does not hold."""
        import torch

        from surgery.budgets import set_budget
        from surgery.calling import device_of, dtype_of
        from surgery.scripts.benchmark import inputs_of, steps_of
        from surgery.timing import compare, conditions

        gated, loaded = self._gated(self.trained[0])
        where, found = device_of(loaded.model), {}
        alone = [(1, False, 1)] * (1 in self.run.times and self.threads > 1)
        kinds = [(size, False, self.threads) for size in self.run.times] + alone
        kinds += [(self.run.times[-1], True, self.threads)] * self.run.texts
        try:
            for budget in self.run.budgets:
                set_budget(gated, budget)
                sizes = {}
                for size, like, threads in kinds:
                    torch.set_num_threads(threads)
                    inputs = inputs_of(loaded, str(self._file("train")), "train", size, 0, group_by_length=like)
                    steps, repeats = (steps_of(gated, inputs), steps_of(loaded.model, inputs)), 100 if size == 1 else 30
                    ratio = compare(*steps, repeats=repeats, device=where).to_dict()
                    sizes[f"{size}{', one thread' * (threads != self.threads)}{' of like length' * like}"] = ratio
                found[str(budget)] = sizes
        finally:
            torch.set_num_threads(self.threads)
        self.keep(times=found, conditions=conditions(where, dtype_of(loaded.model)))

    def _dense(self) -> Loaded:
        from surgery.adapters import load_model

        return load_model(self.spec)

    def _gated(self, directory: Path) -> tuple[Any, Loaded]:
        from surgery.scripts.loading import Machine

        return Machine(threads=self.threads).load_converted(directory, self.spec)

    def _file(self, split: str) -> Path:
        return self.shared / "data" / self.run.data / f"{split}.parquet"

    def _train(self, loaded: Loaded, seed: int) -> Any:
        from surgery.adapters import load_data

        return load_data(
            str(self._file("train")), loaded, split="train", shuffle=True, augment=self.run.augment, seed=seed,
            limit=self.limit or self.run.limit, whole_texts="auto", group_by_length=True, batch_size=self.run.batch_size,
        )  # fmt: skip

    def _test(self, loaded: Loaded, count: int | None = None) -> list[Batch]:
        from surgery.adapters import load_data
        from surgery.calling import batches

        limit = min((n for n in (count, self.limit, self.run.test_limit) if n is not None), default=None)
        read = load_data(
            str(self._file("test")), loaded, split="test", limit=limit, seed=0, shuffle=limit is not None,
            group_by_length=self.run.texts, batch_size=self.run.batch_size,
        )  # fmt: skip
        return list(batches(read))


if __name__ == "__main__":
    typer.run(main)
