"""FLOPs per token while a text is read and while it is written, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.phases import count_phases

transformers = pytest.importorskip("transformers")

C, H, D, KV, F, V, LAYERS = 32, 4, 8, 2, 64, 100, 3  # widths, heads, head dim, key heads, MLP, vocabulary
KEYS = 2 * 2 * C * KV * D
ATTENTION = 2 * C * H * D + KEYS + 2 * H * D * C  # queries, keys and values, output projection
MLP = 3 * 2 * C * F
HEAD = 2 * C * V
PER_KEY = 2 * 2 * H * D  # score and weighted sum
TEXT = {"input_ids": torch.arange(3, 23)[None].repeat(2, 1), "attention_mask": torch.ones(2, 20, dtype=torch.long)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=C, num_hidden_layers=LAYERS, num_attention_heads=H, num_key_value_heads=KV, intermediate_size=F,
        vocab_size=V, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gated(model: nn.Module, granularity: Any) -> nn.Module:
    plan = surgery.find_sites(model, TEXT).plan(granularity=granularity, skip="identity")
    return surgery.insert_gates(model, plan)


def test_the_dense_model_by_hand(model: nn.Module) -> None:
    """10 tokens are read, each beside 10 keys (the product is counted in full); then 8 are written beside 11 to 18."""
    prefill, decode = count_phases(gated(model, "token"), model, [TEXT])
    layer = ATTENTION + MLP
    assert (prefill.context, prefill.tokens) == (10, 20) and (decode.context, decode.tokens) == (14.5, 16)
    assert prefill.dense == LAYERS * (layer + 10 * PER_KEY) + HEAD
    assert decode.dense == LAYERS * (layer + 14.5 * PER_KEY) + HEAD
    assert prefill.cost == decode.cost == 1


def test_skipped_tokens_still_cost_keys_and_values(model: nn.Module) -> None:
    one = gated(model, "token")
    with surgery.force(one, 0.0):
        phases = count_phases(one, model, [TEXT])
    assert [phase.flops for phase in phases] == [LAYERS * KEYS + HEAD] * 2


def test_skipped_sequences_cost_keys_and_values_of_the_first_layer_alone(model: nn.Module) -> None:
    one = gated(model, "prefill")
    with surgery.force(one, 0.0):
        phases = count_phases(one, model, [TEXT])
    assert [phase.flops for phase in phases] == [KEYS + HEAD] * 2


def test_padding_is_not_counted(model: nn.Module) -> None:
    one = gated(model, "token")
    padded = {key: nn.functional.pad(value, (5, 0)) for key, value in TEXT.items()}
    assert count_phases(one, model, [padded]) == count_phases(one, model, [TEXT])


def test_the_report_says_both(model: nn.Module) -> None:
    one = gated(model, "token")
    with surgery.force(one, 0.5):
        report = surgery.measure(one, [TEXT], speed=(), peers=False)
    assert [phase["name"] for phase in report.to_dict()["phases"]] == ["prefill", "decode"]
    assert all(0.2 < phase.cost < 0.9 for phase in report.phases)
    assert "FLOPs per token" in str(report)


def test_other_models_have_no_phases() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    bert = transformers.BertForSequenceClassification(config).eval()
    one = surgery.insert_gates(bert, surgery.find_sites(bert, TEXT))
    assert surgery.measure(one, [TEXT], speed=(), peers=False).phases == ()
