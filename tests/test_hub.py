"""Push and pull through huggingface_hub's own client, against a server on loopback that speaks the Hub's API."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import READ, WRITE, Hub
from huggingface_hub import constants
from subjects import assert_equal, outputs, subject
from test_checkpoints import converted
from torch import nn
from typer.testing import CliRunner

import surgery
from surgery import checkpoints, configs
from surgery.adapters.timm import create_gated
from surgery.context import state_of
from surgery.errors import CheckpointError, HubError, OutputExists
from surgery.scripts.cli import app


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, and a client that knows no other one."""
    with Hub() as server:
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_HUB_CACHE", "HF_XET_CACHE"):
            monkeypatch.setattr(constants, name, str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits seconds before it tries again
        huggingface_hub.utils.disable_progress_bars()
        yield server
        assert server.unknown == []


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted(subject("timm/test_resnet"))


def load(repository: str, **options: Any) -> nn.Module:
    return surgery.load(repository, model=subject("timm/test_resnet").model, **options)


def test_push_then_load_is_bit_equal(hub: Hub, model: nn.Module) -> None:
    address = surgery.push_to_hub(model, "me/small", private=True, message="first", tags=["mine"])
    assert address.startswith(f"{hub.url}/me/small/commit/")
    assert hub.repositories["me/small"].private and hub.repositories["me/small"].messages[-1] == "first"
    assert {configs.CONFIG, configs.TENSORS, "README.md"} <= set(hub.files("me/small"))
    assert "- mine" in hub.files("me/small")["README.md"].decode()
    assert len(hub.repositories["me/small"].commits) == 2  # the empty one of the Hub, and ours
    example = subject("timm/test_resnet").example
    assert_equal(outputs(load("me/small"), example), outputs(model, example))


def test_a_pushed_base_is_all_that_is_needed(hub: Hub, model: nn.Module, tmp_path: Path) -> None:
    import timm

    surgery.push_to_hub(model, "me/whole", base=True)
    example = subject("timm/test_resnet").example
    assert_equal(outputs(surgery.load("me/whole"), example), outputs(model, example))
    assert_equal(outputs(create_gated("hf-hub:me/whole@main"), example), outputs(model, example))
    dense = timm.create_model("hf-hub:me/whole", pretrained=True).eval()
    assert_equal(outputs(dense, example), outputs(subject("timm/test_resnet").model, example))


def test_branches_and_pull_requests(hub: Hub, model: nn.Module) -> None:
    surgery.push_to_hub(model, "me/small", revision="next")
    assert configs.TENSORS in hub.files("me/small", "next") and checkpoints.TENSORS not in hub.files("me/small")
    assert surgery.push_to_hub(model, "me/small", create_pr=True).endswith("/discussions/1")
    assert configs.TENSORS not in hub.files("me/small")
    assert isinstance(load("me/small", revision="next"), type(subject("timm/test_resnet").model))
    with pytest.raises(HubError, match="no such revision"):
        load("me/small", revision="none")


def test_pull_gives_the_directory_in_full_or_not_at_all(hub: Hub, model: nn.Module, tmp_path: Path) -> None:
    surgery.save(model, tmp_path / "made")
    surgery.push(tmp_path / "made", "me/small")
    got = surgery.pull("me/small", tmp_path / "got")
    for name in (configs.CONFIG, configs.TENSORS):
        assert (got / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    assert not (got / ".cache").exists()
    with pytest.raises(OutputExists):
        surgery.pull("me/small", got)
    hub.cut_downloads = 100
    with pytest.raises(HubError, match=r"me/small: .*; nothing was written"):
        surgery.pull("me/small", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["got", "made"]


@pytest.mark.parametrize(("token", "message"), [("hf_wrong", "refuses the token"), (READ, "no permission here")])
def test_tokens_that_the_hub_refuses(hub: Hub, model: nn.Module, token: str, message: str) -> None:
    with pytest.raises(HubError, match=rf"me/small: .*{message}.*; nothing was published"):
        surgery.push_to_hub(model, "me/small", token=token)
    assert hub.repositories == {}


def test_no_permission_for_another_ones_repository(hub: Hub, model: nn.Module) -> None:
    surgery.push_to_hub(model, "me/small")
    hub.repositories["you/small"] = hub.repositories["me/small"]
    before = dict(hub.repositories["you/small"].commits)
    with pytest.raises(HubError, match="you/small: this token has no permission"):
        surgery.push_to_hub(model, "you/small")
    assert hub.repositories["you/small"].commits == before


def test_a_cut_upload_publishes_nothing_and_is_resumed(hub: Hub, model: nn.Module, tmp_path: Path) -> None:
    surgery.save(model, tmp_path / "made", base=True)
    hub.cut_uploads = 100
    with pytest.raises(HubError, match="connection broke.*nothing was published; run it again"):
        surgery.push(tmp_path / "made", "me/small")
    assert set(hub.files("me/small")) == {".gitattributes"}
    hub.cut_uploads = 0
    hub.cut_commits = 1
    with pytest.raises(HubError, match="connection broke"):
        surgery.push(tmp_path / "made", "me/small")
    assert set(hub.files("me/small")) == {".gitattributes"}
    done = len(hub.uploads)
    surgery.push(tmp_path / "made", "me/small")
    assert len(hub.uploads) == done  # every blob was there
    assert configs.TENSORS in hub.files("me/small")


def test_an_upload_that_is_cut_once_goes_through(hub: Hub, model: nn.Module) -> None:
    hub.cut_uploads = 1
    surgery.push_to_hub(model, "me/small")
    assert configs.TENSORS in hub.files("me/small")


def test_private_and_missing_repositories(hub: Hub, model: nn.Module) -> None:
    surgery.push_to_hub(model, "me/hidden", private=True)
    for name in ("me/hidden", "me/none"):
        with pytest.raises(HubError, match=f"{name}: "):
            load(name, token=False)
    hub.commit("me/else", {"weights.bin": b"x"})
    with pytest.raises(CheckpointError, match="me/else holds no surgery_config.json"):
        load("me/else")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "sub/dir.txt", "a b", "~root"])
def test_hostile_file_names_are_refused(hub: Hub, model: nn.Module, tmp_path: Path, name: str) -> None:
    surgery.push_to_hub(model, "me/small")
    hub.commit("me/small", {name: b"x"})
    with pytest.raises(CheckpointError, match="nothing was fetched"):
        surgery.pull("me/small", tmp_path / "got")
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize("name", ["me", "me/a/b", "../x", "me/..", ""])
def test_names_that_are_no_repository(model: nn.Module, name: str) -> None:
    with pytest.raises(HubError, match="expected user/name"):
        surgery.push_to_hub(model, name)


def test_paths_of_this_machine_are_not_published(hub: Hub, model: nn.Module) -> None:
    surgery.push_to_hub(model, "me/small", spec="python:/home/me/secret.py:make")
    assert all(b"secret" not in content for content in hub.files("me/small").values())


def test_a_repository_that_names_code_runs_none(hub: Hub, model: nn.Module, tmp_path: Path) -> None:
    surgery.push_to_hub(model, "me/evil")
    config = json.loads(hub.files("me/evil")[configs.CONFIG])
    config["base"]["spec"] = f"python:os:system?command=touch {tmp_path / 'ran'}"
    hub.commit("me/evil", {configs.CONFIG: json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match="runs code"):
        surgery.load("me/evil")
    assert not (tmp_path / "ran").exists()


def test_card_is_written_from_measurements(hub: Hub, model: nn.Module) -> None:
    one = subject("timm/test_resnet")
    data = [(one.entry.example(8, seed=i), torch.arange(8) % 2) for i in range(2)]
    gated = converted(one)
    report = surgery.measure(gated, data, dense=one.model, speed=(), resamples=50)  # type: ignore[arg-type]
    surgery.push_to_hub(gated, "me/card", spec="timm:test_resnet.r160_in1k")
    text = hub.files("me/card")["README.md"].decode()
    assert f"| 0.6 | {report.cost:.4f}".rstrip("0") in text and f"{report.peer('static').difference:+.4f}" in text
    assert "SHA-256" in text and 'surgery.load("me/card")' in text and "a note" in text
    assert "base_model: timm/test_resnet.r160_in1k" in text and "license: apache-2.0" in text
    assert hub.files("me/card")["active_rates.png"].startswith(b"\x89PNG")
    surgery.calibrate(gated, [x for x, _ in data], 0.9)
    assert state_of(gated).report == {}


def test_what_is_no_conversion_is_not_published(hub: Hub, tmp_path: Path) -> None:
    for place in (tmp_path / "nope", tmp_path):
        with pytest.raises(CheckpointError, match="expected a directory that surgery.save wrote"):
            surgery.push(place, "me/small")


def test_commands(hub: Hub, model: nn.Module, tmp_path: Path) -> None:
    surgery.save(model, tmp_path / "made")
    run = CliRunner().invoke
    done = run(app, ["push", str(tmp_path / "made"), "me/small", "--private", "--tag", "x", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["address"].startswith(hub.url)
    done = run(app, ["pull", "me/small", "--out", str(tmp_path / "got")])
    assert done.exit_code == 0 and (tmp_path / "got" / configs.TENSORS).is_file()
    done = run(app, ["pull", "me/none", "--out", str(tmp_path / "none")])
    assert done.exit_code == 1 and "HubError" in done.stderr
