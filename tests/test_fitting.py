"""Skip paths fitted on networks whose best skip path is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import (
    Masked,
    Noise,
    Residual,
    Set,
    Stack,
    Times,
    Where,
    assert_same,
    assert_silent_yet_learns,
    frozen,
    gate_all,
    gates,
    mlp,
    path_of,
)

import surgery
from surgery.calling import Batch
from surgery.context import state_of
from surgery.cutting import cut_order
from surgery.errors import DataError, SurgeryError
from surgery.fitting import fit_skip_paths, gather
from surgery.gates import iter_gates
from surgery.skip_paths import LinearSkip
from surgery.solving import Around, fit_one
from surgery.training import trainable

C = 6


def weak(rank: int = C) -> nn.Module:
    """A linear branch."""
    return nn.Sequential(nn.Linear(C, rank), nn.Linear(rank, C))


@torch.no_grad()
def gap(gated: nn.Module, model: nn.Module, *args: Any) -> float:
    """Largest difference from the dense model, all gates closed, per largest value."""
    with surgery.force(gated, 0.0):
        closed = gated(*args)
    return float((closed - model(*args)).abs().max() / model(*args).abs().max())


@pytest.mark.parametrize("shape", [(C,), (5, C)], ids=["NC", "NTC"])
@pytest.mark.parametrize("plan", [{"skip": "linear"}, {"skip": "low-rank", "rank": 2}], ids=["linear", "low-rank"])
def test_linear_branches_are_reproduced(shape: tuple[int, ...], plan: dict[str, Any]) -> None:
    model = Stack(weak(2), weak(2), weak(2), head=nn.Linear(C, 3))
    data = [torch.randn(64, *shape) for _ in range(4)]
    gated = gate_all(model, data[0][:2], **plan)
    assert gap(gated, model, data[0]) > 0.05
    left = fit_skip_paths(gated, data)
    assert list(left) == [name for name, _ in iter_gates(gated)] and max(left.values()) < 1e-3
    assert gap(gated, model, torch.randn(16, *shape)) < 1e-3


def test_linear_branches_on_feature_maps() -> None:
    model = Stack(nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1), head=nn.Conv2d(C, 2, 3))
    gated = gate_all(model, torch.randn(2, C, 5, 5), skip="linear")
    assert [gate.site.layout for gate in gates(gated)] == ["NCHW", "NCHW"]
    fit_skip_paths(gated, [torch.randn(32, C, 5, 5)])
    assert gap(gated, model, torch.randn(4, C, 5, 5)) < 1e-3


def test_depthwise_paths_see_neighbours_and_the_edge() -> None:
    kernel = torch.randn(C, 1, 3, 3)
    kernel[:, 0, 1, 1] += 3
    branch = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False), nn.Conv2d(C, C, 1))
    branch[0].weight.data.copy_(kernel)
    model = Stack(branch, head=nn.Conv2d(C, 2, 3))
    data = [torch.randn(64, C, 5, 6)]
    left = {}
    for skip in ("linear", "depthwise"):
        gated = gate_all(model, data[0][:2], skip=skip)
        left[skip] = fit_skip_paths(gated, data).popitem()[1]
    assert gates(gated)[0].skip_path.kind == "depthwise"
    assert left["depthwise"] < 1e-2 < left["linear"]
    costs = state_of(gated).costs.sites[gates(gated)[0].site.name]
    assert costs.skip == 2 * 30 * (9 * C + C * C)  # 30 positions


def test_depthwise_is_linear_where_nothing_has_neighbours() -> None:
    gated = gate_all(Stack(weak()), torch.randn(2, 5, C), skip="depthwise")
    assert [gate.skip_path.kind for gate in gates(gated)] == ["linear"]


@pytest.mark.parametrize("layout", ["NCHW", "NTC"])
def test_per_channel_branches_are_affine(layout: str) -> None:
    if layout == "NCHW":
        model = Stack(*(nn.Conv2d(C, C, 1, groups=C) for _ in range(3)))
        shape: tuple[int, ...] = (C, 4, 4)
    else:
        model, shape = Stack(*(Times(torch.diag(torch.rand(C))) for _ in range(3))), (7, C)
    gated = gate_all(model, torch.randn(2, *shape), skip="affine")
    assert gap(gated, model, torch.randn(4, *shape)) > 0.05
    left = fit_skip_paths(gated, [torch.randn(64, *shape)])
    assert len(left) == 3 and gap(gated, model, torch.randn(4, *shape)) < 1e-3


def test_later_maps_repair_what_earlier_ones_miss() -> None:
    """The first skip path cannot mix channels; the second one, whose own branch adds nothing, does it instead."""
    shares = []
    for _ in range(4):  # of other weights each: one alone says little
        model = Stack(Times(0.3 * torch.randn(C, C)), Times(torch.zeros(C, C)))
        sites = surgery.find_sites(model, torch.randn(2, C))
        first, second = sites.plan(skip="affine").sites[0], sites.plan(skip="linear").sites[1]
        gated = surgery.insert_gates(model, dataclasses.replace(sites.plan(), sites=(first, second)))
        data = [torch.randn(512, C)]
        fit_skip_paths(gated, data)
        repaired = gap(gated, model, data[0])
        with torch.no_grad():
            for parameter in gates(gated)[1].skip_path.parameters():
                parameter.zero_()  # what a fit to the dense stream would give
        shares.append(repaired / gap(gated, model, data[0]))
    assert sum(shares) / len(shares) < 0.8


def test_padding_is_not_fitted_on() -> None:
    # at real tokens (positive) the branch is linear; at padding (negative) it is zero
    inner = nn.Sequential(nn.ReLU(), nn.Linear(C, C, bias=False))
    model = Masked(inner)
    x = torch.rand(64, 8, C) + 0.1
    mask = torch.arange(8) < torch.randint(2, 9, (64, 1))
    x = torch.where(mask[..., None], x, -10 * x)
    batch = {"inputs_embeds": x, "attention_mask": mask.long()}
    gated = gate_all(model, batch, skip="linear")
    fit_skip_paths(gated, [batch])
    with torch.no_grad(), surgery.force(gated, 0.0):
        difference = gated(**batch) - model(**batch)
    assert difference[mask].abs().max() < 1e-3
    assert difference[~mask].abs().max() > 0.1


def test_what_is_worse_than_nothing_is_reset() -> None:
    path = LinearSkip(16, "NTC")
    nn.init.ones_(path.weight)
    nn.init.ones_(path.bias)
    x, noise = torch.randn(4, 10, 16), torch.randn(4, 10, 16)  # 32 rows to fit 17 numbers each: pure overfitting
    with torch.no_grad():
        left = fit_one(path, [Around(x, x + noise, x, torch.ones(4, 10, dtype=torch.bool))], 1e-4)
    assert left == 1.0
    assert not path.weight.any() and not path.bias.any()


@pytest.mark.parametrize("problem", ["noise", "too large", "no number", "too few rows"])
@pytest.mark.parametrize("kind", ["affine", "low-rank", "depthwise"])
def test_what_was_reset_or_never_fitted_can_be_trained(kind: str, problem: str) -> None:
    layout, shape = ("NCHW", (4, 16, 3, 3)) if kind == "depthwise" else ("NTC", (4, 10, 16))
    path, x, noise = path_of(kind, 16, layout, 8), torch.randn(shape), torch.randn(shape)
    rows = torch.ones((4, 3, 3) if kind == "depthwise" else (4, 10), dtype=torch.bool)
    if problem == "too large":
        x, noise = 1e30 * x, 1e30 * noise
    elif problem == "no number" and kind == "depthwise":
        noise[:] = torch.nan
    elif problem == "too few rows":
        rows.flatten()[31:] = False
    with torch.no_grad():
        assert fit_one(path, [Around(x, x + noise, x, rows)], 1e-4) == 1.0
    assert_silent_yet_learns(path, torch.randn(shape))


@pytest.mark.parametrize("kind", ["affine", "linear", "low-rank", "depthwise"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_that_are_no_numbers_are_left_out(kind: str, value: float) -> None:
    """Of 100 samples one overflows: the map is that of the other 99."""
    maps = kind == "depthwise"
    path = path_of(kind, 4, "NCHW" if maps else "NTC", 2)
    x = torch.randn((100, 4, 3, 3) if maps else (100, 9, 4))
    wanted = x * torch.tensor([-1.0, 3.0, 1.0, 1.0]).view((4, 1, 1) if maps else (4,))
    x[7], wanted[7] = value, value
    rows = torch.ones((100, 3, 3) if maps else (100, 9), dtype=torch.bool)
    with torch.no_grad():
        assert fit_one(path, [Around(x, wanted, x, rows)], 1e-4) < 1e-3
    assert all(parameter.isfinite().all() for parameter in path.parameters())


def test_narrow_paths_leave_out_samples_that_are_no_numbers() -> None:
    model = Stack(mlp(C))
    x = torch.randn(200, C)
    x[::50] = 1e38  # finite, but what the branch makes of it is not
    gated = gate_all(model, torch.randn(2, C), skip="narrow", width=0.5)
    (left,) = fit_skip_paths(gated, [x]).values()
    assert left < 0.9 and all(p.isfinite().all() for _, gate in iter_gates(gated) for p in gate.skip_path.parameters())


def test_unpredictable_branch_is_reported_as_it_is() -> None:
    model = Stack(Noise(C, 0.1), weak())
    gated = gate_all(model, torch.randn(2, C), skip="linear")
    noise, linear = fit_skip_paths(gated, [torch.randn(400, C)]).values()
    assert noise > 0.8 and linear < 0.8


def test_what_is_left_is_the_share_of_the_error() -> None:
    path = LinearSkip(2, "NCHW")  # judged without LayerNorm
    x = torch.randn(400, 2, 1, 1)
    wanted = torch.cat((2 * x[:, :1], 3 * torch.randn(400, 1, 1, 1)), 1)  # variances 4 (predictable) and 9 (not)
    with torch.no_grad():
        left = fit_one(path, [Around(x, wanted, None, torch.ones(400, 1, 1, dtype=torch.bool))], 1e-4)
    assert left == pytest.approx(9 / 13, abs=0.1)


def test_nothing_else_changes() -> None:
    model = Stack(mlp(C), mlp(C), head=nn.Linear(C, 3))
    gated = gate_all(model, torch.randn(2, C), skip="affine")
    ours = trainable(gated)
    before, original = frozen(gated), frozen(model)
    fit_skip_paths(gated, [torch.randn(64, C)])
    assert_same(frozen(gated), {n: v for n, v in before.items() if n not in ours or "router" in n})
    assert_same(frozen(model), original)
    assert not gated.training


def test_routed_fits_what_the_routers_skip() -> None:
    positive, negative = torch.randn(C, C), torch.randn(C, C)
    model = Stack(Where(positive, negative))
    data = [torch.randn(512, C)]
    gated = gate_all(model, data[0][:2], skip="linear")
    (gate,) = gates(gated)
    gate.router = Set()  # type: ignore[assignment]  # closed where the first channel is not positive
    state_of(gated).threshold = 0.0
    fit_skip_paths(gated, data)
    assert isinstance(gate.skip_path, LinearSkip) and (gate.skip_path.weight - negative).abs().max() > 0.1
    fit_skip_paths(gated, data, decisions="routed")
    torch.testing.assert_close(gate.skip_path.weight.data, negative, atol=1e-2, rtol=0)


def test_same_seed_same_maps() -> None:
    model = Stack(mlp(C), mlp(C))
    data = [torch.randn(64, 5, C)]

    def fit(seed: int) -> dict[str, Tensor]:
        gated = gate_all(model, data[0][:2], skip="affine")
        fit_skip_paths(gated, data, seed=seed)
        return {n: v for n, v in frozen(gated).items() if "skip_path" in n}

    one = fit(0)
    assert_same(fit(0), one)
    with pytest.raises(AssertionError):
        assert_same(fit(1), one)


def test_a_stream_of_another_dtype() -> None:
    model = Stack(weak(), weak()).bfloat16()
    gated = gate_all(model, torch.randn(2, C).bfloat16(), skip="linear")
    fit_skip_paths(gated, [torch.randn(256, C)])
    assert gap(gated, model, torch.randn(16, C).bfloat16()) < 0.05


def test_identity_paths_have_nothing_to_fit() -> None:
    gated = gate_all(Stack(mlp(C)), torch.randn(2, C), skip="identity")
    assert fit_skip_paths(gated, [torch.randn(64, C)]) == {}


def test_progress_counts_sites() -> None:
    gated = gate_all(Stack(mlp(C), mlp(C)), torch.randn(2, C))
    seen: list[tuple[int, int | None]] = []
    fit_skip_paths(gated, [torch.randn(64, C)], progress=lambda _, done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_no_data() -> None:
    gated = gate_all(Stack(mlp(C)), torch.randn(2, C))
    with pytest.raises(DataError, match="no batch"):
        fit_skip_paths(gated, [])


def test_gather_pads_tokens_at_the_end_and_drops_labels() -> None:
    def text(rows: int, length: int) -> dict[str, Tensor]:
        ids = torch.full((rows, length), length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows)}

    batch = gather([text(2, 3), text(2, 5), text(2, 4)], 5)
    assert batch.size == 5 and batch.labels is None
    assert batch.kwargs["input_ids"].tolist() == [[3, 3, 3, 0, 0]] * 2 + [[5] * 5] * 2 + [[4, 4, 4, 4, 0]]
    assert torch.equal(batch.kwargs["attention_mask"] > 0, batch.kwargs["input_ids"] > 0)


def test_gather_reads_no_further_than_it_must() -> None:
    read: list[int] = []

    def data() -> Any:
        for index in range(10):
            read.append(index)
            yield torch.full((4, 2), float(index)), torch.zeros(4, dtype=torch.long)

    batch = gather(data(), 6)
    assert batch.args[0][:, 0].tolist() == [0, 0, 0, 0, 1, 1] and read == [0, 1]


def test_gather_stops_where_batches_cannot_be_joined() -> None:
    assert gather([torch.zeros(2, 3), torch.zeros(2, 4)], 9).size == 2
    assert gather([{"input_ids": torch.ones(2, 3).long()}, {"input_ids": torch.ones(2, 4).long()}], 9).size == 2
    assert gather([Batch((torch.zeros(2, 3),)), torch.zeros(2, 3)], 9).size == 4
    with pytest.raises(DataError, match="no batch"):
        gather([], 4)


def test_residual_toy_is_what_it_says() -> None:
    assert torch.equal(Residual(nn.Identity())(torch.ones(2)), torch.full((2,), 2.0))


def test_what_is_decided_is_named() -> None:
    data = [torch.randn(16, 5, C) for _ in range(4)]
    gated = gate_all(Stack(mlp(C), mlp(C), head=nn.Linear(C, 3)), data[0], skip="affine")
    before = frozen(gated)
    with pytest.raises(SurgeryError, match="decisions must be one of random, routed, nested; got 'bogus'"):
        fit_skip_paths(gated, data, decisions="bogus")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="'nested' go by a cut order of whole sites; measure one first"):
        fit_skip_paths(gated, data, decisions="nested")
    assert_same(frozen(gated), before)


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_nested_cuts_of_samples_and_of_all_their_tokens(granularity: str) -> None:
    data = [torch.randn(16, 5, C) for _ in range(4)]
    gated = gate_all(Stack(weak(2), weak(2), head=nn.Linear(C, 3)), data[0], skip="linear", granularity=granularity)
    cut_order(gated, data)
    assert max(fit_skip_paths(gated, data, decisions="nested").values()) < 1e-3


def test_nested_cuts_know_no_heads() -> None:
    import timm

    torch.manual_seed(0)
    model, data = timm.create_model("test_vit", num_classes=5).eval(), [torch.randn(4, 3, 160, 160)]
    sites = surgery.find_sites(model, data[0]).filter(kind=["heads", "mlp"])
    gated = surgery.insert_gates(model, sites.plan(granularity="sample", skip="affine"))
    cut_order(gated, data, samples=4)
    with pytest.raises(SurgeryError, match="without heads, which are cut one by one"):
        fit_skip_paths(gated, data, decisions="nested")
