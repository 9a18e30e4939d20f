"""`surgery compare`: token merging by hand, pruning, the table and the files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import converted, network, read_json, run, unboxed  # noqa: F401  (fixtures)
from torch import Tensor, nn
from toys import Stack, convolution

from surgery.calling import Batch
from surgery.counting import flop_counter
from surgery.errors import BudgetError, UnsupportedModel
from surgery.objectives import divergence
from surgery.progress import silent
from surgery.scripts import pruning, token_merging
from surgery.scripts.token_merging import MergedTokens, merge


def vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=3, num_heads=2, **options
    )
    return model.eval()


def flops(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), flop_counter() as counter:
        model(x)
    return float(counter.get_total_flops())


# -- token merging ----------------------------------------------------------------------------------------------------


def test_the_pair_most_alike_becomes_its_mean() -> None:
    # places: class, odd, even, odd, even; the last two point the same way
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1], [0.6, 0.8], [0.6, 0.8]]])
    x = torch.tensor([[[10.0], [20.0], [30.0], [40.0], [50.0]]])
    size = torch.tensor([[[1.0], [1.0], [1.0], [1.0], [3.0]]])
    merged, sizes = merge(x, size, metric, 1, prefix=1)
    # the class token, the even token that stays, then the odd ones: 40 and 50 weigh 1 and 3
    assert merged[0, :, 0].tolist() == [10.0, 30.0, 20.0, 47.5]
    assert sizes[0, :, 0].tolist() == [1.0, 1.0, 1.0, 4.0]
    assert float((merged * sizes).sum()) == float((x * size).sum())


def test_the_class_token_is_never_merged() -> None:
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    x = torch.arange(4.0).view(1, 4, 1)
    with_class, _ = merge(x, torch.ones_like(x), metric, 9, prefix=1)
    without, _ = merge(x, torch.ones_like(x), metric, 9, prefix=0)
    assert with_class[0, :, 0].tolist() == [0.0, 1.0, 2.5]
    assert without[0, :, 0].tolist() == [0.5, 2.5]


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_merging_nothing_is_the_dense_model(pooling: str) -> None:
    options: dict[str, Any] = {"global_pool": pooling, "class_token": pooling == "token"}
    model, x = vit(**options), torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(MergedTokens(model, 0.0)(x), model(x))
        merged = MergedTokens(model, 2.5)
        assert merged(x).shape == (4, 3) and not torch.allclose(merged(x), model(x))
    assert not model.blocks[0].attn.qkv._forward_hooks  # type: ignore[index, union-attr]


def test_identical_tokens_may_be_merged_without_a_trace() -> None:
    model, x = vit(global_pool="avg", class_token=False, pos_embed="none"), torch.ones(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(MergedTokens(model, 4)(x), model(x))  # attention counts a merged token by its parts


def test_as_many_tokens_as_the_cost_allows() -> None:
    model, x = vit(), torch.randn(1, 1, 16, 16)
    dense = flops(model, x)
    merged, cost = token_merging.merged_to(model, x, dense, 0.75)
    assert 0.68 < cost <= 0.75 and cost == pytest.approx(flops(merged, x) / dense)
    with pytest.raises(BudgetError, match="merging half of the tokens in every block still costs 0\\.[2-5]"):
        token_merging.merged_to(model, x, dense, 0.1)


def test_refuses_other_networks_by_name() -> None:
    import timm

    with pytest.raises(UnsupportedModel, match="VisionTransformer; Stack is another"):
        token_merging.check(Stack(nn.Linear(3, 3)))
    with pytest.raises(UnsupportedModel, match="plain blocks and attention"):
        token_merging.check(vit(block_fn=timm.models.vision_transformer.ResPostBlock))
    with pytest.raises(UnsupportedModel, match="has 5 and pools by token"):
        token_merging.check(vit(reg_tokens=4))


# -- pruning ----------------------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """A stem, one residual block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = convolution(16)
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.head.weight.mul_(30)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


def test_channels_go_and_distillation_brings_answers_back() -> None:
    pytest.importorskip("torch_pruning")
    model, x = Convolutional().eval(), torch.randn(64, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = Batch((x[:1],))
    dense = flops(model, x[:1])
    with torch.no_grad():
        pruned, cost = pruning.pruned_to(model, one, dense, 0.6)
        assert 0.3 < cost <= 0.6 and cost == pytest.approx(flops(pruned, x[:1]) / dense)
        far = float(divergence(pruned(x), model(x)).mean())
        pruning.distil(pruned, model, [x], 60, silent, "tuning")
        assert float(divergence(pruned(x), model(x)).mean()) < 0.5 * far
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pruning_refuses_what_has_no_channels() -> None:
    pytest.importorskip("torch_pruning")
    with pytest.raises(UnsupportedModel, match="convolutional networks; VisionTransformer is none"):
        pruning.pruned_to(vit(), Batch((torch.randn(1, 1, 16, 16),)), 1.0, 0.5)


# -- the command ------------------------------------------------------------------------------------------------------


def test_table_files_and_json(converted: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ("compare", converted, "--data", "digits", "--limit", 64, "--timed-batch", 16, "--repeats", 2)
    found = read_json(*arguments, "--budgets", "0.6,0.01", "--out", out)
    assert found == json.loads((out / "comparison.json").read_text("utf-8"))
    assert "outside the calibrated range" in found["out_of_reach"]["0.01"]
    report = found["budgets"]["0.6"]
    assert [peer["name"] for peer in report["peers"]][:1] == ["static"]
    assert {"token merging", "pruned channels"} <= set(report["absent"])
    assert "Net is another network" in report["absent"]["token merging"]
    page = (out / "comparison.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert any(line.startswith("| 0.6 | random gates, same rates |") for line in rows)
    assert any("Net is another network" in line for line in rows)
    value = next(one for one in report["peers"] if one["name"] == "random")
    assert f"| {100 * value['metric']:.2f} | {100 * value['difference']:+.2f} (" in page and "points" in page
    assert re.search(r"dense accuracy \d+\.\d\d %", page) and "budget 0.01: " in page
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = run(*arguments, "--budgets", "0.6", "--no-prune").stdout
    assert "Peers at equal cost" in text and "static+look" in text and "pruned" not in text
    assert re.search(r"random +\d+\.\d % +\d+\.\d %", text)  # cost and accuracy alike


@pytest.mark.parametrize("name", ["gated", "gated, healed"])
def test_the_picture_shows_the_gated_model_on_top(name: str) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from surgery.scripts import report_figures

    same = [{"cost": 0.6, "metric": 90.0, "time": 0.7}]
    figure = Figure()
    report_figures.tradeoff(
        dict.fromkeys((name, "static", "static+look", "random", "shuffled"), same), same[0], "accuracy", 1
    )(figure, False)
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        assert max(lines.values(), key=lambda line: line.get_zorder()) is lines[name]
        assert [line.get_zorder() for line in axes.lines].count(lines[name].get_zorder()) == 1
        assert lines["static"].get_color() != lines["static+look"].get_color()


def test_a_picture_without_times_has_one_panel() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from surgery.scripts import report_figures

    for times, panels in (({"time": 0.7}, 2), ({}, 1)):
        figure = Figure()
        report_figures.tradeoff({"gated": [{"cost": 0.6, "metric": 90.0, **times}]}, {"metric": 91.0}, "x", 0)(
            figure, False
        )
        assert len(figure.axes) == panels


@pytest.mark.parametrize("command", ["compare", "report"])
def test_budgets_are_checked_before_the_work(command: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    missing = (command, tmp_path / "no", "--data", "digits", "--out", tmp_path / "new")
    refused = run(*missing, "--budgets", "0.6,60", expect=1).stderr
    assert refused.startswith("BudgetError: ") and "in (0, 1]; got 60" in refused


def test_budgets_out_of_reach_alone_are_an_error(converted: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    common = ("compare", converted, "--data", "digits", "--limit", 64, "--out", out)
    refused = run(*common, "--budgets", "0.01,0.02", expect=1).stderr.replace("\n", " ")
    assert "BudgetError: none of these budgets can be set: budget 0.01 is outside" in refused and "0.02" in refused
    assert not out.exists()
    assert "names none" in run(*common, "--budgets", ",", expect=2).stderr


def test_refuses_options_that_contradict_others(tmp_path: Path) -> None:
    missing = ("compare", tmp_path / "no", "--data", "digits")
    assert "--tune-data, which is not given" in unboxed(run(*missing, "--tune-steps", 5, expect=2).stderr)
    assert "--no-prune leaves out" in unboxed(run(*missing, "--tune-data", "digits", "--no-prune", expect=2).stderr)


def test_writes_into_no_directory_of_others(converted: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "mine.txt").write_text("mine")
    result = run("compare", converted, "--data", "digits", "--out", tmp_path, expect=1)
    assert "holds something else than a comparison" in result.stderr
    result = run("compare", converted, "--data", "digits", "--budgets", "half", expect=2)
    assert "'half' is no number" in result.stderr.replace("\n", " ")
