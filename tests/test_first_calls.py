"""Calls in a way that was not seen when sites were found, and modules that were changed after gates were inserted."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_equal, outputs
from torch import Tensor, nn
from tracing_toys import Base, C, N, T, convert, tokens

import surgery


class Mode(Enum):
    SAME = 1
    DOUBLE = 2


class Asking(Base):
    """Asks Python what its argument is; `gains`: and what it has, which a traced argument always says it does."""

    def __init__(self, gains: bool = False) -> None:
        super().__init__()
        self.gains = gains

    def forward(self, x: Tensor, m: Any = None) -> Tensor:
        y = self.mlp(self.norm(x))
        if isinstance(m, (Tensor, int)) or type(m) is float:
            y = y * m
        elif m is Mode.DOUBLE:
            y = y * 2
        elif isinstance(m, dict) and "m" in m:
            y = y * 3
        elif self.gains and hasattr(m, "gain"):
            y = y * m.gain
        return x + y


class Gain:
    gain = 4.0


@dataclass(slots=True)
class Slotted:
    gain: float
    further: Tensor


WAYS: dict[str, Any] = {
    "tensor": torch.rand(C),
    "float": 2.0,
    "int": 3,
    "bool": True,
    "enum": Mode.DOUBLE,
    "dict": {"m": 1},
    "has": Gain(),
    "has, in slots": Slotted(5.0, torch.rand(2)),
    "has not": object(),
}


@pytest.mark.parametrize("way", WAYS)
def test_questions_about_an_argument_are_answered_as_in_the_original(way: str) -> None:
    x, toy = tokens(), Asking(gains=way.startswith("has"))
    _, gated = convert(toy, x)
    with surgery.force(gated, 1.0):
        for value in (None, WAYS[way], WAYS[way]):
            assert_equal([gated(x, value)], [toy(x, value)])


def test_every_class_of_an_argument_and_every_member_is_looked_at() -> None:
    x, toy = tokens(), Asking(gains=True)
    _, gated = convert(toy, x)
    with surgery.force(gated, 1.0):
        for value in (object(), Gain(), {"m": 1}, Mode.SAME, Mode.DOUBLE, 1.0, object()):
            assert_equal([gated(x, value)], [toy(x, value)])
    with surgery.force(gated, 0.0):
        assert_equal([gated(x, Gain())], [x])  # what was traced is right for it
        assert_equal([gated(x, object())], [toy(x, object())])


def test_a_wrong_program_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    x, toy = tokens(), Asking()
    _, gated = convert(toy, x)
    with surgery.force(gated, 0.0):
        for _ in range(3):
            assert_equal([gated(x, Mode.DOUBLE)], [toy(x, Mode.DOUBLE)])
    assert caplog.text.count("traced code is wrong") == 1


class Noticing(nn.Module):
    """Counts in a buffer, in a number and in a list, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)
        self.count, self.log = 0, [0]
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log.append(self.count)
        self.calls += 1
        return self.map(x) * torch.rand(())


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Noticing()

    def forward(self, x: Tensor, store: list[Tensor], m: Tensor | None = None) -> Tensor:
        store.append(x)
        y = self.inner(x)
        return x + (y if m is None else y * m)


class Fixed(Noticing):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log.append(self.count)
        self.calls += 1
        return self.map(x)


def test_comparing_leaves_no_trace() -> None:
    x, toy = tokens(), Optional()
    toy.inner = Fixed()
    _, gated = convert(toy, x, [])
    toy.inner = Noticing()
    gated.inner.__class__ = Noticing
    fired: list[int] = []
    gated.inner.register_forward_hook(lambda *_: fired.append(1))
    before = gated.inner.count, len(gated.inner.log), float(gated.inner.calls)
    store: list[Tensor] = []
    torch.manual_seed(0)
    with surgery.force(gated, 1.0):
        gated(x, store, torch.rand(C))
    after = torch.rand(())
    torch.manual_seed(0)
    torch.rand(C), torch.rand(())
    assert torch.equal(after, torch.rand(()))
    assert len(store) == len(fired) == 1
    assert (gated.inner.count, len(gated.inner.log), float(gated.inner.calls)) == tuple(n + 1 for n in before)


# -- attributes -------------------------------------------------------------------------------------------------------


class Scaled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.ways, self.gain = 1.0, ["once"], None

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(x)) * self.scale
        y = y if "once" in self.ways else y * 2
        return x + (y if self.gain is None else y * self.gain)


def test_attributes_may_be_set_after_gates_were_inserted() -> None:
    x, toy = tokens(), nn.Sequential(Scaled(), Scaled())
    _, gated = convert(toy, x)
    twin = copy.deepcopy(gated)
    for model in (toy, gated):
        model[0].scale = 0.25
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, x), outputs(toy, x))
        for model in (toy, gated):
            model[0].ways.clear()
            model[1].gain = 2.0
        assert_equal(outputs(gated, x), outputs(toy, x))
        for model in (toy, gated):
            model[1].gain = torch.rand(()) if model is toy else toy[1].gain
        assert_equal(outputs(gated, x), outputs(toy, x))
        made = len(type(gated[0])._surgery_programs.sources)
        gated(x)
        assert len(type(gated[0])._surgery_programs.sources) == made == 3
    for part in toy:
        part.scale, part.ways, part.gain = 1.0, ["once"], None
    with surgery.force(twin, 1.0):
        assert_equal(outputs(twin, x), outputs(toy, x))
    with surgery.force(gated, 0.0):
        assert_equal([gated[0](x)], [x])
        assert not torch.equal(gated[1](x), x)  # a tensor that is no buffer cannot be traced


def test_endless_attributes_run_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("surgery.programs.MOST", 2)
    x, toy = tokens(), Scaled()
    _, gated = convert(toy, x)
    for scale in (1.0, 2.0, 3.0, 4.0):
        toy.scale = gated.scale = scale
        with surgery.force(gated, 0.0):
            assert_equal(outputs(gated, x), [x] if scale < 3 else outputs(toy, x))
    assert caplog.text.count("attributes were changed more than 2 times") == 1


# -- modules that were traced through ----------------------------------------------------------------------------------


class Output(nn.Module):
    """A sum whose residual is open, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.map(hidden) + x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.output = nn.Linear(C, C), Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.first(x), x)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return 2 * self.inner(*args)


def hook(output: Any) -> None:
    output.register_forward_hook(lambda module, inputs, result: 2 * result)


def pre_hook(output: Any) -> None:
    output.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], inputs[1]))


def patch(output: Any) -> None:
    output.forward = lambda hidden, x: 2 * x


@pytest.mark.parametrize("change", [hook, pre_hook, patch, Wrapped])
def test_what_is_done_to_a_module_that_was_traced_through_counts(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    x, toy = tokens(), nn.Sequential(Layer(), Layer())
    _, gated = convert(toy, x)
    assert type(gated[0])._surgery_programs.inlined == {"output"}
    for model in (toy, gated):
        changed = change(model[0].output)
        if changed is not None:
            model[0].output = changed
    with surgery.force(gated, 1.0):
        for _ in range(2):
            assert_equal(outputs(gated, x), outputs(toy, x))
    assert caplog.text.count("was changed after gates were inserted") == 1
    with surgery.force(gated, 0.0):
        assert_equal([gated[1](x)], [x])


# -- masks of torch's own transformer ----------------------------------------------------------------------------------

PADDING = torch.arange(T) >= torch.tensor([T, T - 1, T - 2])[:N, None]
CAUSAL = torch.ones(T, T).triu(1).bool()
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "float padding": {"src_key_padding_mask": torch.zeros(N, T).masked_fill(PADDING, -1e9)},
    "mask": {"mask": CAUSAL},
    "float mask": {"mask": torch.randn(T, T)},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDING},
}


@pytest.mark.parametrize("found_with", MASKS)
def test_masks_of_a_transformer_encoder(found_with: str, caplog: pytest.LogCaptureFixture) -> None:
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds differently
    try:
        x, layer = tokens(), nn.TransformerEncoderLayer(C, 2, 2 * C, batch_first=True, norm_first=True)
        toy = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
        sites, gated = convert(toy, src=x, **MASKS[found_with])
        assert len(sites) == 4, str(sites)
        for masks in MASKS.values():
            with surgery.force(gated, 1.0):
                assert_equal(outputs(gated, {"src": x, **masks}), outputs(toy, {"src": x, **masks}))
            with surgery.force(gated, 0.0):
                assert_equal(outputs(gated, {"src": x, **masks}), [x])
            found = []
            for mode in ("skip", "mask"):
                with surgery.execution(gated, mode), surgery.force(gated, 0.5, 1):  # type: ignore[arg-type]
                    found.append(outputs(gated, {"src": x, **masks}))
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5, equal_nan=True)
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
    assert "runs dense" not in caplog.text


def test_encoders_that_cut_padding_off(caplog: pytest.LogCaptureFixture) -> None:
    """Without gradients torch's encoder calls its layers with a nested tensor, and gives zeros for padding."""
    layer = nn.TransformerEncoderLayer(C, 2, 2 * C, batch_first=True)
    toy = nn.TransformerEncoder(layer, 2).eval()
    x = {"src": tokens(), "src_key_padding_mask": PADDING}
    sites, gated = convert(toy, **x)
    assert len(sites) == 4, str(sites)
    assert_equal(outputs(gated, x), outputs(toy, x))
    assert_close(outputs(surgery.pin(gated, x, "mask", threshold=-math.inf), x), outputs(toy, x), 1e-6)
    with surgery.force(gated, 1.0):
        assert_close(outputs(gated, x), outputs(toy, x), 1e-6)
    with surgery.force(gated, 0.0), surgery.tape(gated) as decisions:
        assert not outputs(gated, x)[0][PADDING].any()
    assert [len(event.decisions) for event in decisions] == [N] * 4
    found = []
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.force(gated, 0.5, 1):  # type: ignore[arg-type]
            found.append(outputs(gated, x))
    assert_close(*found, 1e-5)
    assert "runs dense" not in caplog.text
