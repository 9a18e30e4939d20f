"""The trial of skip paths: each kind at the cuts nearest to the costs that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import surgery
from surgery.scripts import digits_bottleneck, digits_model, skips_trial

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
        net[-1].weight.mul_(30)  # so that differences are seen
    return net
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.body(x)
        return made


@pytest.fixture
def network(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    return f"python:{tmp_path}/net.py:make"


def test_wider_paths_are_nearer_to_dense(network: str) -> None:
    sizes = (120, 60, 20)
    kinds = ["linear", "narrow:0.75"]
    rows = list(skips_trial.compare(network, "digits:8", kinds, [0.9, 0.1], sizes, augment=False, seed=0))
    assert [(row.kind, row.asked) for row in rows] == [(k, c) for k in kinds for c in (0.9, 0.1)]
    linear, narrow = rows[1], rows[3]  # everything cut
    assert linear.cost < 0.1 and 0.7 < narrow.cost < rows[2].cost < 0.9  # narrow paths cost what they keep
    assert 0 < 5 * narrow.divergence < linear.divergence
    with pytest.raises(ValueError, match="could not convert"):
        list(skips_trial.compare(network, "digits:8", ["narrow:wide"], [0.5], sizes, augment=False, seed=0))


def test_the_best_kind_of_each_site_at_a_price() -> None:
    model = nn.Sequential(Block(), Block()).eval()
    sites = surgery.find_sites(model, torch.randn(2, 4, 8, 8))
    first, second = (site.name for site in sites)
    plans = [sites.plan(granularity="sample", skip=kind) for kind in ("affine", "linear")]
    cheap = skips_trial.Fitted(plans[0], {first: 0.9, second: 0.8}, {first: 0.01, second: 0.01}, 0.1)
    dear = skips_trial.Fitted(plans[1], {first: 0.2, second: 0.6}, {first: 0.11, second: 0.11}, 0.1)

    def kinds(floor: float) -> list[str]:
        return [planned.skip for planned in skips_trial.best_kinds([cheap, dear], floor).sites]

    assert kinds(0.33) == ["linear", "linear"]
    assert kinds(0.3) == ["linear", "affine"]  # it repairs 0.7 for 0.1 of the cost, at the second site 0.2
    assert kinds(0.121) == ["affine", "affine"]
    with pytest.raises(ValueError, match="0.120 of the cost is left, above 0.11"):
        kinds(0.11)


def test_kinds_chosen_per_site_are_scored(network: str) -> None:
    kinds = ["affine", "narrow:0.75"]
    rows = list(
        skips_trial.compare(network, "digits:8", kinds, [0.1], (120, 60, 20), augment=False, seed=0, per_site=[0.5])
    )
    assert [row.kind for row in rows] == [*kinds, "per site, 0.5"]
    affine, narrow, mixed = rows
    assert affine.cost < mixed.cost <= 0.5 < narrow.cost
    assert 0 < narrow.divergence < mixed.divergence


def test_it_prints_a_table(network: str) -> None:
    app = typer.Typer()
    app.command()(skips_trial.main)
    arguments = ["--data", "digits:8", "--limit", "40", "--held", "20", "--batch-size", "20", "--no-augment"]
    result = CliRunner().invoke(app, [network, *arguments, "--kind", "affine", "--cost", "0.5"])
    assert result.exit_code == 0, result.output
    head, line, row = [text for text in result.stdout.splitlines() if text.startswith("|")]
    assert head == "| skip path | cost | KL | agreement |" and line == "|---|---|---|---|"
    assert row.startswith("| affine | 0.5") and row.count("|") == 5


def test_the_network_of_bottleneck_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digits_model.train
    monkeypatch.setattr(digits_model, "train", lambda x, y, **options: whole(x[:128], y[:128], **options))
    app = typer.Typer()
    app.command()(digits_bottleneck.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "made" / "it.safetensors"), "--epochs", "1"])
    assert result.exit_code == 0, result.output
    assert "of 500 other images are right" in result.stderr
    model = digits_bottleneck.trained(str(tmp_path / "made" / "it.safetensors"))
    assert not model.training
    sites = surgery.find_sites(model, torch.randn(2, 1, 16, 16))
    assert [site.chain is not None and site.chain.inner for site in sites].count(False) == 3
    assert len(sites) == 11
