"""Metrics, input by input, against values worked out by other means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subjects import subject
from torch import nn

from surgery.calling import Batch, as_batch, call
from surgery.errors import DataError
from surgery.scoring import IGNORED, Scores, agreement_of, metric_of, predicted

PLAIN = nn.Identity()


def test_accuracy() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    name, scores = metric_of(PLAIN, Batch((logits,), labels=torch.tensor([0, 1, 1])), logits) or ("", None)
    assert name == "accuracy" and scores is not None
    assert scores.values.tolist() == [1, 1, 0] and scores.weights.tolist() == [1, 1, 1]
    assert scores.mean == pytest.approx(2 / 3) and scores.count == 3


def test_token_accuracy_leaves_out_ignored_labels() -> None:
    logits = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]], [[0.0, 1.0], [2.0, 1.0], [2.0, 1.0]]])
    labels = torch.tensor([[0, 1, IGNORED], [1, IGNORED, IGNORED]])
    name, scores = metric_of(PLAIN, Batch((logits,), labels=labels), logits) or ("", None)
    assert name == "token_accuracy" and scores is not None
    assert scores.values.tolist() == [1, 1] and scores.weights.tolist() == [2, 1]


def test_labels_that_do_not_fit() -> None:
    logits = torch.zeros(3, 2)
    with pytest.raises(DataError, match=r"a label is 7, but the model tells 2 classes apart"):
        metric_of(PLAIN, Batch((logits,), labels=torch.tensor([0, 1, 7])), logits)
    with pytest.raises(DataError, match=r"labels have shape \(2,\)"):
        metric_of(PLAIN, Batch((logits,), labels=torch.tensor([0, 1])), logits)
    with pytest.raises(DataError, match="a label is -1, as where labels are withheld; leave the labels out"):
        metric_of(PLAIN, Batch((logits,), labels=torch.tensor([0, 1, -1])), logits)


def test_labels_of_one_byte_have_no_ignored_one() -> None:
    logits = torch.eye(200)
    labels = torch.arange(200).to(torch.uint8)  # -100 would be 156
    _, scores = metric_of(PLAIN, Batch((logits,), labels=labels), logits) or ("", None)
    assert scores is not None and scores.count == 200 and scores.mean == 1


def test_what_is_no_number_is_no_class() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [2.0, float("nan")], [2.0, 1.0], [1.0, -torch.inf]])
    batch = Batch((logits,), labels=torch.tensor([0, 1, 0, 0]))
    assert predicted(logits).tolist() == [-1, -1, 0, 0]
    _, scores = metric_of(PLAIN, batch, logits) or ("", None)
    assert scores is not None and scores.values.tolist() == [0, 0, 1, 1]
    _, agreement = agreement_of(PLAIN, batch, logits, torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]]))
    assert agreement.values.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("labels", [None, torch.randn(3)])
def test_nothing_tells_right_from_wrong(labels: Any) -> None:
    logits = torch.zeros(3, 2)
    assert metric_of(PLAIN, Batch((logits,), labels=labels), logits) is None


@torch.no_grad()
def test_nats_per_token_are_the_models_own_loss_whatever_the_padding() -> None:
    model = subject("transformers/llama").model
    ids = torch.randint(5, 90, (1, 9))
    expected = float(model(input_ids=ids, labels=ids).loss)
    pad, zeros, ones = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4), torch.ones(1, 9)
    right = {"input_ids": torch.cat((ids, pad), 1), "attention_mask": torch.cat((ones, zeros), 1).long()}
    left = {"input_ids": torch.cat((pad, ids), 1), "attention_mask": torch.cat((zeros, ones), 1).long()}
    for inputs in ({"input_ids": ids}, right, left, {"input_ids": ids, "labels": ids}):
        batch = as_batch(inputs)
        name, scores = metric_of(model, batch, call(model, batch)) or ("", None)
        assert name == "nats_per_token" and scores is not None
        assert scores.mean == pytest.approx(expected, rel=1e-4)
        assert scores.count == 8


@torch.no_grad()
def test_masked_language_models_predict_no_next_token() -> None:
    one = subject("transformers/bert")
    batch = as_batch(one.example)
    tokens = SimpleNamespace(logits=torch.zeros(*batch.kwargs["input_ids"].shape, 90))
    assert metric_of(one.model, batch, tokens) is None


def test_agreement_of_logits_counts_real_tokens() -> None:
    logits = torch.eye(3).expand(2, 3, 3).clone()
    other = logits.clone()
    other[0, 0] = torch.tensor([0.0, 0.0, 1.0])
    other[1, 2] = torch.tensor([1.0, 0.0, 0.0])  # padding
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = Batch((), {"attention_mask": mask})
    kind, scores = agreement_of(PLAIN, batch, SimpleNamespace(logits=other), SimpleNamespace(logits=logits))
    assert kind == "argmax"
    assert scores.values.tolist() == [2, 2] and scores.weights.tolist() == [3, 2]


def test_agreement_of_embeddings_is_their_cosine() -> None:
    states = torch.randn(2, 3, 4)
    other = states.clone()
    other[0, 2] = 0  # padding
    other[1] *= 2
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    outputs = [SimpleNamespace(last_hidden_state=value) for value in (other, states, -states)]
    kind, scores = agreement_of(PLAIN, Batch((), {"attention_mask": mask}), *outputs[:2])
    assert kind == "cosine" and scores.values.tolist() == pytest.approx([1, 1])
    assert agreement_of(PLAIN, Batch(), *outputs[1:])[1].mean == pytest.approx(-1)


def test_a_timm_model_without_a_head_gives_embeddings() -> None:
    model = nn.Identity()
    model.num_classes = 0  # type: ignore[assignment]
    assert agreement_of(model, Batch(), torch.randn(2, 5), torch.randn(2, 5))[0] == "cosine"
    assert agreement_of(PLAIN, Batch(), torch.randn(2, 5), torch.randn(2, 5))[0] == "argmax"


def test_mixing_is_linear_in_the_share() -> None:
    a, b = Scores(torch.tensor([0.0, 1.0]), torch.ones(2)), Scores(torch.tensor([1.0, 1.0]), torch.ones(2))
    assert a.mixed(b, 0.25).values.tolist() == [0.25, 1.0]
    assert Scores.joined([a, b]).mean == 0.75


def test_hidden_states_predict_no_tokens() -> None:
    hidden, ids = torch.randn(2, 4, 8), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 9]])
    assert metric_of(PLAIN, Batch((), {"input_ids": ids}), hidden) is None  # 9 is no entry of the last axis
    assert metric_of(PLAIN, Batch((), {"input_ids": ids - 2}), hidden, "values") is None


def test_values_are_not_classes() -> None:
    values, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    headless = nn.Identity()
    headless.num_classes = 0  # type: ignore[assignment]
    assert metric_of(PLAIN, Batch((values,), labels=labels), values, "values") is None
    assert metric_of(headless, Batch((values,), labels=labels), values) is None  # as timm's are
