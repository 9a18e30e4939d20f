"""The trial of skip paths: each kind at the cuts nearest to the costs that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from surgery.scripts import skips_trial

NETWORK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)

def make():
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 16, 3, padding=1), *(Block() for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(*parts, nn.Linear(16, 10))
    with torch.no_grad():
        net[-1].weight.mul_(300)  # so that differences are seen
    return net
"""


def test_wider_paths_are_nearer_to_dense(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    app = typer.Typer()
    app.command()(skips_trial.main)
    arguments = [
        f"python:{tmp_path}/net.py:make",
        "--data",
        "digits:8",
        "--limit",
        "120",
        "--held",
        "60",
        "--batch-size",
        "20",
    ]
    arguments += ["--kind", "linear", "--kind", "narrow:0.75", "--cost", "0.9", "--cost", "0.1", "--no-augment"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [
        line.strip("| ").split(" | ")
        for line in result.stdout.splitlines()
        if line.startswith(("| linear", "| narrow"))
    ]
    assert [row[0] for row in rows] == ["linear", "linear", "narrow:0.75", "narrow:0.75"]
    costs = [float(row[1]) for row in rows]
    assert costs[1] < 0.3 < 0.7 < costs[3] < costs[2]  # narrow paths cost what they keep
    assert float(rows[3][2]) < float(rows[1][2])  # everything cut
    with pytest.raises(ValueError, match="could not convert"):
        list(skips_trial.compare(arguments[0], "digits:8", ["narrow:wide"], [0.5], (60, 20, 20), augment=False, seed=0))
