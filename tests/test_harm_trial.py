"""The trial of harm labels: every setting beside the static policy, at the costs that were asked for."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from surgery.scripts import harm_trial

NETWORK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))

    def forward(self, x):
        return x + self.mlp(x)

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block() for _ in range(4))), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(x.flatten(1, 2)).mean(1))

def make():
    torch.manual_seed(0)
    return Rows()
"""


@pytest.mark.parametrize("tune", ["oneshot", "train"])
def test_it_prints_a_table(tune: str, tmp_path: object) -> None:
    path = f"{tmp_path}/net.py"
    with open(path, "w", encoding="utf-8") as file:
        file.write(NETWORK)
    app = typer.Typer()
    app.command()(harm_trial.main)
    sizes = ["--limit", "160", "--held", "80", "--batch-size", "40", "--samples", "80", "--epochs", "1"]
    settings = ["first_order", "leave_one_out"] if tune == "oneshot" else ["auto", "auto:0.5:0", "auto:0:0.5"]
    asked = [word for setting in settings for word in ("--setting", setting)]
    result = CliRunner().invoke(
        app, [f"python:{path}:make", "--data", "digits:8", *sizes, *asked, "--budget", "0.7", "--tune", tune]
    )
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # header, rule and rows have the same columns
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["static", *(setting.replace(":", ", ") for setting in settings)]
    assert len({tuple(row[3:]) for row in rows}) == len(rows)  # no setting is another one by mistake
    for row in rows[1:]:
        assert float(row[3]) == pytest.approx(0.7, abs=0.02)
