"""`convert` from end to end on tiny networks: what it gives, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Once, Stack, Unsized, assert_same, convolution, frozen, gate_all, gates, mlp

import surgery
from surgery import latency, regression
from surgery.budgets import budget_range
from surgery.calling import Batch
from surgery.choosing import prefer_static_where_it_wins
from surgery.context import state_of
from surgery.conversion import UnmeasuredQuality, first, select
from surgery.costs import observe
from surgery.counting import flop_counter
from surgery.errors import (
    AlreadyConverted,
    BudgetError,
    CheckpointError,
    DataError,
    NoSites,
    PlanMismatch,
    SurgeryError,
    UnsupportedModel,
)
from surgery.made_inputs import vary
from surgery.nesting import CHECKPOINT as NESTED
from surgery.options import Options
from surgery.resuming import CHECKPOINT
from surgery.sites import Sites
from surgery.timing import Ratio

QUICK = Options(steps=3)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "_STEPS", 40)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3
        )
    return model.eval()


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.randn(8, 3, 32, 32) for _ in range(10)]


@pytest.fixture
def texts() -> list[dict[str, Tensor]]:
    return [text(8, length) for length in (12, 9, 12, 7, 12, 12, 10, 12, 9, 11)]


def text(rows: int, length: int) -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.randint(3, length + 1, (rows, 1))).long()
    ids = torch.randint(1, 50, (rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows, dtype=torch.long)}


class Untouched:
    """Checks that a model is what it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = frozen(model)
        self.before = self.look()

    def look(self) -> list[Any]:
        """Everything but values."""
        modules = [
            (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.keys())
            for name, m in self.model.named_modules()
        ]
        tensors = [(n, id(p), p.data_ptr(), p.requires_grad, p.grad) for n, p in self.model.named_parameters()]
        return [modules, tensors]

    def check(self) -> None:
        assert_same(frozen(self.model), self.tensors)
        assert self.look() == self.before


def spent(gated: nn.Module, data: Any) -> float:
    """Mean realised cost as routed."""
    with surgery.execution(gated, "skip"):
        usage = observe(gated, data, outputs=False)
    return usage.decided.cost(state_of(gated).costs)


def held_out(data: list[Any]) -> list[Any]:
    return data[4::5]


def test_vision_transformer(vit: nn.Module, images: list[Tensor]) -> None:
    untouched = Untouched(vit)
    stages: list[str] = []
    gated = surgery.convert(vit, 0.6, data=images, options=QUICK, progress=lambda stage, *_: stages.append(stage))
    untouched.check()
    assert isinstance(gated, type(vit)) and type(gated).__name__ == "VisionTransformer"
    assert not gated.training and state_of(gated).budget == 0.6
    assert spent(gated, held_out(images)) == pytest.approx(0.6, abs=0.01)
    assert list(dict.fromkeys(stages)) == [
        "finding sites",
        "fitting skip paths",
        "ordering cuts",
        "labelling harm",
        "fitting routers",
        "calibrating",
        "training routers",
    ]
    with torch.no_grad():
        dense, routed = vit(images[0]), gated(images[0])
        assert routed.shape == dense.shape and not torch.equal(routed, dense)
        surgery.set_budget(gated, 1.0)
        assert_equal([gated(images[0])], [dense])
    low, high = budget_range(gated)
    surgery.set_budget(gated, (low + high) / 2)
    assert spent(gated, held_out(images)) == pytest.approx((low + high) / 2, abs=0.01)


def test_text_classifier(bert: nn.Module, texts: list[dict[str, Tensor]]) -> None:
    untouched = Untouched(bert)
    gated = surgery.convert(bert, 0.7, data=texts, options=QUICK)
    untouched.check()
    assert isinstance(gated, type(bert))
    assert spent(gated, held_out(texts)) == pytest.approx(0.7, abs=0.01)
    batch = {name: value for name, value in texts[0].items() if name != "labels"}
    with torch.no_grad():
        assert type(gated(**batch)) is type(bert(**batch))
        # padding further changes nothing
        padded = {name: nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
        assert_close([gated(**padded).logits], [gated(**batch).logits])


def test_convolutional_network_of_my_own() -> None:
    torch.manual_seed(0)
    model = Stack(*(convolution(4) for _ in range(3)), head=nn.Linear(4, 3), pool=True)
    model.train()  # stays so; conversion and result are in eval
    data = [(torch.randn(16, 4, 6, 6), torch.randint(3, (16,))) for _ in range(10)]
    untouched = Untouched(model)
    gated = surgery.convert(model, 0.5, data=data, options=QUICK)
    untouched.check()
    assert not gated.training
    assert spent(gated, held_out(data)) == pytest.approx(0.5, abs=0.01)


def test_forms_of_batches_are_alike(vit: nn.Module, images: list[Tensor]) -> None:
    def convert(data: Any) -> Tensor:
        gated = surgery.convert(vit, 0.6, data=data, options=QUICK, sites=["mlp"])
        with torch.no_grad():
            return gated(images[0])

    expected = convert(images)
    assert torch.equal(convert([(x, torch.zeros(8, dtype=torch.long)) for x in images]), expected)
    assert torch.equal(convert([{"x": x, "labels": torch.zeros(8)} for x in images]), expected)
    loader = DataLoader(TensorDataset(torch.cat(images), torch.zeros(80, dtype=torch.long)), batch_size=8)
    assert torch.equal(convert(loader), expected)


def test_same_seed_same_model(vit: nn.Module, images: list[Tensor]) -> None:
    def convert(seed: int) -> dict[str, Tensor]:
        return frozen(surgery.convert(vit, 0.6, data=images, options=QUICK, seed=seed))

    one = convert(3)
    torch.randn(5)
    assert_same(convert(3), one)
    with pytest.raises(AssertionError):
        assert_same(convert(4), one)


def test_shuffled_data(vit: nn.Module, images: list[Tensor]) -> None:
    """Passes over a shuffled loader differ; the held-out part must not."""
    loader = DataLoader(torch.cat(images), batch_size=8, shuffle=True)  # type: ignore[arg-type]
    gated = surgery.convert(vit, 0.6, data=loader, options=QUICK)
    assert spent(gated, images) == pytest.approx(0.6, abs=0.1)


def test_streams_without_length(vit: nn.Module, images: list[Tensor]) -> None:
    expected = frozen(surgery.convert(vit, 0.6, data=images, options=QUICK))
    assert_same(frozen(surgery.convert(vit, 0.6, data=Unsized(images), options=QUICK)), expected)
    seen: list[str] = []
    with pytest.raises(DataError, match="length of the training data is unknown"):
        surgery.convert(vit, 0.6, data=Unsized(images), progress=lambda stage, *_: seen.append(stage))
    assert seen == []  # before the first minute is spent
    surgery.convert(vit, 0.6, data=Unsized(images), tune="oneshot")


def test_validation_data_are_calibrated_on(vit: nn.Module, images: list[Tensor]) -> None:
    validation = [3 * torch.randn(8, 3, 32, 32) for _ in range(4)]
    gated = surgery.convert(vit, 0.6, data=images, validation=validation, tune="oneshot")
    assert spent(gated, validation) == pytest.approx(0.6, abs=0.01)


def test_kinds_and_patterns(vit: nn.Module, images: list[Tensor]) -> None:
    def names(sites: Any) -> tuple[str, ...]:
        return state_of(surgery.convert(vit, 0.9, data=images, sites=sites, tune="oneshot")).names

    assert names(["mlp"]) == ("blocks.0.mlp", "blocks.1.mlp")
    assert names(["mlp", "blocks.1*"]) == ("blocks.1.mlp",)
    found = surgery.find_sites(vit, images[0])
    assert names(found.filter("*attn")) == ("blocks.0.attn", "blocks.1.attn")
    assert select(found, "attention").names == ("blocks.0.attn", "blocks.1.attn")
    with pytest.raises(NoSites, match="nothing.*found: blocks.0.attn"):
        surgery.convert(vit, 0.9, data=images, sites=["nothing"])


def test_granularity_and_skip_are_passed_on(vit: nn.Module, images: list[Tensor]) -> None:
    more = [torch.randn(16, 3, 32, 32) for _ in range(10)]
    gated = surgery.convert(vit, 0.6, data=more, granularity="sample", skip="identity", tune="oneshot")
    assert {gate.planned.granularity for gate in gates(gated)} == {"sample"}
    assert all(gate.skip_path.is_identity for gate in gates(gated))
    assert all(gate.per_token for gate in gates(surgery.convert(vit, 0.6, data=images, tune="oneshot")))


def test_a_granularity_that_a_site_does_not_allow_is_noted(vit: nn.Module, images: list[Tensor]) -> None:
    network = Stack(convolution(3), convolution(3)).eval()
    gated = surgery.convert(network, 1.0, data=images, granularity="token", tune="oneshot")
    assert {gate.planned.granularity for gate in gates(gated)} == {"sample"}
    assert any("'token' is not possible at 2 of 2 sites" in note for note in state_of(gated).notes)
    gated = surgery.convert(vit, 0.9, data=images, granularity="token", tune="oneshot")
    assert not any("not possible" in note for note in state_of(gated).notes)


def test_data_are_brought_to_the_dtype_of_the_model(vit: nn.Module, images: list[Tensor]) -> None:
    half = copy.deepcopy(vit).bfloat16()
    gated = surgery.convert(half, 0.8, data=images, tune="oneshot", second_look=False)
    assert gated(images[0].bfloat16()).dtype == torch.bfloat16


def test_one_shot_does_not_train(vit: nn.Module, images: list[Tensor]) -> None:
    stages: set[str] = set()
    surgery.convert(vit, 0.6, data=images, tune="oneshot", progress=lambda stage, *_: stages.add(stage))
    assert "training routers" not in stages and "calibrating" in stages
    stages.clear()
    surgery.convert(vit, 1.0, data=images, progress=lambda stage, *_: stages.add(stage))
    assert "training routers" not in stages


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_routers_alone_leave_skip_paths_as_they_were_fitted(
    vit: nn.Module, images: list[Tensor], granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.conversion.prefer_static_where_it_wins", lambda *_, **__: False)
    monkeypatch.setattr("surgery.choosing.Snapshot.restore", lambda *_: None)
    monkeypatch.setattr("surgery.held_out.HeldOut.look", lambda *_: {})  # keeps the last weights, better or not
    found = []
    for tune in ("oneshot", "routers"):
        gated = surgery.convert(
            vit,
            0.8,
            data=images,
            granularity=granularity,
            skip="linear",
            tune=tune,
            options=Options(steps=20),
            second_look=False,
        )
        skips = {f"{g.site.name}.{n}": p.detach() for g in gates(gated) for n, p in g.skip_path.named_parameters()}
        routers = {f"{g.site.name}.{n}": p.detach() for g in gates(gated) for n, p in g.router.named_parameters()}
        found.append((skips, routers))
    (skips, routers), (same, others) = found
    assert skips and all(torch.equal(skips[name], same[name]) for name in skips)
    assert any(not torch.equal(routers[name], others[name]) for name in routers)


def test_training_that_makes_it_worse_is_undone(
    vit: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(gated: nn.Module, *_: Any, **__: Any) -> None:
        for gate in gates(gated):
            for parameter in gate.skip_path.parameters():
                parameter.data.add_(3 * torch.randn_like(parameter))

    monkeypatch.setattr("surgery.conversion.train_routers", ruin)
    gated = surgery.convert(vit, 0.6, data=images, skip="affine")
    expected = surgery.convert(vit, 0.6, data=images, skip="affine", tune="oneshot")
    assert_same(frozen(gated), frozen(expected))
    assert state_of(gated).table == state_of(expected).table
    assert state_of(gated).threshold == state_of(expected).threshold
    assert any("one-shot result is kept" in note for note in state_of(gated).notes)


def test_per_sample_static_is_asked_about_before_and_after_routers_are_trained(
    vit: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    budgets: list[float] = []

    def prefer(*_: Any, ties: bool = False) -> bool:
        asked.append(ties)
        return False

    monkeypatch.setattr("surgery.conversion.prefer_static_where_it_wins", prefer)
    monkeypatch.setattr("surgery.conversion.train_skip_paths", lambda *_, budget, **__: budgets.append(budget))
    options = Options(steps=2)
    surgery.convert(vit, 0.7, data=images, granularity="sample", options=options, second_look=False)
    assert asked == [False, True] and budgets == [0.7]
    asked.clear()
    surgery.convert(vit, 0.7, data=images, granularity="sample", tune="oneshot", second_look=False)
    assert asked == [False]


def test_static_policy_runs_where_it_wins(images: list[Tensor]) -> None:
    """A router that opens the branch that matters for half of the inputs, where it could open it for all."""
    model = Stack(mlp(4), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)), head=nn.Linear(4, 3))
    data = [torch.randn(32, 4) for _ in range(8)]
    with torch.no_grad():
        for parameter in model.blocks[0].parameters():
            parameter.mul_(1e-3)
        for parameter in model.blocks[1].parameters():
            parameter.mul_(3)

    def decide(matters: float, other: float, *, ties: bool = False, count: int = 8) -> str:
        gated = gate_all(model, data[0][:2], skip="identity")
        first_gate, second = gates(gated)
        state = state_of(gated)
        state.budget, state.threshold = 0.7, 0.0
        state.static = {first_gate.site.name: False, second.site.name: True}
        first_gate.router, second.router = Rate(other), Rate(matters)  # type: ignore[assignment]
        prefer_static_where_it_wins(gated, data[:count], ties=ties)
        assert bool(state.notes) == (state.policy == "static")
        return state.policy

    assert decide(0.5, 0.5) == "static"
    assert decide(1.0, 0.5) == "routed" and decide(1.0, 0.5, ties=True) == "routed"
    for other in (0.0, 0.011):  # the same, and nearer to dense for 2 of 64 samples, which may be chance
        assert decide(1.0, other, count=2) == "routed" and decide(1.0, other, ties=True, count=2) == "static"
    assert decide(1.0, 0.1, ties=True) == "routed"  # for 24 of 256 it is not


class Rate(nn.Module):
    """A router that opens for a share of the samples, whatever they are."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.rate - torch.linspace(0.01, 0.99, len(residual))


def test_without_data(vit: nn.Module, bert: nn.Module) -> None:
    for model in (vit, bert):
        untouched = Untouched(model)
        with pytest.warns(UnmeasuredQuality, match="surgery.measure"):
            gated = surgery.convert(model, 0.8)
        untouched.check()
        assert any("without data" in note for note in state_of(gated).notes)


def test_without_data_but_with_an_example() -> None:
    model = Stack(mlp(4), mlp(4), head=nn.Linear(4, 3))
    with pytest.warns(UnmeasuredQuality):
        gated = surgery.convert(model, 0.6, example=torch.randn(4, 4))
    assert state_of(gated).budget == 0.6
    with pytest.raises(DataError, match="network of your own.*data=.*example="):
        surgery.convert(model, 0.6)


def test_made_up_inputs_are_like_the_example() -> None:
    example = Batch((torch.randn(4, 5) + 7,), {"ids": torch.arange(8).view(4, 2), "scale": torch.tensor(2.0)})
    made = vary(example, seed=0)
    assert len(made) * made[0].size == 256
    assert all(abs(float(batch.args[0].mean()) - 7) < 1 and batch.kwargs["scale"] == 2 for batch in made)
    rows = {tuple(row) for batch in made for row in batch.kwargs["ids"].tolist()}
    assert rows == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert torch.equal(vary(example, seed=0)[3].args[0], made[3].args[0])


def test_interrupted_conversion_resumes(vit: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    options = Options(steps=6)
    expected = frozen(surgery.convert(vit, 0.6, data=images, options=options))

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "training routers" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.convert(vit, 0.6, data=images, options=options, output_dir=tmp_path, progress=interrupt)
    assert (tmp_path / CHECKPOINT).exists()
    resumed = surgery.convert(vit, 0.6, data=images, options=options, output_dir=tmp_path, resume=True)
    assert_same(frozen(resumed), expected)


def test_what_an_earlier_conversion_left_is_not_gone_on_from(tmp_path: Path) -> None:
    model = Stack(*(mlp(8) for _ in range(4)), head=nn.Linear(8, 3)).eval()
    data = [torch.randn(16, 8) for _ in range(6)]
    surgery.convert(model, 0.6, data=data, options=Options(steps=2), output_dir=tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"of the routers of an earlier one")
    assert (tmp_path / NESTED).exists()

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "fitting skip paths":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.convert(model, 0.6, data=data[::-1], output_dir=tmp_path, progress=interrupt)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        surgery.convert(model, 0.6, data=data[::-1], output_dir=tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    model = Stack(*(mlp(8) for _ in range(4)), head=nn.Linear(8, 3)).eval()
    data = [torch.randn(16, 8) for _ in range(6)]
    before = torch.get_rng_state()
    surgery.convert(model, 0.6, data=data, tune="oneshot", second_look=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("directory", [None, "empty"])
def test_nothing_to_resume_is_said_at_once(
    vit: nn.Module, images: list[Tensor], tmp_path: Path, directory: str | None
) -> None:
    seen: list[str] = []
    with pytest.raises(CheckpointError, match="nothing to resume"):
        surgery.convert(
            vit,
            0.6,
            data=images,
            output_dir=None if directory is None else tmp_path / directory,
            resume=True,
            progress=lambda stage, *_: seen.append(stage),
        )
    assert seen == []


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def refuses(vit: nn.Module) -> Iterator[Callable[..., None]]:
    """`refuses(error, pattern, model=..., **arguments of convert)`."""

    def check(error: type[Exception], match: str, model: nn.Module = vit, budget: Any = 0.6, **options: Any) -> None:
        untouched = Untouched(model)
        with pytest.raises(error, match=match) as caught:
            surgery.convert(model, budget, **options)
        assert type(caught.value) is error
        untouched.check()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UnmeasuredQuality)
        yield check


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_a_dense_budget_can_be_trained_for_lower_ones(granularity: Any) -> None:
    model = Stack(*(mlp(8) for _ in range(4)), head=nn.Linear(8, 3)).eval()
    data = [torch.randn(16, 5, 8) for _ in range(8)]
    gated = surgery.convert(model, 1.0, data=data, tune="train", granularity=granularity)
    assert state_of(gated).budget == 1 and torch.equal(gated(data[0]), model(data[0]))
    surgery.set_budget(gated, 0.7)
    assert spent(gated, data) < 0.9


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, float("nan"), "0.5", True])
def test_budgets_out_of_range(refuses: Callable[..., None], images: list[Tensor], budget: Any) -> None:
    refuses(BudgetError, r"in \(0, 1\]; got", budget=budget, data=images)


def test_budget_below_what_is_attainable(refuses: Callable[..., None], images: list[Tensor]) -> None:
    stages: list[str] = []
    pattern = r"0.05 cannot be reached.*attainable: 0\.\d+ to 1\)"
    refuses(BudgetError, pattern, budget=0.05, data=images, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"finding sites"}  # the plan says so, before anything is fitted


def test_model_without_sites(refuses: Callable[..., None]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    refuses(NoSites, "Sequential has no sites", model=model, data=[torch.randn(4, 4)] * 5)


def test_data_that_yields_nothing(refuses: Callable[..., None], images: list[Tensor]) -> None:
    for nothing in ([], DataLoader(TensorDataset(torch.zeros(0, 3)), batch_size=2), Unsized([])):
        refuses(DataError, "yields no batch", data=nothing)
    refuses(DataError, "yields no batch", data=images, validation=[])
    refuses(DataError, r"no sample.*\(0, 3, 32, 32\)", data=[torch.zeros(0, 3, 32, 32)] * 5)


@pytest.mark.parametrize("at", [0, 3, 4, 7])
def test_wrong_shapes(refuses: Callable[..., None], images: list[Tensor], at: int) -> None:
    """Wherever they come: in the example, the data to fit on, or the data held out."""
    images[at] = torch.randn(8, 3, 16, 16)
    pattern = r"VisionTransformer refuses .*float32 \[8, 3, 16, 16\].*Input height \(16\).*every batch"
    refuses(DataError, pattern, data=images, options=Options(epochs=1))


@pytest.mark.parametrize("at", [0, 4, 6])
def test_integer_images(refuses: Callable[..., None], images: list[Tensor], at: int) -> None:
    images[at] = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    refuses(DataError, r"uint8 \[8, 3, 32, 32\]", data=images, options=Options(epochs=1))


def test_wrong_token_ids(refuses: Callable[..., None], bert: nn.Module, texts: list[dict[str, Tensor]]) -> None:
    refuses(DataError, r"input_ids: float32", model=bert, data=[{"input_ids": t["input_ids"].float()} for t in texts])
    texts[3]["input_ids"] = texts[3]["input_ids"] + 100
    refuses(DataError, r"refuses .*index out of range", model=bert, data=texts)
    refuses(DataError, "pixels", model=bert, data=[{"pixels": t["input_ids"]} for t in texts])


@pytest.mark.parametrize("at", [0, 4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(refuses: Callable[..., None], images: list[Tensor], at: int, value: float) -> None:
    images[at][5, 0, 0, 0] = value
    refuses(DataError, r"\(8, 3, 32, 32\) holds NaN or infinity", data=images)


def test_data_that_can_be_read_once(refuses: Callable[..., None], images: list[Tensor]) -> None:
    refuses(DataError, "list_iterator.*read only once.*list, a DataLoader", data=iter(images))
    refuses(DataError, "generator.*read only once", data=(x for x in images))
    refuses(DataError, "iterator that was already read to its end", data=Once(images), options=QUICK)
    refuses(DataError, "read only once", data=images, validation=iter(images))


@pytest.mark.parametrize("data", [5, "cifar10", torch.randn(8, 3, 32, 32), {"x": 1}], ids=lambda d: type(d).__name__)
def test_what_is_no_data(refuses: Callable[..., None], data: Any) -> None:
    refuses(DataError, f"got {type(data).__name__}.*pass \\[batch\\]", data=data)


def test_what_is_no_batch(refuses: Callable[..., None]) -> None:
    refuses(DataError, "got str", data=["a", "b"])
    refuses(DataError, "got NoneType", data=[None] * 6)


def test_converted_model(refuses: Callable[..., None], images: list[Tensor]) -> None:
    x = torch.randn(2, 4)
    gated = gate_all(Stack(mlp(4)), x)
    refuses(AlreadyConverted, "set_budget.*remove", model=gated, data=[x] * 5)
    refuses(AlreadyConverted, "set_budget.*remove", model=nn.Sequential(gated), data=[x] * 5)


def test_meta_device(images: list[Tensor], vit: nn.Module) -> None:
    model = copy.deepcopy(vit).to("meta")
    for data in (images, None):
        with pytest.raises(UnsupportedModel, match="meta device"):
            surgery.convert(model, 0.6, data=data)
    with pytest.raises(UnsupportedModel, match="str"):
        surgery.convert("timm:resnet18", 0.6, data=images)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tune", "cost", "granularity", "skip"])
def test_unknown_choices(refuses: Callable[..., None], images: list[Tensor], name: str) -> None:
    refuses(SurgeryError, f"{name} must be one of .*; got 'other'", data=images, **{name: "other"})


def test_sites_of_another_model(refuses: Callable[..., None], images: list[Tensor]) -> None:
    other: Sites = surgery.find_sites(Stack(mlp(4)), torch.randn(2, 4))
    refuses(PlanMismatch, "blocks.0.*another model", data=images, sites=other)


class Broken(nn.Module):
    """A router that does not work."""

    def forward(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        raise RuntimeError("a mistake of ours")


def test_our_own_mistakes_are_not_blamed_on_the_data(vit: nn.Module, images: list[Tensor]) -> None:
    gated = gate_all(vit, images[0])
    gates(gated)[0].router = Broken()  # type: ignore[assignment]
    with surgery.execution(gated, "skip"), pytest.raises(RuntimeError, match="a mistake of ours") as caught:
        observe(gated, images)
    assert type(caught.value) is RuntimeError


def test_first_takes_a_few_rows_without_labels() -> None:
    batch = first([(torch.randn(20, 3), torch.zeros(20, dtype=torch.long))])
    assert batch.size == 8 and batch.labels is None


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts FLOPs, one a nanosecond, so that time does not depend on the machine's load."""

    def seconds(_: Any, run: Callable[[], object]) -> float:
        with flop_counter() as counter:
            run()
        return 1e-9 * (1 + counter.get_total_flops())

    def compare(a: Callable[[], object], b: Callable[[], object], **_: Any) -> Ratio:
        one, other = seconds(None, a), seconds(None, b)
        return Ratio(one / other, one / other, one / other, 1e3 * one, 1e3 * other, 1, one / other)

    monkeypatch.setattr(latency._Clock, "__call__", seconds)
    monkeypatch.setattr(latency, "compare", compare)


@pytest.mark.usefixtures("steady_clock")
def test_latency() -> None:
    model = Stack(*(convolution(16) for _ in range(3)), head=nn.Linear(16, 3), pool=True)
    data = [torch.randn(32, 16, 8, 8) for _ in range(10)]
    gated = surgery.convert(model, 0.7, data=data, cost="latency", tune="oneshot", skip="affine")
    state = state_of(gated)
    branch = 2 * 32 * 8 * 8 * 2 * 9 * 16 * 16  # two convolutions on 32 samples
    assert state.costs.unit == "seconds"
    assert state.costs.dense == pytest.approx(1e-9 * (3 * branch + 2 * 32 * 16 * 3), rel=1e-6)
    for site in state.costs.sites.values():
        assert site.branch == pytest.approx(1e-9 * branch) and 0 < site.skip < site.router < 0.01 * site.branch
    costs, thresholds = [p.cost for p in state.table], [p.threshold for p in state.table]
    assert costs == sorted(costs) and thresholds == sorted(thresholds, reverse=True) and len(costs) > 3
    assert latency.measure_ratio(gated, held_out(data)) == pytest.approx(0.7, abs=0.03)
    with pytest.raises(BudgetError, match="measured.*or 1.0 for dense|cannot be reached"):
        surgery.convert(model, 0.005, data=data, cost="latency", tune="oneshot")


@pytest.mark.usefixtures("steady_clock")
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_time_out_of_reach_says_what_would_reach_it(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch, granularity: Any
) -> None:
    fitted = []
    monkeypatch.setattr("surgery.conversion.fit_skip_paths", lambda *_, **__: fitted.append(True))
    monkeypatch.setattr(latency, "measure_ratio", lambda *_: 1.3)
    data = [torch.randn(8, 3, 32, 32) for _ in range(5)]
    with pytest.raises(BudgetError, match="measured 1.300 with every gate closed") as raised:
        surgery.convert(vit, 0.7, data=data, cost="latency", tune="oneshot", granularity=granularity)
    assert ("granularity='sample' leaves out whole branches" in str(raised.value)) == (granularity == "token")
    assert not fitted


@pytest.mark.usefixtures("steady_clock")
def test_a_time_that_no_threshold_reaches(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure_ratio", lambda gated, data, at: 0.6 if at == math.inf else 1.3)
    data = [torch.randn(8, 3, 32, 32) for _ in range(5)]
    with pytest.raises(BudgetError, match="measured 1.300 to 1.300"):
        surgery.convert(vit, 0.7, data=data, cost="latency", tune="oneshot")


def test_latency_by_the_clock_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_PASSES", 3)
    model = Stack(convolution(16), convolution(16), head=nn.Linear(16, 3), pool=True)
    x = torch.randn(8, 16, 16, 16)
    costs = latency.measure_costs(gate_all(model, x[:2], skip="affine"), Batch((x,)))
    assert costs.dense >= sum(site.branch for site in costs.sites.values()) > 0
    assert all(site.skip > 0 and site.router > 0 for site in costs.sites.values())
