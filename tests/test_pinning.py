"""Execution `cond`, and copies that `torch.compile` and `torch.export` can read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import toys
from subjects import Subject, assert_close, assert_equal, outputs, rows, subject
from torch import Tensor, nn

import surgery
from surgery.context import state_of
from surgery.errors import PinError, SurgeryError
from surgery.gates import iter_gates
from surgery.scripts.zoo import call

NETWORKS = [
    "timm/vit_pico@sample",
    "timm/vit_pico",
    "timm/test_resnet",
    "transformers/bert",
    "transformers/bert@sample",
    "transformers/llama",
    "plain/odd",
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def one_row(one: Subject) -> Any:
    """One sample; texts are padded, since transformers drops a mask of ones from a call that is not captured."""
    example = rows(one.example, [0])
    if isinstance(example, dict) and "attention_mask" in example:
        example["attention_mask"] = example["attention_mask"].clone()
        example["attention_mask"][:, -2:] = 0
    return example


def routed(one: Subject, execution: str, example: object) -> list[Tensor]:
    with surgery.execution(one.gated, execution):  # type: ignore[arg-type]
        return outputs(one.gated, example)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [1, 2])
def test_cond_gives_what_mask_and_skip_give(name: str, size: int) -> None:
    one = subject(name)
    example = rows(one.example, list(range(size)))
    expected = routed(one, "mask", example)
    assert_close(routed(one, "cond", example), expected)
    assert_close(routed(one, "skip", example), expected)


def test_cond_gives_what_mask_gives_for_forced_decisions() -> None:
    one = subject("timm/vit_pico@sample")
    example = rows(one.example, [0])
    for seed in range(3):
        with surgery.force(one.gated, 0.5, seed, samples=[0]):
            assert_close(routed(one, "cond", example), routed(one, "mask", example))


def test_cond_leaves_a_branch_out() -> None:
    model = toys.Stack(toys.mlp(8), toys.mlp(8))
    gated = toys.gate_all(model, torch.randn(2, 4, 8), granularity="sample")
    ran: list[str] = []
    for name, module in gated.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    first, second = (name for name, _ in iter_gates(gated))
    with surgery.execution(gated, "cond"), surgery.force(gated, {first: False, second: torch.tensor([True])}):
        gated(torch.randn(1, 4, 8))
    assert ran == ["blocks.1.inner.1", "blocks.1.inner.3"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("execution", ["cond", "mask"])
def test_a_pinned_copy_gives_the_same(name: str, execution: str) -> None:
    one = subject(name)
    example = one_row(one)
    expected = routed(one, execution, example)
    pinned = surgery.pin(one.gated, example, execution)  # type: ignore[arg-type]
    assert type(pinned).__name__ == type(one.model).__name__ and isinstance(pinned, type(one.model))
    assert_equal(outputs(pinned, example), expected)
    assert pinned.state_dict().keys() == one.gated.state_dict().keys()
    assert_equal(routed(one, execution, example), expected)


@pytest.mark.parametrize("name", ["timm/vit_pico@sample", "timm/test_resnet", "transformers/bert"])
@pytest.mark.parametrize("execution", ["cond", "mask"])
def test_a_pinned_copy_compiles_without_a_break(name: str, execution: str) -> None:
    one = subject(name)
    example = rows(one.example, [0])
    pinned = surgery.pin(one.gated, example, execution)  # type: ignore[arg-type]
    compiled = torch.compile(pinned, backend="eager", fullgraph=True)
    assert_close(outputs(compiled, example), routed(one, "mask", example))


def test_a_gated_model_itself_compiles_with_breaks() -> None:
    one = subject("timm/vit_pico@sample")
    example = rows(one.example, [0])
    expected = routed(one, "skip", example)
    compiled = torch.compile(one.gated, backend="eager")
    with surgery.execution(one.gated, "skip"):
        assert_close(outputs(compiled, example), expected)
    with surgery.execution(one.gated, "skip"), torch.no_grad():
        assert torch._dynamo.explain(one.gated)(example).graph_break_count > 0


@pytest.mark.parametrize("layout", ["NTC", "NCHW"])
def test_a_skip_path_added_in_one_pass(layout: Any) -> None:
    residual = torch.randn((2, 5, 8) if layout == "NTC" else (2, 8, 3, 3))
    for kind in ("identity", "affine", "linear", "low-rank", *(("depthwise",) if layout == "NCHW" else ())):
        path = toys.path_of(kind, 8, layout, 2)
        for parameter in path.parameters():
            nn.init.normal_(parameter)
        with torch.no_grad():
            torch.testing.assert_close(path(residual, added=True), residual + path(residual), rtol=1e-5, atol=1e-5)
            assert path(residual, added=True).data_ptr() != residual.data_ptr()


class FirstChannel(nn.Module):
    """A router that opens where the first channel of the first token is positive."""

    def forward(self, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return residual[:, 0, 0]


def test_both_sides_are_in_the_graph() -> None:
    gated = toys.gate_all(toys.Stack(toys.mlp(8), pool=True), torch.randn(2, 4, 8), granularity="sample")
    ((name, gate),) = iter_gates(gated)
    gate.router = FirstChannel()  # type: ignore[assignment]
    state_of(gated).threshold = 0.0
    compiled = torch.compile(surgery.pin(gated, torch.randn(1, 4, 8)), backend="eager", fullgraph=True)
    for sign in (1.0, -1.0):
        x = torch.full((1, 4, 8), sign) + 0.1 * torch.randn(1, 4, 8)
        with torch.no_grad(), surgery.force(gated, {name: sign > 0}):
            torch.testing.assert_close(compiled(x), gated(x))


def test_gathered_tokens_give_the_same() -> None:
    one = subject("timm/vit_pico")
    example = rows(one.example, [0, 1])
    pinned = surgery.pin(one.gated, example, "cond", tokens="gather")
    assert_close(outputs(pinned, example), routed(one, "mask", example))


def test_padding_does_not_count() -> None:
    one = subject("transformers/bert@sample")
    example = one_row(one)
    other = {**example, "input_ids": example["input_ids"].clone()}
    other["input_ids"][:, -2:] += 1
    pinned = surgery.pin(one.gated, example)
    assert_equal(outputs(pinned, example), routed(one, "cond", example))
    with surgery.tape(one.gated) as events:
        routed(one, "cond", example)
    running = pinned.__dict__["_surgery_running"]
    for given in (example, other):
        running.decisions = {}
        outputs(pinned, given)
        assert {n: bool(d) for n, d in running.decisions.items()} == {e.site: bool(e.decisions) for e in events}


def test_padding_is_never_active_in_a_pinned_copy_either() -> None:
    one = subject("transformers/bert")
    example = one.entry.example(3, seed=2)
    assert isinstance(example, dict)
    padding = ~example["attention_mask"].bool()
    gated = copy.deepcopy(one.gated)
    state_of(gated).padding_is_unread = True
    pinned = surgery.pin(gated, example, "mask")
    with surgery.execution(gated, "mask"), surgery.tape(gated) as events:
        outputs(gated, example)
    running = pinned.__dict__["_surgery_running"]
    running.decisions = {}
    outputs(pinned, example)
    assert padding.any() and set(running.decisions) == {event.site for event in events}
    for event in events:
        assert torch.equal(running.decisions[event.site], event.decisions)
        assert not (event.decisions & padding).any()
    assert any(event.decisions.any() for event in events)


def test_what_is_left_out_of_the_call_is_noticed() -> None:
    one = subject("transformers/bert")
    pinned = surgery.pin(one.gated, one_row(one))
    with pytest.raises(PinError, match="is not called as when it was pinned"):
        call(pinned, rows(one.example, [0]))  # nothing is padded, and transformers drops the mask


def test_a_compiled_text_model_follows_the_padding() -> None:
    one = subject("transformers/bert")
    padded, whole = one_row(one), rows(one.example, [0])
    compiled = torch.compile(surgery.pin(one.gated, whole), backend="eager", fullgraph=True)
    for example in (padded, whole):
        assert_close(outputs(compiled, example), routed(one, "mask", example))


class Twice(nn.Module):
    """Calls one module in two ways."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = toys.mlp(8)

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            y = x + self.mlp(x)
            return y if more is None else y + more

    def __init__(self) -> None:
        super().__init__()
        self.inner = Twice.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x), x)


def test_two_ways_in_one_call_are_refused() -> None:
    gated = surgery.insert_gates(Twice().eval(), surgery.find_sites(Twice().eval(), torch.randn(2, 4, 8)))
    with pytest.raises(PinError, match="inner is called in two ways during one call"):
        surgery.pin(gated, torch.randn(1, 4, 8))


def test_unknown_words_are_refused() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(SurgeryError, match="execution must be one of cond, mask, static; got 'skip'"):
        surgery.pin(one.gated, one.example, "skip")  # type: ignore[arg-type]
