"""What a model may return: tensors in any wrapping, classes, and numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Stack, mlp

import surgery
from surgery.calling import Batch, is_logits, kind_of, read_output, tensors
from surgery.errors import DataError, SurgeryError, UnsupportedModel
from surgery.scoring import agreement_of
from surgery.second_look import given_to_others


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor
    count: int = 1


@dataclass
class Scored:
    scores: Tensor
    hidden: list[Tensor]


class Own:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Empty:
    """An output that shows nothing."""


WRAPPINGS: dict[str, Callable[[Tensor], Any]] = {
    "frozen dataclass": Frozen,
    "dataclass": lambda y: Scored(y, [y + 1]),
    "own class": Own,
    "dataclass in a tuple": lambda y: (Scored(y, []), None),
}


class Wrapped(nn.Module):
    """A network that wraps its output."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = Stack(mlp(8), mlp(8), head=nn.Linear(8, 3))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_tensors_are_found_in_every_wrapping(wrap: Callable[[Tensor], Any]) -> None:
    y = torch.randn(2, 3)
    assert tensors(wrap(y))[0] is y and read_output(wrap(y)) is y
    assert tensors(Scored(y, [y + 1]))[1].equal(y + 1)


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_gates_that_change_the_result_are_refused_in_every_wrapping(
    wrap: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial conversions are made wrong; only comparing their outputs can tell."""
    trial = surgery.finding.insert_gates

    def wrong(model: nn.Module, plan: Any) -> nn.Module:
        gated = trial(model, plan)
        gated.net.head.bias.data = gated.net.head.bias.data + 1  # type: ignore[operator, union-attr]
        return gated

    model = Wrapped(wrap).eval()
    assert len(surgery.find_sites(model, torch.randn(2, 8))) == 2
    monkeypatch.setattr(surgery.finding, "insert_gates", wrong)
    found = surgery.find_sites(model, torch.randn(2, 8))
    assert len(found) == 0 and "does not give the same result" in found.rejections[0].reason


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"Wrapped returns a Empty in which no tensor was found.*return a tensor"
    ):
        surgery.find_sites(Wrapped(lambda y: Empty()).eval(), torch.randn(2, 8))


@pytest.mark.parametrize("wrap", [*WRAPPINGS.values()][:3], ids=[*WRAPPINGS][:3])
def test_a_second_look_replaces_rows_in_every_wrapping(wrap: Callable[[Tensor], Any]) -> None:
    first, dense, looked = torch.zeros(6, 3), torch.ones(6, 3), torch.arange(6) < 2
    given = wrap(first)
    result, rows = given_to_others(given, dense, looked, seed=0)
    assert type(result) is type(given) and rows.sum() == 2
    assert torch.equal(read_output(result), rows[:, None].expand(6, 3).float())
    assert not read_output(given).any()  # others may hold it


def test_an_answer_is_where_it_begins_and_where_it_ends() -> None:
    start, end = torch.randn(2, 5), torch.randn(2, 5)
    span = SimpleNamespace(start_logits=start, end_logits=end)
    assert torch.equal(read_output(span), torch.stack((start, end), 1)) and is_logits(nn.Identity(), Batch(), span)
    other = SimpleNamespace(start_logits=start, end_logits=-end)
    name, agreed = agreement_of(nn.Identity(), Batch(), other, span)
    assert name == "argmax" and agreed.mean == 0.5
    assert read_output(SimpleNamespace(start_logits=start, end_logits=None, logits=end)) is end


def test_a_loss_is_no_output() -> None:
    loss, logits = torch.tensor(1.0), torch.randn(2, 3)
    assert read_output((loss, logits)) is logits
    with pytest.raises(
        DataError, match=r"one number for a whole batch, such as a loss; expected one row for every sample"
    ):
        read_output((loss, torch.zeros(2, dtype=torch.long)))


class Numbers(nn.Module):
    """A regression: `count` numbers for every sample, or one without an axis of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.net = Stack(*(mlp(8) for _ in range(4)), head=nn.Linear(8, max(count, 1)))
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y if self.count else y.squeeze(-1)


def batches(count: int = 8) -> list[Tensor]:
    return [torch.randn(16, 8) for _ in range(count)]


def test_numbers_without_an_axis_of_their_own() -> None:
    data, model = batches(), Numbers(0).eval()
    gated = surgery.convert(model, 0.6, data=data, granularity="sample", options=surgery.Options(steps=3))
    assert surgery.context.state_of(gated).gives_values
    assert surgery.measure(gated, data, dense=model, speed=()).agreement_of == "cosine"
    surgery.audit(gated, data)
    with torch.no_grad():
        surgery.Guard(gated, dense_fraction=1.0)(data[0])
    with pytest.raises(SurgeryError, match=r"needs class logits \(N, K\); Numbers gives values \(16,\)"):
        surgery.calibrate_second_look(gated, data, mode=True)


def test_what_the_user_says_of_outputs_is_kept(tmp_path: Path) -> None:
    data, model = batches(), Numbers(3).eval()
    taken = surgery.convert(model, 0.6, data=data, tune="oneshot", granularity="sample")
    said = surgery.convert(model, 0.6, data=data, tune="oneshot", granularity="sample", outputs="values")
    surgery.save(said, tmp_path / "said")
    loaded = surgery.load(tmp_path / "said", model=model)
    kinds = [surgery.context.state_of(one).gives_values for one in (taken, said, loaded)]
    assert kinds == [False, True, True]
    found = [
        surgery.measure(one, data, dense=model, speed=(), peers=False).agreement_of for one in (taken, said, loaded)
    ]
    assert found == ["argmax", "cosine", "cosine"]
    with pytest.raises(SurgeryError, match="outputs must be one of auto, logits, values"):
        surgery.convert(model, 0.6, data=data, outputs="classes")  # type: ignore[arg-type]


class Untaught(nn.Module):
    """An encoder as timm makes it without a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Stack(*(mlp(8) for _ in range(4)))
        self.num_classes = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


@pytest.mark.parametrize("make", [Untaught, lambda: Numbers(3)], ids=["embedding", "said"])
def test_values_are_fitted_as_values(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax does not see what is added to all channels, so that no step may use one."""
    monkeypatch.setattr(torch.nn.functional, "log_softmax", lambda *_, **__: pytest.fail("values are no logits"))
    outputs: Any = "auto" if make is Untaught else "values"
    options = surgery.Options(steps=2)
    gated = surgery.convert(make().eval(), 0.6, data=batches(), granularity="sample", options=options, outputs=outputs)
    surgery.train_routers(gated, batches(), budget=0.6, options=options)
    surgery.heal(gated, batches(), "norms", options=options)
    assert surgery.context.state_of(gated).looks == []


def test_logits_or_values() -> None:
    ids, logits = torch.randint(5, (2, 4)), torch.randn(2, 4, 9)
    plain = nn.Identity()
    regression = nn.Identity()
    regression.config = SimpleNamespace(problem_type="regression")  # type: ignore[assignment]
    named = SimpleNamespace(logits=torch.randn(2, 3))
    assert is_logits(plain, Batch((ids,)), logits) and is_logits(plain, Batch((), {"input_ids": ids}), logits)
    assert not is_logits(plain, Batch((ids + 5,)), logits)  # a width, and no vocabulary
    assert not is_logits(plain, Batch((torch.randn(2, 4, 3),)), logits)
    assert not is_logits(plain, Batch(), torch.randn(4)) and not is_logits(plain, Batch(), torch.randn(4, 1))
    assert is_logits(plain, Batch(), named) and not is_logits(regression, Batch(), named)
    assert is_logits(regression, Batch(), named, "logits") and not is_logits(plain, Batch(), named, "values")
    several = nn.Identity()
    several.config = SimpleNamespace(problem_type="multi_label_classification")  # type: ignore[assignment]
    assert not is_logits(several, Batch(), named)  # every number counts, and what they have in common too
    assert not is_logits(plain, Batch(labels=torch.ones(2, 3)), named)
    hidden = SimpleNamespace(last_hidden_state=torch.randn(2, 4, 9))
    kinds = [
        kind_of(plain, Batch(), one) for one in (named, hidden, torch.randn(2, 3), torch.randn(2, 4, 9), torch.randn(2))
    ]
    assert kinds == ["logits", "values", "auto", "auto", "values"]
