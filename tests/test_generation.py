"""Decoders generate the same with and without a cache, whatever is skipped. Tokens are compared in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.gates import Gate
from surgery.queries import ActiveQueries

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
NEW = 10
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=8, **GROUPED)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(head_dim=8, sliding_window=4, **GROUPED)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            vocab_size=100,
            word_embed_proj_dim=32,
        )
    ),
}
WITH_ATTENTION = ("llama", "qwen3", "gemma3", "phi3", "opt")
IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [0, 0, 21, 22, 23, 24, 25], [0, 0, 0, 31, 32, 33, 34]])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module")
def built() -> Iterator[Callable[[str], tuple[nn.Module, nn.Module]]]:
    cache: dict[str, tuple[nn.Module, nn.Module]] = {}

    def build(name: str) -> tuple[nn.Module, nn.Module]:
        if name not in cache:
            torch.manual_seed(0)
            model = MODELS[name]().eval()
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            model = model.double()
            sites = surgery.find_sites(model, {"input_ids": IDS, "attention_mask": MASK})
            cache[name] = (model, surgery.insert_gates(model, sites))
        return cache[name]

    yield build


def generate(model: Any, rows: slice = slice(None), *, cache: bool = True, beams: int = 1) -> torch.Tensor:
    ids, mask = IDS[rows], MASK[rows]
    if len(ids) == 1:
        ids, mask = ids[:, mask[0].bool()], mask[:, mask[0].bool()]
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=cache, num_beams=beams,
            pad_token_id=0,
        )  # fmt: skip
    return out[:, -NEW:]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 2])
def test_cached_equals_uncached(name: str, beams: int, built: Any) -> None:
    _, gated = built(name)
    with surgery.force(gated, 0.5, seed=1):
        cached = generate(gated, beams=beams)
    with surgery.force(gated, 0.5, seed=1):
        uncached = generate(gated, cache=False, beams=beams)
    with surgery.force(gated, 0.5, seed=1), surgery.execution(gated, "mask"):
        masked = generate(gated, cache=False, beams=beams)
    assert torch.equal(cached, uncached) and torch.equal(cached, masked)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_and_batch_mates_change_nothing(name: str, built: Any) -> None:
    _, gated = built(name)
    with surgery.force(gated, 0.5, seed=1):
        together = generate(gated)
    for row in range(len(IDS)):
        with surgery.force(gated, 0.5, seed=1, samples=[row]):
            alone = generate(gated, slice(row, row + 1))
        assert torch.equal(alone[0], together[row]), f"row {row}"


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attention_of_a_cached_decoder_is_decided_per_token(name: str, built: Any) -> None:
    model, gated = built(name)
    attention = [p for p in surgery.context.state_of(gated).plan.sites if p.site.kind == "attention"]
    assert len(attention) == 2 and all(p.granularity == "token" and p.site.query is not None for p in attention)
    with surgery.force(gated, 0.3, seed=1):
        skipped = gated(input_ids=IDS, attention_mask=MASK).logits
    assert not torch.allclose(skipped, model(input_ids=IDS, attention_mask=MASK).logits)


def test_not_writing_keys_of_skipped_tokens_is_noticed(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: where no token of a call is active, do not run the branch at all, so that nothing is cached."""
    _, gated = built("llama")
    some = Gate._skip_queries

    def forgetful(self: Gate, branch: Any, left: Any, residual: Any, inputs: Any, decisions: Any) -> Any:
        return some(self, branch, left, residual, inputs, decisions) if decisions.any() else left

    monkeypatch.setattr(Gate, "_skip_queries", forgetful)
    with surgery.force(gated, 0.5, seed=1):
        cached = generate(gated, slice(0, 1))
    with surgery.force(gated, 0.5, seed=1), surgery.execution(gated, "mask"):
        masked = generate(gated, slice(0, 1), cache=False)
    assert not torch.equal(cached, masked)


def test_decoding_one_token_runs_no_query_projection_when_it_is_skipped(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gated = built("llama")
    rows = []
    some = ActiveQueries._some
    monkeypatch.setattr(
        ActiveQueries,
        "_some",
        lambda self, x, w, b, order: rows.append(len(self.flat[order])) or some(self, x, w, b, order),
    )
    with surgery.force(gated, 0.0):
        generate(gated, slice(0, 1))
    assert rows and set(rows) == {0}
