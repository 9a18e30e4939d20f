"""Checkpoints that nobody's `save` wrote: every one is refused by name, or is harmless; none runs code."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import configs
from surgery.context import state_of
from surgery.errors import CheckpointError, PlanMismatch, SurgeryError
from surgery.scripts.cli import app
from surgery.state import BudgetPoint
from surgery.vetting import vet

EXAMPLES = int(os.environ.get("SURGERY_FUZZ_EXAMPLES", "40"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
RAN = "surgery_hostile_code_ran"
CODE = f"__import__('builtins').__setattr__('{RAN}', 1)"
HOSTILE = (
    "../../etc/passwd",
    "/etc/passwd",
    "a\\..\\b",
    "~",
    "",
    "blocks.0\x00",
    f"x():pass\n{CODE}\ndef y",
    f"x={CODE}",
    f"{{{CODE}}}",
    "x" * 10_000,
    f"python:os:system?command={RAN}",
    "hf:x/y?trust_remote_code=true",
)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return toys.Stack(toys.mlp(8), toys.mlp(8), head=nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def files(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """The two files of a good checkpoint."""
    gated = surgery.insert_gates(network, surgery.find_sites(network, torch.randn(2, 4, 8)))
    state = state_of(gated)
    state.budget, state.table = 0.6, [BudgetPoint(0.0, 0.6, dict.fromkeys(state.names, 0.5))]
    place = tmp_path_factory.mktemp("good") / "made"
    surgery.save(gated, place)
    return json.loads((place / configs.CONFIG).read_text()), (place / configs.TENSORS).read_bytes()


def load(network: nn.Module, place: Path, config: Any, tensors: bytes) -> nn.Module | None:
    """Load two files; None where they are refused by name."""
    place.mkdir(exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (place / configs.CONFIG).write_bytes(text)
    (place / configs.TENSORS).write_bytes(tensors)
    try:
        gated = surgery.load(place, model=network)
    except SurgeryError as error:
        assert str(error)
        return None
    finally:
        assert not hasattr(__builtins__, RAN) and RAN not in getattr(__builtins__, "__dict__", __builtins__)
    return gated


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*at, key))


def edit(config: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    """A copy with the holder of `path` changed."""
    broken = copy.deepcopy(config)
    holder: Any = broken
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return broken


@FUZZ
@given(data=st.data())
def test_changed_configs(
    network: nn.Module, files: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    config, tensors = files
    config = {**config, "tensors_sha256": None}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(paths(config), key=str)))
        how, value = data.draw(st.sampled_from(("replace", "delete", "add"))), data.draw(values)

        def change(holder: Any, key: Any, how: str = how, value: Any = value) -> None:
            if how == "delete":
                del holder[key]
            elif how == "add" and isinstance(holder, dict):
                holder[f"{key}-more"] = value
            else:
                holder[key] = value

        config = edit(config, path, change)
    load(network, tmp_path_factory.getbasetemp() / "fuzzed", config, tensors)


@FUZZ
@given(text=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_texts_that_are_no_configs(
    network: nn.Module, files: Any, tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    assert load(network, tmp_path_factory.getbasetemp() / "fuzzed", text, files[1]) is None


@FUZZ
@given(data=st.data())
def test_changed_tensors(
    network: nn.Module, files: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    config, tensors = files
    broken = bytearray(tensors)
    header = 8 + struct.unpack("<Q", tensors[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, min(header, len(broken) - 1)) | st.integers(0, len(broken) - 1))
        broken[where] = data.draw(st.integers(0, 255))
    broken = broken[: data.draw(st.integers(0, len(broken)) | st.just(len(broken)))]
    broken += data.draw(st.binary(max_size=8))
    place = tmp_path_factory.getbasetemp() / "fuzzed"
    load(network, place, {**config, "tensors_sha256": None}, bytes(broken))
    if bytes(broken) != tensors:  # the hash sees what the format does not
        assert load(network, place, config, bytes(broken)) is None


@FUZZ
@given(name=st.sampled_from(HOSTILE), shape=st.lists(st.integers(0, 2**62), max_size=3), more=st.integers(0, 2**63))
def test_made_up_tensor_headers(
    network: nn.Module, files: Any, tmp_path_factory: pytest.TempPathFactory, name: str, shape: list[int], more: int
) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, more]}}).encode()
    for length in (len(header), more):
        blob = struct.pack("<Q", length) + header
        config = {**files[0], "tensors_sha256": None}
        assert load(network, tmp_path_factory.getbasetemp() / "fuzzed", config, blob) is None


# -- what fuzzing seldom hits -------------------------------------------------------------------------------------------


def change_site(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return edit(config, ("plan", "sites", 0), lambda sites, i: sites[i]["site"].update(changes))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_site_names(network: nn.Module, files: Any, tmp_path: Path, name: str) -> None:
    """The name is changed wherever it stands, so that nothing but itself can be refused."""
    config, tensors = files
    was = config["plan"]["sites"][0]["site"]["name"]
    text = json.dumps({**config, "tensors_sha256": None}).replace(json.dumps(was), json.dumps(name))
    gated = load(network, tmp_path / "made", text.encode(), tensors)
    if gated is not None:
        gated(torch.randn(2, 4, 8))
    for host in (*HOSTILE[:6],):
        assert (
            load(network, tmp_path / "made", change_site({**config, "tensors_sha256": None}, host=host), tensors)
            is None
        )


@pytest.mark.parametrize("name", ["a\\b", "a\0b", "a\nb", "a\u202eb", "/a", "~a", "a..b"])
def test_names_that_no_module_has(network: nn.Module, name: str) -> None:
    plan = surgery.find_sites(network, torch.randn(2, 4, 8)).plan()
    vet(plan)
    first, *others = plan.sites
    with pytest.raises(CheckpointError, match="is no name of a module or tensor"):
        vet(replace(plan, sites=(replace(first, site=replace(first.site, name=name)), *others)))


@pytest.mark.parametrize("key", ["x():pass", f"a={CODE}", "lambda", "a b", "1"])
def test_hostile_argument_names(network: nn.Module, files: Any, tmp_path: Path, key: str) -> None:
    config = copy.deepcopy({**files[0], "tensors_sha256": None})
    for patterns in config["plan"]["patterns"].values():
        patterns.append([patterns[0][0], [], [[key, "none"]]])
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / configs.CONFIG).write_text(json.dumps(config))
    (tmp_path / "made" / configs.TENSORS).write_bytes(files[1])
    with pytest.raises(CheckpointError, match="is no name of an argument"):
        surgery.load(tmp_path / "made", model=network)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 2**40}, r"sites\[0\]: \d+ channels, expected 1 to"),
        ({"channels": 2**21}, "of another shape"),
        ({"channels": -1}, "channels, expected"),
        ({"flops": 10**30}, "site.flops must be a smaller integer"),
        ({"kind": "everything"}, "site.kind must be one of block"),
        ({"channels": 8.5}, "site.channels must be int"),
        ({"colour": 1}, r"unknown in plan.sites\[0\].site: colour"),
    ],
)
def test_absurd_values_are_refused_by_name(
    network: nn.Module, files: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config, tensors = files
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / configs.CONFIG).write_text(json.dumps(change_site(config, **changes)))
    (tmp_path / "made" / configs.TENSORS).write_bytes(tensors)
    with pytest.raises(CheckpointError, match=message):
        surgery.load(tmp_path / "made", model=network)


def test_sites_of_another_architecture(network: nn.Module, files: Any, tmp_path: Path) -> None:
    config, tensors = files
    place = tmp_path / "made"
    broken = edit(config, ("plan", "sites", 0), lambda sites, i: sites[i]["site"].update(anchor=["inner.7"]))
    assert load(network, place, broken, tensors) is None
    with pytest.raises(PlanMismatch, match="not found"):
        surgery.load(place, model=network)


def test_deep_and_long_json(network: nn.Module, files: Any, tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for text in (deep, b'{"format_version": ' + b"1" * 5000 + b"}", b'{"a": 1, "a": 2}', b'{"format_version": NaN}'):
        assert load(network, tmp_path / "made", text, files[1]) is None
    (tmp_path / "made" / configs.CONFIG).write_bytes(b" " * (2**26 + 1))
    with pytest.raises(CheckpointError, match="at most"):
        surgery.load(tmp_path / "made", model=network)


@pytest.mark.parametrize(
    "spec", ["python:os:system?command=touch {}", "python:{}.py:make", "hf:{}?trust_remote_code=true"]
)
def test_bases_that_are_code_run_only_on_demand(files: Any, tmp_path: Path, spec: str) -> None:
    from typer.testing import CliRunner

    config = copy.deepcopy(files[0])
    config["base"]["spec"] = spec.format(tmp_path / "ran")
    (tmp_path / "ran.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / configs.CONFIG).write_text(json.dumps(config))
    (tmp_path / "made" / configs.TENSORS).write_bytes(files[1])
    with pytest.raises(CheckpointError, match=r"runs code.*trust_code=True"):
        surgery.load(tmp_path / "made")
    done = CliRunner().invoke(app, ["show", str(tmp_path / "made")])
    assert done.exit_code == 1 and "runs code" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "ran").exists()
    if spec.startswith("python:{}"):
        with pytest.raises(CheckpointError):  # it has no function `make`
            surgery.load(tmp_path / "made", trust_code=True)
        assert (tmp_path / "ran").exists()
