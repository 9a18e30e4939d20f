"""Decoders generate the same with and without a cache, whatever is skipped. Tokens are compared in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import decoders
import pytest
import torch
from decoders import MODELS, decoder
from subjects import enliven
from torch import nn

import surgery
from surgery.errors import PlanMismatch
from surgery.gates import Gate
from surgery.key_values import KeyWriter

transformers = pytest.importorskip("transformers")

NEW = 10
IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [0, 0, 21, 22, 23, 24, 25], [0, 0, 0, 31, 32, 33, 34]])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module")
def built() -> Iterator[Callable[[str], tuple[nn.Module, nn.Module]]]:
    cache: dict[str, tuple[nn.Module, nn.Module]] = {}

    def build(name: str) -> tuple[nn.Module, nn.Module]:
        if name not in cache:
            model = decoder(name, layers=2)
            sites = surgery.find_sites(model, {"input_ids": IDS, "attention_mask": MASK})
            cache[name] = (model, surgery.insert_gates(model, sites))
        return cache[name]

    yield build


def generate(model: Any, rows: slice = slice(None), *, cache: bool = True, beams: int = 1) -> torch.Tensor:
    return decoders.generate(model, IDS[rows], MASK[rows], NEW, use_cache=cache, num_beams=beams)


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


@pytest.mark.parametrize("name", MODELS)
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
        return some(self, branch, left, residual, inputs, decisions) if decisions is not None else left

    monkeypatch.setattr(Gate, "_skip_queries", forgetful)
    with surgery.force(gated, 0.5, seed=1):
        cached = generate(gated, slice(0, 1))
    with surgery.force(gated, 0.5, seed=1), surgery.execution(gated, "mask"):
        masked = generate(gated, slice(0, 1), cache=False)
    assert not torch.equal(cached, masked)


def test_decoding_one_token_runs_no_query_projection_when_it_is_skipped(built: Any) -> None:
    _, gated = built("llama")
    calls = []
    attention = gated.model.layers[0].self_attn
    handles = [
        child.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
        for name, child in attention.named_children()
    ]
    with surgery.force(gated, 0.0):
        generate(gated, slice(0, 1))
        calls.clear()
        generate(gated, slice(0, 1))
    for handle in handles:
        handle.remove()
    assert calls == ["k_proj", "v_proj"] * NEW


KEYS_ALONE = frozenset({"llama", "qwen3", "gemma3", "gemma2", "olmo2", "mixtral", "gptj", "gpt_neox", "opt"})


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_alone_are_those_of_the_whole_attention(
    name: str, built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gated = built(name)
    written = []
    write = KeyWriter.write

    def noted(self: KeyWriter, host: nn.Module, inputs: Any) -> bool:
        written.append(write(self, host, inputs))
        return written[-1]

    def filled() -> list[torch.Tensor]:
        cache = transformers.DynamicCache(config=gated.config)
        with torch.no_grad(), surgery.force(gated, 0.0):
            gated(input_ids=IDS, attention_mask=MASK, past_key_values=cache, use_cache=True)
            more = torch.cat((MASK, MASK[:, :1] | 1), 1)
            gated(input_ids=IDS[:, -1:], attention_mask=more, past_key_values=cache, use_cache=True)
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

    monkeypatch.setattr(KeyWriter, "write", noted)
    alone = filled()
    monkeypatch.setattr(KeyWriter, "write", lambda *_: False)
    whole = filled()
    assert all(map(torch.equal, alone, whole)) and len(alone) == 4
    assert (bool(written) and all(written)) == (name in KEYS_ALONE)


def test_keys_alone_are_not_written_where_the_module_would_write_others(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = built("llama")
    forward = transformers.models.llama.modeling_llama.LlamaAttention.forward

    def doubled(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
        if isinstance(hidden_states, torch.Tensor):  # what a trace does not see
            hidden_states = 2 * hidden_states
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", doubled)
    gated = surgery.insert_gates(model, surgery.find_sites(model, {"input_ids": IDS, "attention_mask": MASK}))
    with surgery.force(gated, 0.5, seed=1):
        cached = generate(gated)
    with surgery.force(gated, 0.5, seed=1), surgery.execution(gated, "mask"):
        assert torch.equal(cached, generate(gated, cache=False))


# -- what generation can be asked for ---------------------------------------------------------------------------------


def sampled(model: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"cache_implementation": "static", "do_sample": False},
        {"num_beams": 2, "do_sample": False, "num_return_sequences": 2},
    ],
    ids=["sampling", "static cache", "beams"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2"])
def test_kinds_of_generation(name: str, options: dict[str, Any], built: Any) -> None:
    _, gated = built(name)
    with surgery.force(gated, 0.5, seed=1):
        cached = sampled(gated, **options)
    plain = {k: v for k, v in options.items() if k != "cache_implementation"}
    with surgery.force(gated, 0.5, seed=1), surgery.execution(gated, "mask"):
        uncached = sampled(gated, **plain, use_cache=False)
    assert torch.equal(cached, uncached)


def test_assisted_decoding_gives_what_greedy_decoding_gives(built: Any) -> None:
    model, gated = built("llama")
    ids, mask = IDS[:1], MASK[:1]
    with torch.no_grad(), surgery.force(gated, 0.5, seed=1, samples=[0]):
        alone = gated.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assisted = gated.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, assistant_model=model
        )
    assert torch.equal(alone, assisted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_implementation_of_attention_skips(attention: str, built: Any) -> None:
    model, gated = built("llama")
    was = model.config._attn_implementation
    gated.set_attn_implementation(attention)
    try:
        with torch.no_grad(), surgery.force(gated, 0.5, seed=1, samples=[0, 1, 2]):
            skipped = gated(input_ids=IDS, attention_mask=MASK).logits
            with surgery.execution(gated, "mask"):
                masked = gated(input_ids=IDS, attention_mask=MASK).logits
    finally:
        gated.set_attn_implementation(was)
    torch.testing.assert_close(skipped[MASK.bool()], masked[MASK.bool()])


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|sdpa", "flex_attention"])
def test_attention_that_cannot_be_seen_is_refused_by_name(name: str, built: Any) -> None:
    model, gated = built("llama")
    was = model.config._attn_implementation
    gated.config._attn_implementation = name
    try:
        with pytest.raises(PlanMismatch, match=f"self_attn: attention runs as '{re.escape(name)}'"):
            with surgery.force(gated, 0.5):
                gated(input_ids=IDS, attention_mask=MASK)
    finally:
        gated.config._attn_implementation = was


def test_continuous_batching_gives_what_generate_gives() -> None:
    model = decoder("llama", layers=2)
    plan = surgery.find_sites(model, {"input_ids": IDS, "attention_mask": MASK}).plan()
    gated = enliven(surgery.insert_gates(model, plan))
    surgery.context.state_of(gated).budget = 0.5
    prompts = [[11, 12, 13, 14, 15], [21, 22, 23]]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    batching = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    got = gated.generate_batch(prompts, transformers.GenerationConfig(**options), batching).values()
    alone = [gated.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    dense = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    assert [one.generated_tokens for one in got] == alone != dense


@pytest.mark.parametrize("granularity", ["sample", "prefill"])
def test_one_decision_for_several_sequences_in_a_row_is_refused(granularity: Any) -> None:
    model = decoder("llama", layers=2)
    plan = surgery.find_sites(model, {"input_ids": IDS, "attention_mask": MASK}).plan(granularity=granularity)
    gated = enliven(surgery.insert_gates(model, plan))
    packed = {
        "input_ids": torch.tensor([[11, 12, 13, 21, 22]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5]),
        "use_cache": False,
    }
    with torch.no_grad():
        with surgery.execution(gated, "skip"), pytest.raises(PlanMismatch, match="several sequences in one row"):
            gated(**packed)
        for mode in ("dense", "static"):
            with surgery.execution(gated, mode):
                gated(**packed)


def test_returned_attention_weights_are_those_of_every_token(built: Any) -> None:
    model, gated = built("llama")
    was = model.config._attn_implementation
    gated.set_attn_implementation("eager")
    try:
        with torch.no_grad(), surgery.force(gated, 0.5, seed=1, samples=[0, 1, 2]):
            skipped = gated(input_ids=IDS, attention_mask=MASK, output_attentions=True).attentions
            with surgery.execution(gated, "mask"):
                masked = gated(input_ids=IDS, attention_mask=MASK, output_attentions=True).attentions
    finally:
        gated.set_attn_implementation(was)
    assert len(skipped) == len(masked) == 2
    for mine, reference in zip(skipped, masked, strict=True):
        torch.testing.assert_close(mine, reference, equal_nan=True)  # padding attends to nothing


# -- encoder-decoders -------------------------------------------------------------------------------------------------

PAIR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
PAIRS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**PAIR, max_position_embeddings=64, forced_eos_token_id=None)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **PAIR, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    ),
}  # fmt: skip
RIGHT = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 0, 0], [31, 32, 33, 34, 0]])


def source(name: str) -> dict[str, torch.Tensor]:
    if name == "whisper":
        return {"input_features": torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0)).double()}
    return {"input_ids": RIGHT, "attention_mask": (RIGHT > 0).long()}


@pytest.fixture(scope="module")
def paired() -> Callable[[str], nn.Module]:
    cache: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        if name not in cache:
            torch.manual_seed(0)
            model = PAIRS[name]().eval()
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            model = model.double()
            example = {**source(name), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8], [1, 9, 10]])}
            cache[name] = surgery.insert_gates(model, surgery.find_sites(model, example).expect(10))
        return cache[name]

    return build


def write(gated: Any, inputs: dict[str, torch.Tensor], *, cache: bool = True, beams: int = 1) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = gated.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache, num_beams=beams
        )
    return out


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_encoder_decoders_generate_the_same_with_and_without_a_cache(name: str, beams: int, paired: Any) -> None:
    gated = paired(name)
    sites = [planned.site for planned in surgery.context.state_of(gated).plan.sites]
    assert all("token" in site.granularities for site in sites)
    assert sum(site.query is not None for site in sites) == 6
    results = []
    for cache, mode in ((True, "skip"), (False, "skip"), (False, "mask")):
        with surgery.force(gated, 0.5, seed=1, samples=[0, 1, 2]), surgery.execution(gated, mode):
            results.append(write(gated, source(name), cache=cache, beams=beams))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", PAIRS)
def test_batch_mates_of_an_encoder_decoder_change_nothing(name: str, paired: Any) -> None:
    gated = paired(name)
    with surgery.force(gated, 0.5, seed=1, samples=[0, 1, 2]):
        together = write(gated, source(name))
    for row in range(3):
        inputs = {key: value[row : row + 1] for key, value in source(name).items()}
        if "attention_mask" in inputs:
            inputs = {key: value[:, inputs["attention_mask"][0].bool()] for key, value in inputs.items()}
        with surgery.force(gated, 0.5, seed=1, samples=[row]):
            assert torch.equal(write(gated, inputs)[0], together[row]), f"row {row}"
