"""Distances and margins by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from surgery.calling import Batch
from surgery.objectives import distances, divergence, margin, token_weights

GENERATOR = torch.Generator()
HALF = math.log(3)  # logits (log 3, 0) are probabilities (3/4, 1/4)


def test_divergence_of_classes_by_hand() -> None:
    output = torch.tensor([[0.0, 0.0], [HALF, 0.0], [5.0, 5.0 - HALF]])
    dense = torch.tensor([[HALF, 0.0], [HALF, 0.0], [HALF, 0.0]])
    # KL((3/4, 1/4) || (1/2, 1/2)); equal logits, and logits shifted by a constant, are no distance
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(output, dense).tolist() == pytest.approx([expected, 0, 0], abs=1e-6)
    # the other way round it is another number
    other = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert divergence(dense[:1], output[:1]).tolist() == pytest.approx([other])


def test_temperature_softens_and_rescales() -> None:
    output, dense = torch.zeros(1, 2), torch.tensor([[2 * HALF, 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert divergence(output, dense, temperature=2.0).tolist() == pytest.approx([expected])


def test_divergence_of_tokens_is_the_mean_over_real_ones() -> None:
    output = torch.zeros(2, 3, 2)
    dense = torch.tensor([HALF, 0.0]).expand(2, 3, 2).clone()
    dense[:, 0] = 0  # no distance at the first token
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(output, dense).tolist() == pytest.approx([one * 2 / 3] * 2)
    batch = Batch((), {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    assert divergence(output, dense, batch).tolist() == pytest.approx([one / 2, one * 2 / 3])
    dense[0, 2] = torch.tensor([1e4, 0.0])  # padding may hold anything
    assert divergence(output, dense, batch).tolist() == pytest.approx([one / 2, one * 2 / 3])
    empty = Batch((), {"attention_mask": torch.zeros(2, 3, dtype=torch.long)})
    assert divergence(output, dense, empty).tolist() == [0.0, 0.0]


def test_divergence_of_embeddings_is_relative() -> None:
    dense = torch.tensor([[[[1.0, 3.0]]], [[[1.0, 1.0]]]])  # N 1 1 2; mean square 3
    output = dense + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)
    assert divergence(output, dense).tolist() == pytest.approx([0.0, 3.0])
    assert divergence(10 * output, 10 * dense).tolist() == pytest.approx([0.0, 3.0])
    column = torch.tensor([[2.0], [4.0]])  # one value per sample is a regression, not a class
    assert divergence(column + 1, column).tolist() == pytest.approx([0.1, 0.1])
    assert torch.isfinite(divergence(column, 0 * column)).all()


def test_half_precision_is_compared_in_full() -> None:
    dense = torch.tensor([[10.0, 9.0, -3.0]])
    value = divergence(dense.bfloat16(), dense.bfloat16())
    assert value.dtype is torch.float32 and value.item() == 0


def test_margin_of_classes() -> None:
    output = torch.tensor([[1.0, 4.0, 2.5], [7.0, 7.0, 0.0]], requires_grad=True)
    value = margin(output, Batch(), GENERATOR)
    assert value.item() == 1.5
    (gradient,) = torch.autograd.grad(value, output)
    assert gradient[0].tolist() == [0, 1, -1] and sorted(gradient[1].tolist()) == [-1, 0, 1]


def test_margin_of_language_is_the_loss_of_the_next_token() -> None:
    logits = torch.randn(2, 4, 5)
    ids = torch.randint(5, (2, 4))
    value = margin(logits, Batch((), {"input_ids": ids}), GENERATOR)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(value, expected)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    masked = margin(logits, Batch((), {"input_ids": ids, "attention_mask": mask}), GENERATOR)
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    # 0 and 1 of the first text; of the second one only its last token, since padding on the left predicts nothing
    torch.testing.assert_close(masked, loss[0, 0] + loss[0, 1] + loss[1, 2])


def test_margin_of_tokens_without_ids_is_that_of_the_likeliest() -> None:
    logits = torch.tensor([[[HALF, 0.0], [0.0, 0.0]]])
    assert margin(logits, Batch((torch.zeros(1, 2, 7),)), GENERATOR).item() == pytest.approx(
        -math.log(0.75) - math.log(0.5)
    )


def test_margin_of_tokens_without_ids_leaves_padding_out() -> None:
    logits = torch.tensor([[[HALF, 0.0], [9.0, 0.0]]])
    batch = Batch((torch.zeros(1, 2, 7),), {"attention_mask": torch.tensor([[1, 0]])})
    assert margin(logits, batch, GENERATOR).item() == pytest.approx(-math.log(0.75))


def test_an_encoder_decoder_is_judged_by_the_tokens_of_its_decoder() -> None:
    """Its texts are as long as what is written, by chance."""
    logits, ids = torch.randn(1, 3, 5), torch.tensor([[4, 0, 2]])
    mask = torch.tensor([[1, 1, 0]])
    batch = Batch((), {"input_ids": ids.flip(1), "attention_mask": mask, "decoder_input_ids": ids})
    expected = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    torch.testing.assert_close(margin(logits, batch, GENERATOR), expected)
    assert token_weights(logits[..., 0], batch).tolist() == [[1, 1, 1]]
    padded = Batch((), {**batch.kwargs, "decoder_attention_mask": mask})
    assert token_weights(logits[..., 0], padded).tolist() == [[1, 1, 0]]


def test_margin_of_hidden_states_does_not_take_them_for_logits() -> None:
    hidden = torch.randn(2, 4, 5)
    ids = torch.tensor([[1, 2, 3, 40], [1, 1, 1, 1]])  # a vocabulary larger than the width
    value = margin(hidden, Batch((), {"input_ids": ids}), GENERATOR)
    torch.testing.assert_close(value, margin(hidden, Batch(), GENERATOR))


def test_margin_of_embeddings_is_a_projection() -> None:
    output = torch.randn(3, 1, requires_grad=True)
    one, again = (margin(output, Batch(), torch.Generator().manual_seed(5)) for _ in range(2))
    other = margin(output, Batch(), torch.Generator().manual_seed(6))
    assert one == again != other
    (gradient,) = torch.autograd.grad(one, output)
    assert float((gradient * output).sum().detach()) == pytest.approx(one.item()) and gradient.all()


def test_token_weights() -> None:
    values = torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = Batch((), {"attention_mask": mask})
    assert torch.equal(token_weights(values, batch), mask.float())
    assert torch.equal(token_weights(values[:, :2], batch, shift=1), mask[:, 1:].float())
    for other in (
        None,
        Batch(),
        Batch((), {"attention_mask": torch.ones(2, 1, 3, 3)}),
        Batch((), {"attention_mask": mask[:, :2]}),
    ):
        assert torch.equal(token_weights(values, other), torch.ones(2, 3))


def test_values_differ_by_their_distance_whatever_their_shape() -> None:
    dense = torch.tensor([[1.0, 3.0], [1.0, 1.0]])  # mean square 3
    assert divergence(dense + 3, dense).abs().max() < 1e-6  # as logits they say the same
    assert divergence(dense + 3, dense, values=True).tolist() == pytest.approx([3.0, 3.0])
    numbers = torch.tensor([2.0, 4.0])
    assert divergence(numbers + 1, numbers).tolist() == pytest.approx([0.1, 0.1])


def test_padding_of_hidden_states_does_not_count() -> None:
    dense = torch.ones(1, 3, 2)
    output = dense + torch.tensor([3.0, 0.0, 100.0]).view(1, 3, 1)
    dense[0, 2] = 50
    batch = Batch((), {"attention_mask": torch.tensor([[1, 1, 0]])})
    assert divergence(output, dense, batch, values=True).tolist() == pytest.approx([4.5])
    probe = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margin(probe, batch, GENERATOR, values=True), probe)
    assert gradient.abs().tolist() == [[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]]


def test_margin_of_one_number_is_that_number_but_for_its_sign() -> None:
    output = torch.randn(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(output, Batch(), GENERATOR), output)
    assert gradient.abs().tolist() == [1.0] * 4


def test_distances_do_not_depend_on_batches() -> None:
    """Values 3, 4 and 0: the mean square is 25 / 3, also for the zero that is alone in its batch."""
    dense = [torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0]])]
    outputs = [value + 1 for value in dense]
    apart = distances(outputs, dense, dense, values=True)
    assert apart.tolist() == pytest.approx([3 / 25] * 3)
    whole = distances([torch.cat(outputs)], [torch.cat(dense)], [torch.cat(dense)], values=True)
    assert torch.equal(apart, whole)


def test_classes_that_are_ruled_out_are_no_distance() -> None:
    dense = torch.tensor([[HALF, 0.0, -torch.inf]])
    output = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    value = divergence(output, dense)
    assert value.tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)], abs=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), output)
    assert gradient.tolist() == [pytest.approx([-0.25, 0.25, 0.0])]
    assert divergence(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])).tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize("values", [False, True])
def test_what_the_dense_model_gives_no_number_for_does_not_count(values: bool) -> None:
    dense = torch.tensor([[1.0, 3.0], [torch.nan, 1.0]])
    output = torch.tensor([[2.0, 2.0], [1.0, 1.0]])
    found = distances([output], [dense], [output], values=values)
    assert found[1] == 0 and found[0] == divergence(output[:1], dense[:1], values=values)[0] > 0
    assert distances([dense], [output], [output], values=values)[1].isnan()  # of ours it does
    tokens = torch.stack((dense, dense), 1)  # N 2 2
    padded = {"x": tokens.nan_to_num(), "attention_mask": torch.tensor([[1, 1], [0, 1]])}
    assert distances([tokens.nan_to_num()], [tokens], [padded], values=values).tolist() == [0.0, 0.0]
    tokens = tokens.clone()
    tokens[1, 1] = 1.0  # what is no number is padding
    assert distances([tokens.nan_to_num(5.0)], [tokens], [padded], values=values).tolist() == [0.0, 0.0]


def test_padding_may_hold_what_is_no_number() -> None:
    dense, batch = torch.zeros(1, 3, 2), Batch((), {"attention_mask": torch.tensor([[1, 1, 0]])})
    output = dense.clone()
    output[0, 2] = torch.nan
    for values in (False, True):
        assert divergence(output, dense, batch, values=values).tolist() == [0.0]
