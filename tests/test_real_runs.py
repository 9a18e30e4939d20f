"""The command behind docs/results.md, from nothing to tables and picture, on a toy."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from surgery.scripts import real_page, real_runs, stories

NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.blocks(x.flatten(2).transpose(1, 2).reshape(len(x), 8, 24)).mean(1))


def make():
    torch.manual_seed(0)
    return Net()
"""
RUN = replace(
    real_runs.RUNS[0], name="toy", title="A toy", source="python:{out}/net.py:make", data="toy", limit=None, batch_size=20,
    times=(1, 4), budgets=(0.8, 0.6), targets={0.6: "any"}, epochs=1, routers_epochs=1, heal=("norms", 1e-3, 3), augment=False,
    second_look=False,
)  # fmt: skip


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    datasets, image = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "shared/data/toy").mkdir(parents=True)
    (tmp_path / "shared/weights").mkdir()
    for split, count in (("train", 200), ("test", 60)):
        rows: list[dict[str, Any]] = []
        for index in range(count):
            buffer = io.BytesIO()
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            image.fromarray(pixels.numpy()).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": index % 10})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / f"shared/data/toy/{split}.parquet")
    return tmp_path / "shared"


def test_one_command_makes_tables_and_picture(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(real_runs, "RUNS", (RUN,))
    monkeypatch.setattr(stories, "VARIANTS", ())
    out, page, picture = tmp_path / "out", tmp_path / "page.md", tmp_path / "picture.png"
    out.mkdir()
    (out / "net.py").write_text(NETWORK, encoding="utf-8")
    page.write_text(f"{real_page.START}\n{real_page.END}\n", encoding="utf-8")

    def run(**more: Any) -> None:
        real_runs.main(
            shared, out, only=None, stage=more.pop("stage", None), seeds=2, columns=True, policies=True, peer_inputs=20,
            threads=torch.get_num_threads(), limit=None, write=page, picture=picture,
        )  # fmt: skip

    run()
    text = page.read_text(encoding="utf-8")
    assert "2 conversions" in text and "on 60 test inputs" in text and "minus shuffled" in text
    assert "routers alone: cost" in text and ("healed: cost" in text or "was undone" in text)
    assert "static+look" in text and "| 0.60 |" in text and "x (" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    known = json.loads((out / "toy.json").read_text("utf-8"))
    assert len(known["trained"]) == 2 and len(known["trained"][0]["scores"]) == 2

    before = {file: file.stat().st_mtime_ns for file in out.rglob("surgery.safetensors")}
    assert len(before) == 4
    run(stage=["convert", "write"])  # what is there is kept
    assert {file: file.stat().st_mtime_ns for file in out.rglob("surgery.safetensors")} == before
    assert page.read_text(encoding="utf-8") == text


def test_a_picture_without_a_page_is_refused_at_once(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(real_runs.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), "--picture", str(tmp_path / "p.png")])
    assert result.exit_code == 2 and "--write PAGE" in result.output and not (tmp_path / "out").exists()
