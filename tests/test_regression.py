"""Routers that learn what can be learned, and stay quiet about the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from toys import Divided, Masked, Noise, Sometimes, Stack, assert_same, frozen, gate_all, gates, mlp

from surgery import regression
from surgery.calling import Batch
from surgery.context import state_of
from surgery.errors import DataError
from surgery.harm import label_harm
from surgery.regression import regress_routers, set_offset
from surgery.routers import SampleRouter

C = 6


class Selective(nn.Module):
    """Adds the more, the larger the first channel is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(C, 1), nn.Linear(C, C, bias=False)
        with torch.no_grad():
            self.gate.weight.zero_()[0, 0] = 2.0
            self.gate.bias.zero_()
            self.value.weight.zero_()
            self.value.bias = nn.Parameter(torch.linspace(-1, 1, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).exp() * self.value(x)


def log_harm(gated: nn.Module, x: Tensor) -> list[Tensor]:
    """Labels on fresh inputs."""
    return [label.harm.clamp_min(1e-6).log() for label in label_harm(gated, Batch((x,))).values()]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


@pytest.mark.parametrize("shape", [(C,), (5, C)], ids=["per sample", "per token"])
def test_planted_harm_is_learned(shape: tuple[int, ...]) -> None:
    model = Stack(Selective(), head=nn.Linear(C, 2), pool=len(shape) > 1)
    data = [torch.randn(128, *shape) for _ in range(6)]
    gated = gate_all(model, data[0][:2], skip="affine")
    (gate,) = gates(gated)
    assert gate.per_token == (len(shape) > 1)
    (found,) = regress_routers(gated, data).values()
    assert found.correlation > 0.8 and found.shrinkage > 0.7
    rows = 768 * (5 if gate.per_token else 1)
    assert found.rows == rows - rows // 5
    x = torch.randn(200, *shape)
    with torch.no_grad():
        scores = gate.scores(x) + gate.offset
    (expected,) = log_harm(gated, x)
    assert correlation(scores, expected) > 0.8
    assert float(scores.mean()) == pytest.approx(float(expected.mean()), abs=0.3)  # in units of log harm


def test_planted_harm_on_feature_maps_is_learned() -> None:
    """Samples differ in contrast; the harm of the branch grows with it."""
    inner = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    model = Stack(inner, pool=True)
    data = [torch.randn(64, 2, 6, 6) * torch.rand(64, 1, 1, 1).mul(4).exp() for _ in range(6)]
    gated = gate_all(model, data[0][:2])
    (found,) = regress_routers(gated, data).values()
    (gate,) = gates(gated)
    assert found.correlation > 0.8
    router = gate.router
    assert isinstance(router, SampleRouter)
    pooled = torch.cat([router.pool(x) for x in data])
    torch.testing.assert_close(router.mean, pooled.mean(0))
    assert router.std.min() > 0 and not torch.equal(router.std, torch.ones_like(router.std))


def test_unpredictable_harm_shrinks_to_a_constant() -> None:
    model = Stack(Noise(C), head=nn.Linear(C, 2))
    data = [torch.randn(128, C) for _ in range(6)]
    gated = gate_all(model, data[0][:2])
    (found,) = regress_routers(gated, data).values()
    assert abs(found.correlation) < 0.3 and found.shrinkage < 0.2
    x = torch.randn(300, C)
    with torch.no_grad():
        scores = gates(gated)[0].scores(x)
    (expected,) = log_harm(gated, x)
    assert scores.std() < 0.25 * expected.std()


def test_offsets_are_log_savings() -> None:
    gated = gate_all(Stack(mlp(C), mlp(C, 8), pool=True), torch.randn(2, 5, C), skip="affine")
    regress_routers(gated, [torch.randn(8, 5, C)])
    # per token: 2 * 2 * C * hidden for the branch, 2 * C for the skip path; the head is an identity
    dense = 5 * 4 * C * (4 * C + 8)
    for gate, hidden in zip(gates(gated), (4 * C, 8), strict=True):
        assert gate.per_token and gate.offset == pytest.approx(math.log((4 * C * hidden - 2 * C) / dense))
    one = gate_all(Stack(mlp(C)), torch.randn(2, C), skip="identity")
    set_offset(gates(one)[0])
    assert gates(one)[0].offset == pytest.approx(0.0)  # all that there is


def test_a_skip_path_that_saves_nothing_keeps_its_branch() -> None:
    gated = gate_all(Stack(nn.Linear(C, C)), torch.randn(2, C), skip="linear")
    (gate,) = gates(gated)
    set_offset(gate)
    assert -gate.offset > 25 and math.isfinite(gate.offset)


def test_only_routers_change() -> None:
    model = Stack(mlp(C), mlp(C), head=nn.Linear(C, 3))
    gated = gate_all(model, torch.randn(2, C))
    before, original = frozen(gated), frozen(model)
    regress_routers(gated, [torch.randn(64, C)])
    assert_same(frozen(gated), {n: v for n, v in before.items() if "router" not in n})
    assert_same(frozen(model), original)
    assert all(not torch.equal(v, before[n]) for n, v in frozen(gated).items() if "router" in n)
    assert all(p.grad is None for n, p in gated.named_parameters() if "router" not in n)


def test_padding_is_not_learned_from() -> None:
    batch = {"inputs_embeds": torch.randn(16, 6, C), "attention_mask": (torch.arange(6) < 3).long().repeat(16, 1)}
    gated = gate_all(Masked(mlp(C)), batch)
    (found,) = regress_routers(gated, [batch]).values()
    assert found.rows == 16 * 3 - 16 * 3 // 5


def test_reads_no_more_than_asked() -> None:
    read: list[int] = []

    def data() -> Iterator[Tensor]:
        for index in range(9):
            read.append(index)
            yield torch.randn(10, C)

    gated = gate_all(Stack(mlp(C)), torch.randn(2, C))
    seen: list[tuple[str, int, int | None]] = []
    regress_routers(gated, data(), samples=25, progress=lambda *row: seen.append(row))
    assert read == [0, 1, 2]
    assert seen == [*(("labelling harm", n, 25) for n in (10, 20, 25)), ("fitting routers", 1, 1)]


def test_of_many_rows_all_batches_keep_some(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [torch.full((40, C), float(number)) for number in range(10)]
    gated = gate_all(Stack(mlp(C)), data[0][:2])
    kept: list[Tensor] = []
    fit = regression._fit_group
    monkeypatch.setattr(regression, "_ROWS", 100)
    monkeypatch.setattr(
        regression, "_fit_group", lambda gates, rows, *rest: (kept.append(rows), fit(gates, rows, *rest))[1]
    )
    for seed in (0, 0, 1):
        (found,) = regress_routers(gated, data, seed=seed).values()
        assert found.rows == 80
    counts = kept[0][:, 0].long().bincount(minlength=10)
    assert len(kept[0]) == 100 and counts.min() >= 4 and counts.max() <= 17
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_same_seed_same_routers() -> None:
    model, data = Stack(mlp(C)), [torch.randn(64, C)]

    def fit(seed: int) -> dict[str, Tensor]:
        gated = gate_all(model, data[0][:2])
        regress_routers(gated, data, seed=seed)
        return {n: v for n, v in frozen(gated).items() if "router" in n}

    one = fit(0)
    torch.randn(3)
    assert_same(fit(0), one)
    assert not torch.equal(
        fit(1)["blocks.0.surgery_gates.inner.router.down.weight"],
        one["blocks.0.surgery_gates.inner.router.down.weight"],
    )


@pytest.mark.parametrize("rows", [1, 2, 9, 10])
def test_very_little_data_gives_finite_routers(rows: int) -> None:
    gated = gate_all(Stack(mlp(C), head=nn.Linear(C, 2)), torch.randn(2, C))
    x = torch.randn(rows, C)
    (found,) = regress_routers(gated, [x]).values()
    (gate,) = gates(gated)
    with torch.no_grad():
        scores = gate.scores(x) + gate.offset
    assert torch.isfinite(scores).all() and 0 <= found.shrinkage <= 1
    (expected,) = log_harm(gated, x)
    assert float(expected.min()) - 1 < float(scores.mean()) < float(expected.max()) + 1
    assert math.isinf(state_of(gated).threshold)  # still dense


def test_branches_without_effect_give_constant_routers() -> None:
    model = Stack(mlp(C), head=nn.Linear(C, 2))
    with torch.no_grad():
        for parameter in model.blocks[0].parameters():
            parameter.zero_()
    gated = gate_all(model, torch.randn(2, C))
    (found,) = regress_routers(gated, [torch.randn(64, C)]).values()
    with torch.no_grad():
        scores = gates(gated)[0].scores(torch.randn(32, C))
    assert found.shrinkage <= 0.01 and torch.isfinite(scores).all() and scores.std() < 1e-3


@pytest.mark.parametrize("shape", [(C,), (3, C)], ids=["per sample", "per token"])
def test_rows_whose_harm_is_no_number_are_left_out(shape: tuple[int, ...]) -> None:
    gated = gate_all(Divided(mlp(C), mlp(C)), torch.randn(2, *shape))
    x, bad = torch.randn(40, *shape), torch.zeros(2, *shape)
    found = regress_routers(gated, [torch.cat((bad, x))])
    assert all(torch.isfinite(p).all() for gate in gates(gated) for p in gate.router.parameters())
    rows = 2 * (1 if len(shape) == 1 else 3)
    assert state_of(gated).notes[-1].startswith(f"{rows} rows were not learned from")
    assert [one.rows for one in found.values()] == [int(40 * rows / 2 * 0.8)] * 2
    with pytest.raises(DataError, match=r"blocks\.0.*NaN or infinite for every input"):
        regress_routers(gated, [bad])


def test_a_branch_that_never_runs_is_named() -> None:
    gated = gate_all(Sometimes(C).eval(), {"x": torch.randn(4, C), "more": torch.randn(4, C)})
    with pytest.raises(DataError, match="sometimes: it ran for the example, but for none of the data"):
        regress_routers(gated, [torch.randn(8, C) for _ in range(4)])


def test_no_data() -> None:
    gated = gate_all(Stack(mlp(C)), torch.randn(2, C))
    with pytest.raises(DataError, match="no batch"):
        regress_routers(gated, [])
