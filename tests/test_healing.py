"""Healing: what it may change, where it acts, and how it is kept."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import assert_equal, outputs, subject
from test_cli import network, run  # noqa: F401  (a fixture)
from torch import Tensor, nn
from toys import Stack, Times, assert_same, convolution, frozen, mlp

import surgery
from surgery.adaptation import heal
from surgery.calling import read_output
from surgery.cards import card
from surgery.configs import read_config
from surgery.context import state_of
from surgery.conversion import heal_converted
from surgery.errors import BudgetError, CheckpointError, MissingDependency, PlanMismatch, SurgeryError
from surgery.fingerprints import fingerprint
from surgery.healing import changed, stored
from surgery.held_out import HeldOut
from surgery.measurement import measure
from surgery.objectives import divergence
from surgery.options import Options

OPTIONS = Options(steps=40, heal_rate=1e-2, heal_rank=2)
HOW: dict[str, Any] = {"tune": "oneshot", "granularity": "token", "skip": "identity"}
KINDS = ("norms", "lora")
Data = list[Tensor]


@functools.cache
def made() -> tuple[nn.Module, Data, Data, nn.Module]:
    """A dense model, data, held-out data, and the gated model."""
    torch.manual_seed(0)
    model = Stack(*(mlp(8) for _ in range(4)), head=nn.Linear(8, 5)).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)
    data: Data = [torch.randn(16, 6, 8) for _ in range(10)]
    held: Data = [torch.randn(16, 6, 8) for _ in range(4)]
    return model, data, held, surgery.convert(model, 0.5, data=data, validation=held, **HOW)


class Ready:
    """A calibrated gated model and what it was made from."""

    def __init__(self, kind: str) -> None:
        if kind == "lora":
            pytest.importorskip("peft")
        self.kind = kind
        self.model, self.data, self.held, gated = made()
        self.before = frozen(self.model)
        self.gated = copy.deepcopy(gated)

    def heal(self, **options: Any) -> list[float]:
        return heal(self.gated, self.data, self.kind, options=OPTIONS, validation=self.held, **options)  # type: ignore[arg-type]

    def distance(self) -> float:
        with torch.no_grad():
            return float(torch.cat([divergence(self.gated(x), self.model(x)) for x in self.held]).mean())


@pytest.fixture(params=KINDS)
def ready(request: pytest.FixtureRequest) -> Ready:
    return Ready(request.param)


@pytest.fixture
def healed(ready: Ready) -> Ready:
    ready.heal()
    assert state_of(ready.gated).healing is not None
    return ready


def test_a_finished_conversion_is_healed_as_convert_does_it(ready: Ready) -> None:
    """The same change of the backbone, and thresholds that hold its budget on healed streams."""
    shared: dict[str, Any] = {"validation": ready.held, "options": OPTIONS}
    whole = surgery.convert(ready.model, 0.5, data=ready.data, heal=ready.kind, **shared, **HOW)  # type: ignore[arg-type]
    before = [point.threshold for point in state_of(ready.gated).table]
    heal_converted(ready.gated, ready.data, ready.kind, **shared)  # type: ignore[arg-type]
    assert state_of(ready.gated).healing is not None
    assert [p.threshold for p in state_of(ready.gated).table] == [p.threshold for p in state_of(whole).table] != before
    assert_same(dict(ready.gated.state_dict()), dict(whole.state_dict()))


def test_nearer_to_dense_at_the_same_decisions(ready: Ready) -> None:
    far = ready.distance()
    gates = {name: p.detach().clone() for name, p in ready.gated.named_parameters() if "surgery_gates" in name}
    losses = ready.heal()
    assert len(losses) == 40
    assert ready.distance() < 0.9 * far
    with surgery.unhealed(ready.gated):
        assert ready.distance() == pytest.approx(far)
    assert_same(dict(ready.gated.named_parameters()), gates)
    before = f"healed ({ready.kind}): mean divergence on held-out data {far:.4g} -> "
    note = state_of(ready.gated).notes[-1]
    assert note.startswith(before)
    assert float(note.removeprefix(before)) == pytest.approx(ready.distance(), rel=0.05)  # whose cost is a little other


def test_backbone_and_dense_outputs_stay_bit_for_bit(healed: Ready) -> None:
    x = healed.held[0]
    with torch.no_grad():
        expected = healed.model(x)
        assert not torch.equal(healed.gated(x), expected)
        with surgery.execution(healed.gated, "dense"):
            assert torch.equal(healed.gated(x), expected)
        surgery.set_budget(healed.gated, 1.0)
        assert torch.equal(healed.gated(x), expected)
        assert torch.equal(surgery.remove(healed.gated)(x), expected)
    assert_same(healed.model.state_dict(), healed.before)
    assert_same(healed.gated.state_dict(), healed.before)
    assert_same(surgery.remove(healed.gated).state_dict(), healed.before)
    assert set(surgery.remove(healed.gated).state_dict()) == set(healed.before)
    assert fingerprint(healed.gated) == fingerprint(healed.model)
    assert not any(p.requires_grad for module in changed(healed.gated) for p in module.parameters())


def test_executions_agree_and_forced_decisions_are_healed(healed: Ready) -> None:
    x = healed.held[0]
    with torch.no_grad():
        plain = healed.gated(x)
        with surgery.execution(healed.gated, "mask"):
            torch.testing.assert_close(healed.gated(x), plain)
        with surgery.force(healed.gated, 1.0):
            healed_and_open = healed.gated(x)
        assert not torch.equal(healed_and_open, healed.model(x))
        with surgery.force(healed.gated, 1.0), surgery.unhealed(healed.gated):
            assert torch.equal(healed.gated(x), healed.model(x))
        twin = copy.deepcopy(healed.gated)
        assert torch.equal(twin(x), plain)
        assert torch.equal(surgery.pin(healed.gated, x, "mask")(x), healed_mask(healed, x))


def healed_mask(healed: Ready, x: Tensor) -> Tensor:
    with surgery.execution(healed.gated, "mask"):
        output: Tensor = healed.gated(x)
        return output


def test_round_trip_is_bit_equal(healed: Ready, tmp_path: Path) -> None:
    surgery.save(healed.gated, tmp_path / "made")
    again = surgery.load(tmp_path / "made", model=healed.model)
    with torch.no_grad():
        for x in healed.held:
            assert torch.equal(again(x), healed.gated(x))
        with surgery.execution(again, "dense"):
            assert torch.equal(again(healed.held[0]), healed.model(healed.held[0]))
    names = set(stored(state_of(again).healing))
    assert names and names <= set(again.state_dict())
    assert state_of(again).healing == state_of(healed.gated).healing
    assert_same(healed.model.state_dict(), healed.before)


def test_a_damaged_healing_is_refused_by_name(healed: Ready, tmp_path: Path) -> None:
    surgery.save(healed.gated, tmp_path / "made")
    file = tmp_path / "made" / "surgery_config.json"
    good = json.loads(file.read_text("utf-8"))
    name = next(iter(good["healing"]["shapes"]))

    def refused(match: str, **changes: Any) -> None:
        file.write_text(json.dumps({**good, "healing": {**good["healing"], **changes}}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=match):
            surgery.load(tmp_path / "made", model=healed.model)

    refused("healing.kind must be", kind="both")
    refused("names no parameter", shapes={})
    refused("healing.rank must be", rank=0 if healed.kind == "lora" else 3)
    refused("is no parameter of", shapes={name: [1, 2, 3]})
    refused("is no name of a module", shapes={f"../{name}": good["healing"]["shapes"][name]})
    refused("unexpected: ", shapes={name: good["healing"]["shapes"][name]})


def test_a_model_without_the_parameters_is_refused(healed: Ready) -> None:
    healing = state_of(healed.gated).healing
    assert healing is not None
    other = Stack(*(mlp(6) for _ in range(4)), head=nn.Linear(6, 5)).eval()
    x = torch.randn(2, 6, 6)
    gated = surgery.insert_gates(other, surgery.find_sites(other, x))
    with pytest.raises(PlanMismatch, match="healing changes blocks.0.*made for another model"):
        surgery.healing.install(gated, healing)


def test_measure_and_cards_show_the_unhealed_model_beside(healed: Ready, tmp_path: Path) -> None:
    found = measure(healed.gated, healed.held, dense=healed.model, speed=())
    assert found.healed == healed.kind
    surgery.save(healed.gated, tmp_path / "made")
    alone = found.peer("unhealed")
    with surgery.unhealed(healed.gated):
        without = measure(healed.gated, healed.held, dense=healed.model, speed=(), peers=False)
    assert (alone.metric, alone.cost) == (without.agreement, pytest.approx(without.cost))
    assert alone.metric < found.agreement
    assert f"gated, healed ({healed.kind})" in str(found) and "unhealed" in str(found)
    text = card(read_config(tmp_path / "made"), "me/it", (), {})
    changed = "scales and shifts of its norms" if healed.kind == "norms" else "low-rank changes of its linear maps"
    assert changed in text and f"({alone.metric:.4f}".rstrip("0") + " unhealed)" in text


def test_random_numbers_of_the_caller_are_left_alone(ready: Ready) -> None:
    before = torch.get_rng_state()
    heal(ready.gated, ready.data, ready.kind, options=Options(steps=1))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_help_is_undone(ready: Ready) -> None:
    before = ready.distance()
    heal(ready.gated, ready.data, ready.kind, options=Options(steps=5, heal_rate=50.0), validation=ready.held)  # type: ignore[arg-type]
    assert state_of(ready.gated).healing is None and not changed(ready.gated)
    assert ready.distance() == before
    assert any("was undone" in note for note in state_of(ready.gated).notes)


def test_before_and_after_are_compared_at_the_cost_of_the_budget(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, float]] = []
    look = HeldOut.look

    def watched(held: HeldOut, parameters: Any) -> dict[str, float]:
        rows.append(look(held, parameters))
        return rows[-1]

    monkeypatch.setattr(HeldOut, "look", watched)
    state_of(ready.gated).threshold -= 0.5  # far from what gives the budget on these data
    ready.heal()
    assert [row["held_cost"] for row in rows] == [pytest.approx(0.5, abs=0.02)] * 2
    before, after = (row["held_divergence"] for row in rows)
    assert f"{before:.4g} -> {after:.4g}" in state_of(ready.gated).notes[-1]


def test_an_interrupted_healing_leaves_nothing(ready: Ready) -> None:
    def stop(stage: str, done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    names = set(ready.gated.state_dict())
    with pytest.raises(KeyboardInterrupt):
        ready.heal(progress=stop)
    assert set(ready.gated.state_dict()) == names and not changed(ready.gated)
    assert state_of(ready.gated).budget == 0.5


def test_convert_heals_where_asked_and_holds_the_budget() -> None:
    ready = Ready("norms")
    gated = surgery.convert(
        ready.model, 0.5, data=ready.data, validation=ready.held, tune="oneshot", heal="norms", options=OPTIONS
    )
    assert state_of(gated).healing is not None
    found = measure(gated, ready.held, dense=ready.model, speed=(), peers=False)
    assert found.cost == pytest.approx(0.5, abs=0.01)
    assert_same(ready.model.state_dict(), ready.before)
    assert state_of(ready.gated).healing is None  # never by default


def test_batch_norms_of_convolutional_networks() -> None:
    torch.manual_seed(0)
    model = Stack(*(convolution(8) for _ in range(3)), head=nn.Linear(8, 5), pool=True).eval()
    data = [torch.randn(16, 8, 6, 6) for _ in range(6)]
    gated = surgery.convert(model, 0.6, data=data, tune="oneshot", second_look=False)
    before = frozen(model)
    heal(gated, data, "norms", options=OPTIONS)
    with torch.no_grad():
        assert not torch.equal(gated(data[0]), model(data[0]))
        with surgery.unhealed(gated):
            unhealed = gated(data[0])
        assert divergence(gated(data[0]), model(data[0])).mean() < divergence(unhealed, model(data[0])).mean()
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["timm/vit_pico", "transformers/bert", "transformers/llama"])
def test_networks_of_the_zoo(name: str, kind: str, tmp_path: Path) -> None:
    one = subject(name)
    gated = surgery.insert_gates(one.model, one.sites)
    data = [one.entry.example(4, seed=seed) for seed in range(5)]
    surgery.regress_routers(gated, data, samples=16)
    surgery.calibrate(gated, data, 0.7)
    expected = outputs(one.model, data[0])
    heal(gated, data, kind, options=Options(steps=4, heal_rank=2))  # type: ignore[arg-type]
    with torch.no_grad():
        with surgery.execution(gated, "dense"):
            assert_equal(outputs(gated, data[0]), expected)
        with surgery.execution(gated, "mask"):
            masked = outputs(gated, data[0])
        torch.testing.assert_close(outputs(gated, data[0]), masked)
        with surgery.unhealed(gated):
            assert not torch.equal(outputs(gated, data[0])[0], masked[0])
    surgery.save(gated, tmp_path / "made")
    again = surgery.load(tmp_path / "made", model=one.model)
    assert_equal(outputs(again, data[0]), outputs(gated, data[0]))
    if name.startswith("transformers"):
        surgery.save(gated, tmp_path / "native", native=True)
        native = surgery.load(tmp_path / "native")
        assert_equal(outputs(native, data[0]), outputs(gated, data[0]))
        assert read_output(native(**data[0])).isfinite().all()


def test_the_command_heals(network: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    common = ("--data", "digits", "--limit", 160, "--budget", 0.6, "--tune", "oneshot", "--no-second-look")
    found = run("convert", network, *common, "--heal", "lora", "--out", tmp_path / "lora")
    assert "note: heal" in found.stdout
    refused = run("convert", network, *common, "--heal", "norms", "--out", tmp_path / "norms", expect=1)
    assert "no norm with a scale or shift to heal; take heal='lora'" in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "norms").exists()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    ready = Ready("norms")
    with pytest.raises(SurgeryError, match="kind must be one of norms, lora"):
        heal(ready.gated, ready.data, "weights")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="give data="):
        surgery.convert(ready.model, 0.5, example=ready.data[0], heal="norms")
    surgery.set_budget(ready.gated, 1.0)
    with pytest.raises(BudgetError, match="nothing to heal from"):
        ready.heal()
    bare = Stack(*(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)))
    gated = surgery.convert(bare, 0.7, data=ready.data, tune="oneshot")
    with pytest.raises(SurgeryError, match="no norm with a scale or shift"):
        heal(gated, ready.data, "norms")


def test_what_cannot_be_healed_is_refused_before_anything_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [torch.randn(8, 8) for _ in range(5)]
    stages: list[str] = []

    def refused(model: nn.Module, kind: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            surgery.convert(model, 0.7, data=data, heal=kind, progress=lambda stage, *_: stages.append(stage))
        assert set(stages) == {"finding sites"}

    hidden = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)]
    refused(Stack(*hidden), "norms", SurgeryError, "norm with a scale or shift to heal; take heal='lora'$")
    times = [nn.Sequential(*(Times(torch.randn(8, 8)) for _ in range(8)), nn.ReLU()) for _ in range(2)]
    refused(Stack(*times), "lora", SurgeryError, "no linear map inside a branch to heal$")  # nor has it norms
    refused(Stack(*times, head=nn.LayerNorm(8)), "lora", SurgeryError, "to heal; take heal='norms'$")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(Stack(*hidden), "lora", MissingDependency, "needs peft")
