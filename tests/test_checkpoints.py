"""Save and load: bit-equal outputs and decisions, strict JSON, and refusals that leave everything as it was."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from subjects import Subject, assert_equal, enliven, outputs, subject
from torch import nn

import surgery
from surgery import checkpoints, configs
from surgery.context import state_of, tape
from surgery.errors import BaseMismatch, CheckpointError, NotConverted, OutputExists
from surgery.fingerprints import fingerprint
from surgery.gates import iter_gates
from surgery.sites import Plan
from surgery.state import BudgetPoint

NAMES = ("timm/test_resnet", "timm/mixer", "transformers/bert", "transformers/llama", "plain/own_vit")


def converted(one: Subject) -> nn.Module:
    """A gated copy with live routers that keep about half of everything."""
    gated = enliven(surgery.insert_gates(one.model, one.sites))
    state = state_of(gated)
    for index, (_, gate) in enumerate(iter_gates(gated)):
        gate.offset = 0.1 * index - 0.2
    state.budget, state.threshold = 0.6, 0.05
    rates = dict.fromkeys(state.names, 0.5)
    state.table = [BudgetPoint(-math.inf, 1.02, rates), BudgetPoint(0.05, 0.6, rates, state.names[:1])]
    state.static = {name: name == state.names[0] for name in state.names}
    state.notes = ["a note"]
    state.report = {"accuracy": 0.5, "undefined": math.nan}
    return gated


def decisions(gated: nn.Module, example: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with tape(gated) as events:
        found = outputs(gated, example)
    return found, [event.decisions for event in events]


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    one = subject(name)
    gated = converted(one)
    checkpoints.save(gated, tmp_path / "made")
    again = checkpoints.load(tmp_path / "made", model=one.model)
    example = one.entry.example(4, seed=3)
    (mine, chosen), (theirs, rechosen) = decisions(gated, example), decisions(again, example)
    assert_equal(theirs, mine)
    assert_equal(rechosen, chosen)
    rates = torch.cat([d.flatten() for d in chosen]).float().mean()
    assert 0 < rates < 1  # routers do decide
    assert type(again).__name__ == type(one.model).__name__ and isinstance(again, type(one.model))


def test_heads_go_through_checkpoint_and_card(tmp_path: Path) -> None:
    from surgery.cards import card

    one = subject("transformers/bert")
    heads = surgery.find_sites(one.model, one.example).filter(kind="heads")
    gated = enliven(surgery.insert_gates(one.model, heads))
    state = state_of(gated)
    state.budget = 0.6
    state.table = [BudgetPoint(0.0, 0.6, dict.fromkeys(state.units, 0.25))]
    checkpoints.save(gated, tmp_path / "made")
    again = checkpoints.load(tmp_path / "made", model=one.model)
    (mine, chosen), (theirs, rechosen) = decisions(gated, one.example), decisions(again, one.example)
    assert_equal(theirs, mine)
    assert_equal(rechosen, chosen)
    assert f"| `{heads[0].name}` | heads | identity | 0.25 |" in card(
        configs.read_config(tmp_path / "made"), "a/b", (), {}
    )
    file = tmp_path / "made" / configs.CONFIG
    config = json.loads(file.read_text())
    config["plan"]["sites"][0]["site"]["heads"]["whole"] = False  # as in older files
    assert Plan.from_dict(config["plan"]) == state.plan
    config["plan"]["sites"][0]["site"]["heads"]["count"] = 2**40
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="heads, expected 1 to"):
        checkpoints.load(tmp_path / "made", model=one.model)


def test_state_survives(tmp_path: Path) -> None:
    one = subject("timm/test_resnet")
    gated = converted(one)
    checkpoints.save(gated, tmp_path / "made", spec="timm:test_resnet?pretrained=false")
    state, again = state_of(gated), state_of(checkpoints.load(tmp_path / "made", model=one.model))
    for name in ("plan", "costs", "table", "budget", "threshold", "static", "notes", "policy"):
        assert getattr(again, name) == getattr(state, name), name
    assert again.report == {"accuracy": 0.5, "undefined": None}
    assert again.base["spec"] == "timm:test_resnet?pretrained=false"
    assert again.base["sha256"] == fingerprint(one.model)


def test_config_is_strict_json_and_tensors_are_only_those_of_gates(tmp_path: Path) -> None:
    one = subject("transformers/bert")
    gated = converted(one)
    state_of(gated).threshold = -math.inf
    checkpoints.save(gated, tmp_path / "made")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    config = json.loads((tmp_path / "made" / configs.CONFIG).read_text(), parse_constant=refuse)
    assert config["format_version"] == 1
    assert "torch" in config["versions"]
    tensors = load_file(tmp_path / "made" / configs.TENSORS)
    assert set(tensors) == {key for key in gated.state_dict() if "surgery_gates." in key}
    assert state_of(checkpoints.load(tmp_path / "made", model=one.model)).threshold == -math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    one = subject("plain/own_vit")
    base = copy.deepcopy(one.model).to(dtype)
    gated = enliven(surgery.insert_gates(base, one.sites)).to(dtype)
    state = state_of(gated)
    state.budget = 0.5
    checkpoints.save(gated, tmp_path / "made")
    again = checkpoints.load(tmp_path / "made", model=base)
    example = one.entry.example(2).to(dtype)  # type: ignore[union-attr]
    assert_equal(outputs(again, example), outputs(gated, example))
    with pytest.raises(BaseMismatch, match=r"try model\.to\(dtype\)"):
        checkpoints.load(tmp_path / "made", model=one.model)


def test_load_builds_the_base_from_its_reference(tmp_path: Path) -> None:
    source = tmp_path / "own.py"
    source.write_text(
        "import torch\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))\n"
        "    def forward(self, x):\n"
        "        return x + self.inner(x)\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(Block(), Block(), torch.nn.Linear(8, 3))\n"
    )
    from surgery.adapters.models import load_model

    model = load_model(f"python:{source}:build").model
    x = torch.randn(5, 8)
    gated = enliven(surgery.insert_gates(model, surgery.find_sites(model, x)))
    state_of(gated).budget = 0.5
    checkpoints.save(gated, tmp_path / "made")
    again = checkpoints.load(tmp_path / "made")
    assert_equal(outputs(again, x), outputs(gated, x))
    source.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be built.*model=…"):
        checkpoints.load(tmp_path / "made")


def test_a_base_that_timm_may_not_have_is_told_by_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from test_cli import run

    model = timm.create_model("test_vit", pretrained=False).eval()
    checkpoints.save(
        surgery.insert_gates(model, surgery.find_sites(model, torch.randn(2, 3, 160, 160))), tmp_path / "made"
    )

    def refuses(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", refuses)
    said = (
        r"made from the architecture test_vit of timm; if its weights were timm's own \(timm:test_vit\.r160_in1k\), they "
        r"cannot be loaded now: no connection; if they were others, pass the model itself: .*--model"
    )
    with pytest.raises(CheckpointError, match=said):
        checkpoints.load(tmp_path / "made")
    shown = run("score", tmp_path / "made", "--data", "digits", expect=1).stderr
    assert re.search(said, shown) and "next:" not in shown


def test_a_base_that_nothing_names_must_be_given(tmp_path: Path) -> None:
    checkpoints.save(converted(subject("plain/own_vit")), tmp_path / "made")
    with pytest.raises(CheckpointError, match=r"of your own.*surgery\.load\(directory, model=…\)"):
        checkpoints.load(tmp_path / "made")


def test_meta_base_needs_no_hash_and_is_filled_later(tmp_path: Path) -> None:
    one = subject("plain/own_vit")
    gated = converted(one)
    checkpoints.save(gated, tmp_path / "made")
    empty = copy.deepcopy(one.model).to("meta")
    again = checkpoints.load(tmp_path / "made", model=empty)
    again.load_state_dict(gated.state_dict(), assign=True)
    assert_equal(outputs(again, one.example), outputs(gated, one.example))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    checkpoints.save(converted(subject("timm/test_resnet")), tmp_path / "made")
    return tmp_path / "made"


def load(directory: Path, **options: Any) -> nn.Module:
    """Load onto the base; whatever happens, the base stays as it was."""
    model = options.pop("model", subject("timm/test_resnet").model)
    before = (type(model), fingerprint(model), sorted(name for name, _ in model.named_modules()))
    try:
        return checkpoints.load(directory, model=model, **options)
    finally:
        assert before == (type(model), fingerprint(model), sorted(name for name, _ in model.named_modules()))


def edit(directory: Path, **changes: Any) -> None:
    file = directory / configs.CONFIG
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}, default=str))


def test_missing_directory_and_files(made: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no directory.*surgery\.save"):
        load(made / "nowhere")
    (made / configs.TENSORS).rename(made / "elsewhere")
    with pytest.raises(CheckpointError, match=r"holds no surgery\.safetensors"):
        load(made)
    (made / configs.CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"holds no surgery_config\.json"):
        load(made)


@pytest.mark.parametrize("file", [configs.CONFIG, configs.TENSORS])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files(made: Path, file: str, share: float) -> None:
    content = (made / file).read_bytes()
    (made / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=rf"{file} is damaged"):
        load(made)


@pytest.mark.parametrize(
    "changes",
    [
        {"costs": {}},
        {"table": [{}]},
        {"gates": ...},
        {"base": 3},
        {"threshold": "high"},
        {"plan": {"format_version": 1}},
    ],
)
def test_damaged_config(made: Path, changes: dict[str, Any]) -> None:
    edit(made, **changes)
    with pytest.raises(CheckpointError, match="damaged"):
        load(made)


def test_what_only_older_files_hold_is_skipped(made: Path) -> None:
    config = json.loads((made / configs.CONFIG).read_text())
    for planned in config["plan"]["sites"]:
        assert "restriction" not in planned["site"]
        planned["site"]["restriction"] = ""
    edit(made, plan=config["plan"])
    plan = state_of(load(made)).plan
    assert plan == state_of(subject("timm/test_resnet").gated).plan == Plan.from_dict(config["plan"])
    config["plan"]["sites"][0]["site"]["restrictions"] = ""
    edit(made, plan=config["plan"])
    with pytest.raises(CheckpointError, match=r"unknown in plan\.sites\[0\]\.site: restrictions"):
        load(made)


def test_newer_formats(made: Path) -> None:
    edit(made, format_version=2)
    with pytest.raises(CheckpointError, match=r"version 2.*up to 1.*pip install -U"):
        load(made)
    edit(made, format_version="one")
    with pytest.raises(CheckpointError, match="damaged"):
        load(made)


def test_tensors_that_do_not_fit_are_listed_by_name(made: Path) -> None:
    file = made / configs.TENSORS
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    gone = tensors.pop(first)
    tensors[second] = torch.zeros(*tensors[second].shape, 2)
    tensors["stray"] = gone
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as info:
        load(made)
    text = str(info.value)
    assert f"missing: {first}" in text and "unexpected: stray" in text and f"of another shape: {second} is" in text


def test_other_weights(made: Path) -> None:
    other = copy.deepcopy(subject("timm/test_resnet").model)
    mine = fingerprint(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    with pytest.raises(BaseMismatch) as info:
        load(made, model=other)
    assert str(mine) in str(info.value) and str(fingerprint(other)) in str(info.value)
    assert isinstance(load(made, model=other, allow_other_base=True), type(other))


def test_other_class(made: Path) -> None:
    with pytest.raises(BaseMismatch, match=r"ResNet.*got a .*allow_other_base=True"):
        load(made, model=subject("plain/own_vit").model)


def test_unconverted_models_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NotConverted):
        checkpoints.save(subject("plain/own_vit").model, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


# -- the directory appears in full or not at all ---------------------------------------------------------------------


def test_existing_directory_stays_unless_told(made: Path) -> None:
    gated = converted(subject("timm/test_resnet"))
    state_of(gated).budget = 0.3
    before = (made / configs.CONFIG).read_bytes()
    with pytest.raises(OutputExists, match="overwrite=True"):
        checkpoints.save(gated, made)
    assert (made / configs.CONFIG).read_bytes() == before
    checkpoints.save(gated, made, overwrite=True)
    assert state_of(load(made)).budget == 0.3
    assert [path.name for path in made.parent.iterdir()] == ["made"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_all_files_can_be_read_by_whom_new_files_can(mask: int, mode: int, tmp_path: Path) -> None:
    one = subject("timm/test_resnet")
    before = os.umask(mask)
    try:
        checkpoints.save(one.gated, tmp_path / "made", base=True)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "made").iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {mode}, modes


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match=r"exists and is no converted model.*; give another directory$"):
            checkpoints.save(converted(subject("timm/test_resnet")), tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_write_leaves_nothing_behind(made: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    target = made if overwrite else made.with_name("other")
    before = (made / configs.CONFIG).read_bytes()
    with pytest.raises(CheckpointError, match="no space left.*nothing was written"):
        checkpoints.save(converted(subject("timm/test_resnet")), target, overwrite=overwrite)
    assert [path.name for path in made.parent.iterdir()] == ["made"]
    assert (made / configs.CONFIG).read_bytes() == before


def test_fingerprint_sees_names_shapes_and_values() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    found = {fingerprint(model)}
    model[1].running_mean += 1
    found.add(fingerprint(model))
    found.add(fingerprint(nn.Sequential(model[0], nn.Identity(), model[1])))
    found.add(fingerprint(model.double()))
    assert len(found) == 4
    assert fingerprint(model.to("meta")) is None
