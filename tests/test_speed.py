"""The speed page on a network that takes no time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import surgery
from surgery.scripts import speed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def tiny() -> tuple[Any, Any]:
    return nn.Sequential(Block(), Block()).eval(), torch.randn(2, 3, 16, 16)


def test_draws_are_balanced_at_every_site() -> None:
    draws = speed.balanced_draws(("a", "b"), calls=50, samples=2, rate=0.62, seed=0)
    assert len(draws) == 50
    for name in ("a", "b"):
        assert sum(int(draw[name].sum()) for draw in draws) == 62
        assert {draw[name].shape for draw in draws} == {torch.Size([2])}
    assert any(not torch.equal(draw["a"], draw["b"]) for draw in draws)


def test_new_memory_is_what_is_not_shared() -> None:
    model, x = tiny()
    gated = surgery.insert_gates(model, surgery.find_sites(model, x).plan(skip="identity"))
    bytes_of = {True: 0, False: 0}
    for name, tensor in gated.state_dict().items():
        bytes_of["surgery_gates" in name] += tensor.numel() * tensor.element_size()
    assert speed.new_memory(gated, model) == pytest.approx(bytes_of[True] / bytes_of[False])


def test_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import typer

    monkeypatch.setattr(speed, "NETWORKS", {"tiny": tiny})
    app = typer.Typer()
    app.command()(speed.speed)
    out = tmp_path / "speed.md"
    result = CliRunner().invoke(app, ["--repeats", "8", "--threads", "1", "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["what"], row["batch"]) for row in rows] == [
        ("convert", None),
        ("active", 1),
        ("open", 1),
        ("routers", 1),
        ("active", 8),
        ("open", 8),
        ("routers", 8),
    ]
    assert all(row["ratio"] > 0 for row in rows)
    assert "| tiny | active | 8 |" in out.read_text()
