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
from surgery.conversion import heal_converted
from surgery.costs import run
from surgery.errors import SurgeryError
from surgery.gates import iter_gates
from surgery.harm import harm_and_unreached, label_harm
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
    one, other, by_default = (gate_all(stack(), data[0][:2]) for _ in range(3))
    surgery.regress_routers(one, data, labels="first_order")
    surgery.regress_routers(other, data, labels="leave_one_out")
    surgery.regress_routers(by_default, data)
    pairs = list(zip(iter_gates(one), iter_gates(other), iter_gates(by_default), strict=True))
    assert all(torch.equal(a.router.up.weight, c.router.up.weight) for (_, a), _, (_, c) in pairs)
    assert not any(torch.equal(a.router.up.weight, b.router.up.weight) for (_, a), (_, b), _ in pairs)
    with pytest.raises(SurgeryError, match="labels must be one of auto, first_order, leave_one_out"):
        surgery.regress_routers(one, data, labels="second")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="harm_labels must be one of"):
        surgery.Options(harm_labels="second")  # type: ignore[arg-type]


class HalfCut(nn.Module):
    """A network of which the first half is run without gradients, as frozen extractors often are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = Stack(*(mlp(C) for _ in range(3))), Stack(*(mlp(C) for _ in range(3)))
        self.head = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.head(self.last(x))  # type: ignore[no-any-return]


def test_a_gradient_that_is_cut_midway(data: list[Tensor]) -> None:
    model = HalfCut().eval()
    gated = gate_all(model, data[0][:2])
    first = [name for name in state_of(gated).names if name.startswith("first")]
    labels = label_harm(gated, as_batch(data[0]))
    assert len(first) == 3 and all((labels[name].harm == 0).all() for name in first)
    assert f"cuts off the gradient of {first[0]} and 2 more sites" in why_no_gradient(gated, as_batch(data[0]))
    converted = surgery.convert(model, 0.6, data=data, second_look=False)
    assert surgery.measure(converted, data, peers=False, speed=()).cost == pytest.approx(0.6, abs=0.03)
    assert "not trained, since it cuts off" in " ".join(surgery.status(converted).notes)


def test_training_itself_refuses_a_network_without_gradients(data: list[Tensor]) -> None:
    gated = surgery.convert(Wrapped("detach").eval(), 0.6, data=data, second_look=False)
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    with pytest.raises(SurgeryError, match="no gradient of the output reaches a gate"):
        surgery.train_routers(gated, data, budget=0.6, options=surgery.Options(steps=2))
    with pytest.raises(SurgeryError, match="healing learns by gradients"):
        heal_converted(gated, data, "norms", options=surgery.Options(steps=2))
    assert all(torch.equal(value, before[name]) for name, value in gated.state_dict().items())


def test_no_batch_is_labelled_twice(data: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    count = []

    def counted(*args: Any) -> Any:
        count.append(args)
        return harm_and_unreached(*args)

    monkeypatch.setattr("surgery.labelling.harm_and_unreached", counted)
    monkeypatch.setattr("surgery.harm.harm_and_unreached", counted)
    surgery.regress_routers(gate_all(stack(), data[0][:2]), data)
    assert len(count) == len(data)


@pytest.mark.parametrize("tune", ["oneshot", "train"])
def test_convert_passes_the_labels_on(tune: Any, data: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fit(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["labels"])
        return surgery.regress_routers(*args, **kwargs)

    monkeypatch.setattr("surgery.conversion.regress_routers", fit)
    for options in (surgery.Options(steps=1), surgery.Options(steps=1, harm_labels="leave_one_out")):
        surgery.convert(stack(), 0.7, data=data, second_look=False, tune=tune, options=options)
    assert seen == ["auto", "leave_one_out"]
