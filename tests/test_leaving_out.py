"""Harm by leaving out: what it says, and that models without gradients are converted by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subjects import subject
from torch import Tensor, nn
from toys import Stack, gate_all, mlp

import surgery
from surgery.calling import as_batch, read_output
from surgery.context import state_of
from surgery.costs import run
from surgery.errors import SurgeryError
from surgery.gates import iter_gates
from surgery.harm import label_harm
from surgery.labelling import Labeller, why_no_gradient
from surgery.leaving_out import label_by_leaving_out
from surgery.objectives import divergence

C = 16


def stack(**head: Any) -> nn.Module:
    torch.manual_seed(0)
    return Stack(*(mlp(C) for _ in range(5)), head=nn.Linear(C, 4)).eval()


def test_harm_is_how_far_the_output_moves() -> None:
    gated, x = gate_all(stack(), torch.randn(2, C)), torch.randn(8, C)
    batch = as_batch(x)
    labels = label_by_leaving_out(gated, batch)
    assert list(labels) == list(state_of(gated).names)
    with torch.no_grad():
        dense = read_output(run(gated, batch))
        for name, label in labels.items():
            with surgery.force(gated, {name: False}):
                output = read_output(run(gated, batch))
            torch.testing.assert_close(label.harm, divergence(output, dense, batch))
            assert label.harm.shape == (8,) and (label.harm > 0).all()


def test_harm_orders_inputs_like_the_first_order_one() -> None:
    gated, batch = gate_all(stack(), torch.randn(2, C)), as_batch(torch.randn(256, C))
    by_gradient, by_absence = label_harm(gated, batch), label_by_leaving_out(gated, batch)
    found = []
    for name, label in by_gradient.items():
        assert torch.equal(label.features, by_absence[name].features)
        found.append(torch.corrcoef(torch.stack((label.harm.log(), by_absence[name].harm.log())))[0, 1])
    assert torch.stack(found).mean() > 0.2


def test_harm_of_a_sample_is_shared_among_its_real_tokens() -> None:
    one = subject("transformers/bert")
    x = {name: value.clone() for name, value in one.example.items()}
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    x["attention_mask"][0, -2:] = 0
    labels = label_by_leaving_out(one.gated, as_batch(x))
    assert labels
    for name, label in labels.items():
        gate = dict(iter_gates(one.gated))[name]
        assert gate.per_token and label.weights is not None
        assert label.harm.shape == x["input_ids"].shape
        assert (label.harm[0, -2:] == 0).all() and (label.harm[0, :-2] > 0).all()


def test_every_head_is_left_out_by_itself() -> None:
    one = subject("timm/vit_pico")
    sites = surgery.find_sites(one.model, one.example).filter(kind="heads")
    gated, batch = surgery.insert_gates(one.model, sites), as_batch(one.example)
    labels = label_by_leaving_out(gated, batch)
    with torch.no_grad():
        dense = read_output(run(gated, batch))
        for name, gate in list(iter_gates(gated))[:2]:
            count = len(gate.site.units)
            assert count > 1 and labels[name].harm.shape == (batch.size, count)
            others = torch.ones(batch.size, count, dtype=torch.bool)
            others[:, 1] = False
            with surgery.force(gated, {name: others}):
                moved = read_output(run(gated, batch))
            torch.testing.assert_close(labels[name].harm[:, 1], divergence(moved, dense, batch))


class NoBackward(torch.autograd.Function):
    """The identity, without a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Wrapped(nn.Module):
    """A network through which no gradient goes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, stack()
        self.classifier = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.kind == "detach":
            return self.classifier(x.detach())  # type: ignore[no-any-return]
        if self.kind == "no derivative":
            return self.classifier(NoBackward.apply(x))  # type: ignore[no-any-return]
        with torch.no_grad():
            return self.classifier(x)  # type: ignore[no-any-return]


KINDS = ("detach", "no derivative", "no_grad")


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, C) for _ in range(12)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_gradients_is_fitted_and_not_trained(kind: str, data: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = Wrapped(kind).eval()
    gated = surgery.convert(model, 0.6, data=data, second_look=False)
    notes = " ".join(surgery.status(gated).notes)
    assert "not trained, since" in notes and "leaving out each site" in notes
    assert surgery.measure(gated, data, peers=False, speed=()).cost == pytest.approx(0.6, abs=0.03)
    kept = {gate.site.name: gate.router.up.bias.item() for _, gate in iter_gates(gated)}
    assert len({round(value, 3) for value in kept.values()}) > 1  # harm differs between sites
    with torch.no_grad(), surgery.execution(gated, "dense"):
        assert torch.equal(gated(data[0]), model(data[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [{"tune": "train"}, {"tune": "routers"}, {"tune": "oneshot", "heal": "norms"}])
def test_what_needs_gradients_is_refused_there(kind: str, asked: dict[str, Any], data: list[Tensor]) -> None:
    torch.manual_seed(0)
    with pytest.raises(SurgeryError, match="by gradients, and (it cuts off|torch cannot)"):
        surgery.convert(Wrapped(kind).eval(), 0.6, data=data, **asked)


def test_a_backward_pass_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, data: list[Tensor]) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    gated = gate_all(stack(), data[0][:2])
    expected = label_by_leaving_out(gated, as_batch(data[0]))
    monkeypatch.setattr("surgery.labelling.harm_and_unreached", full)
    found = Labeller(gated).label(as_batch(data[0]))
    assert all(torch.equal(found[name].harm, label.harm) for name, label in expected.items())
    assert "does not fit into memory" in " ".join(surgery.status(gated).notes)


def test_a_site_that_reaches_nothing_is_no_reason(data: list[Tensor]) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aside = stack(), Stack(mlp(C))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x), self.aside(x)

    gated = gate_all(Idle().eval(), data[0][:2])
    assert any(name.startswith("aside") for name in state_of(gated).names)
    assert why_no_gradient(gated, as_batch(data[0])) == ""


def test_labels_are_asked_for_by_name(data: list[Tensor]) -> None:
    one, other = (gate_all(stack(), data[0][:2]) for _ in range(2))
    surgery.regress_routers(one, data, labels="first_order")
    surgery.regress_routers(other, data, labels="leave_one_out")
    pairs = list(zip(iter_gates(one), iter_gates(other), strict=True))
    assert not any(torch.equal(a.router.up.weight, b.router.up.weight) for (_, a), (_, b) in pairs)
    with pytest.raises(SurgeryError, match="labels must be one of auto, first_order, leave_one_out"):
        surgery.regress_routers(one, data, labels="second")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="harm_labels must be one of"):
        surgery.Options(harm_labels="second")  # type: ignore[arg-type]


@pytest.mark.parametrize("routers", ["own", "shared"])
def test_levels_come_from_leaving_out(routers: Any) -> None:
    one = subject("timm/vit_pico")
    torch.manual_seed(0)
    data = [one.example + 0.3 * torch.randn_like(one.example) for _ in range(8)]
    plan = surgery.find_sites(one.model, one.example).plan(routers=routers)
    gates = [surgery.insert_gates(one.model, plan) for _ in range(2)]
    surgery.regress_routers(gates[0], data, labels="first_order")
    surgery.regress_routers(gates[1], data)
    labeller = Labeller(gates[1])
    for batch in data:
        labeller.label(as_batch(batch))
    levels = labeller.levels()
    for (name, first), (_, both) in zip(iter_gates(gates[0]), iter_gates(gates[1]), strict=True):
        # the same router but for a constant: scores are logarithms
        torch.testing.assert_close(both.router.up.weight, first.router.up.weight, atol=1e-4, rtol=1e-3)
        shift = both.router.up.bias - first.router.up.bias
        torch.testing.assert_close(shift, levels[name].log(), atol=1e-3, rtol=1e-3)
    assert len({round(float(level), 4) for level in levels.values()}) > 1


def test_a_level_by_hand() -> None:
    gated, batch = gate_all(stack(), torch.randn(2, C)), as_batch(torch.randn(12, C))
    labeller = Labeller(gated)
    labels = labeller.label(batch)
    absent = label_by_leaving_out(gated, batch)
    for name, level in labeller.levels().items():
        expected = absent[name].harm.mean().sqrt() / labels[name].harm.mean()
        torch.testing.assert_close(level, expected.reshape(1))


def test_levels_are_found_from_a_share_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, sizes = gate_all(stack(), torch.randn(2, C)), []

    def counted(gated: nn.Module, batch: Any) -> Any:
        sizes.append(batch.size)
        return label_by_leaving_out(gated, batch)

    monkeypatch.setattr("surgery.labelling.label_by_leaving_out", counted)
    labeller = Labeller(gated)
    for size in (10, 40, 40, 400, 2000, 40):
        labeller.label(as_batch(torch.randn(size, C)))
    assert sizes == [10, 6, 5, 50, 185]  # 16 at least, then an eighth of each, 256 in all


def test_heads_have_a_level_each() -> None:
    one = subject("timm/vit_pico")
    gated = surgery.insert_gates(one.model, surgery.find_sites(one.model, one.example).filter(kind="heads"))
    labeller = Labeller(gated)
    labels = labeller.label(as_batch(one.example))
    for name, level in labeller.levels().items():
        assert level.shape == labels[name].harm.shape[1:] and len(set(level.tolist())) > 1


def test_levels_mend_the_order_of_sites() -> None:
    """A branch whose effects cancel: much at each position, nothing together, which first order cannot see."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            wave = torch.tensor([1.0, -1.0]).repeat(x.shape[1] // 2)[:, None]
            return self.inner(x) * 0 + 5 * wave  # cancels in the mean over positions

    torch.manual_seed(0)
    model = Stack(Cancelling(), mlp(C), head=nn.Linear(C, 4), pool=True).eval()
    data = [torch.randn(32, 6, C) for _ in range(6)]
    sites = surgery.find_sites(model, data[0][:2])
    scores = {}
    for labels in ("first_order", "auto"):
        gated = surgery.insert_gates(model, sites.plan(granularity="sample", skip="identity"))
        surgery.regress_routers(gated, data, labels=labels)  # type: ignore[arg-type]
        with torch.no_grad():
            scores[labels] = [float((gate.scores(data[0]) + gate.offset).mean()) for _, gate in iter_gates(gated)]
    assert scores["first_order"][0] > scores["first_order"][1]  # the branch that does nothing seems to matter most
    assert scores["auto"][0] < scores["auto"][1]
