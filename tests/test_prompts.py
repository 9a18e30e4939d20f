"""Granularity `prefill`: decided once per sequence from its prompt, kept with the key/value cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
from decoders import PADDED_WELL, decoder
from torch import nn

import surgery
from surgery.context import state_of
from surgery.errors import PinError, PlanMismatch, PromptError
from surgery.gates import Gate, iter_gates

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [0, 0, 21, 22, 23, 24, 25], [0, 0, 0, 31, 32, 33, 34]])
MASK = (IDS > 0).long()
PADDED = {"input_ids": IDS, "attention_mask": MASK}
NEW = 6


def routed(name: str = "llama", kind: Any = ("attention", "mlp")) -> nn.Module:
    """A decoder whose untrained routers close about half of the sequences at every site."""
    model = decoder(name)
    sites = surgery.find_sites(model, PADDED).filter(kind=kind)
    gated = surgery.insert_gates(model, sites.plan(granularity="prefill", first_tokens=0, first_layers=0))
    torch.manual_seed(3)
    for _, gate in iter_gates(gated):
        nn.init.normal_(gate.router.up.weight, std=1.0)
    state = state_of(gated)
    state.budget, state.threshold = 0.5, 0.0
    with surgery.tape(gated) as events:
        decoders.generate(gated, IDS, MASK, 1)
    low, high = torch.cat([event.scores.flatten() for event in events if event.scores is not None]).quantile(
        torch.tensor([0.45, 0.55])
    )
    state.threshold = float(low + high) / 2
    return gated


@pytest.fixture(scope="module")
def built() -> Callable[..., nn.Module]:
    made: dict[Any, nn.Module] = {}

    def build(name: str = "llama", kind: Any = ("attention", "mlp")) -> nn.Module:
        if (name, kind) not in made:
            made[name, kind] = routed(name, kind)
        return made[name, kind]

    return build


def generate(gated: Any, rows: slice = slice(None), **options: Any) -> torch.Tensor:
    return decoders.generate(gated, IDS[rows], MASK[rows], NEW, **options)


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PADDED_WELL)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_changes_nothing(name: str, options: dict[str, Any], built: Any) -> None:
    gated, plain = built(name), {k: v for k, v in options.items() if k == "num_beams"}
    with surgery.tape(gated) as events:
        cached = generate(gated, **options)
    assert torch.equal(cached, generate(gated, **plain, use_cache=False))
    with surgery.execution(gated, "mask"):
        assert torch.equal(cached, generate(gated, **plain, use_cache=False))
    once = [event for event in events if event.gate.once]
    assert {event.decisions.dim() for event in once} == {1}
    assert 0.1 < sum(event.rate() for event in once) / len(once) < 0.9


@pytest.mark.parametrize("name", PADDED_WELL)
def test_padding_and_batch_mates_change_nothing(name: str, built: Any) -> None:
    gated = built(name)
    together = generate(gated)
    for row in range(len(IDS)):
        assert torch.equal(generate(gated, slice(row, row + 1))[0], together[row]), f"row {row}"


@pytest.mark.parametrize("name", PADDED_WELL)
def test_forced_decisions_are_kept_as_well(name: str, built: Any) -> None:
    gated = built(name)
    results = []
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}):
        with surgery.force(gated, 0.5, seed=1):
            results.append(generate(gated, **options))
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])


def test_heads_are_decided_once_per_sequence(built: Any) -> None:
    gated = built("llama", ("heads",))
    assert all(gate.once and gate.site.kind == "heads" for _, gate in iter_gates(gated))
    cached = generate(gated)
    assert torch.equal(cached, generate(gated, use_cache=False)) and not torch.equal(cached, generate(decoder()))


def test_assisted_decoding_decides_from_the_prompt_alone(built: Any) -> None:
    gated = built()
    assert torch.equal(generate(gated, slice(0, 1), assistant_model=decoder()), generate(gated, slice(0, 1)))


def test_a_text_is_read_as_it_is_written(built: Any) -> None:
    """One call over a whole text with `prompt_length` gives what cached calls give, token by token."""
    gated = built()
    with torch.no_grad():
        first = gated(input_ids=IDS[:, :5], attention_mask=MASK[:, :5], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for end in (6, 7):
            step = gated(input_ids=IDS[:, end - 1 : end], attention_mask=MASK[:, :end], past_key_values=cache)
            parts.append(step.logits)
        for length in (MASK[:, :5].sum(1), MASK[:, :5].sum(1).tolist()):
            with surgery.prompt_length(gated, length):
                whole = gated(**PADDED, use_cache=False).logits
            torch.testing.assert_close(torch.cat(parts, 1)[MASK.bool()], whole[MASK.bool()])
        with surgery.prompt_length(gated, 1):
            other = gated(**PADDED, use_cache=False).logits
    assert not torch.allclose(other[MASK.bool()], whole[MASK.bool()])


@pytest.mark.parametrize(("length", "expected"), [(2, [2, 2, 2]), (0.5, [4, 3, 2]), (9, [7, 5, 4])])
def test_padding_is_no_part_of_the_prompt(length: Any, expected: list[int]) -> None:
    found = surgery.prompts.span(MASK.bool(), length, 3, 7, IDS.device)
    assert found.sum(1).tolist() == expected and not bool((found & ~MASK.bool()).any())
    assert bool(found[torch.arange(3), MASK.argmax(1)].all())


# -- what a cache holds ------------------------------------------------------------------------------------------------


def filled(gated: Any, **options: Any) -> Any:
    """The cache of a prompt, made by the model itself."""
    with torch.no_grad():
        return gated(**PADDED, use_cache=True, **options).past_key_values


def test_skipped_sequences_have_no_keys_but_in_the_first_layer(built: Any) -> None:
    gated = built()
    attention = [name for name in state_of(gated).names if "attn" in name]
    for rows in ([True, False, True], [False] * 3):
        with surgery.force(gated, dict.fromkeys(attention, torch.tensor(rows))):
            cache = filled(gated)
        held = [0 if layer.keys is None else len(layer.keys) for layer in cache.layers]
        assert held == [3, sum(rows), sum(rows)]


def test_layers_that_masks_are_made_from_hold_every_sequence(built: Any) -> None:
    """Gemma 3 asks the first layer that slides and the first that does not."""
    gated = built("gemma3")
    cache = transformers.DynamicCache(config=gated.config)
    with torch.no_grad(), surgery.force(gated, 0.0):
        gated(**PADDED, past_key_values=cache)
    assert [layer.is_initialized for layer in cache.layers] == [True, True, False]


def steps(gated: Any, cache: Any, order: torch.Tensor) -> torch.Tensor:
    """Logits of one more token for the sequences in `order`."""
    mask = torch.cat((MASK, torch.ones_like(MASK[:, :1])), 1)[order]
    with torch.no_grad():
        return gated(input_ids=torch.full((len(order), 1), 40), attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 0, 2], [1, 1, 1]])
def test_sequences_take_their_decisions_along(order: list[int], built: Any) -> None:
    gated, index = built(), torch.tensor(order)
    attention = dict.fromkeys([n for n in state_of(gated).names if "attn" in n], torch.tensor([False, True, True]))
    with surgery.force(gated, attention):
        caches = [filled(gated) for _ in range(3)]
    expected = steps(gated, caches[0], torch.arange(3))[index]
    moved, chosen = caches[1:]
    moved.reorder_cache(index)
    torch.testing.assert_close(steps(gated, moved, index), expected)
    chosen.batch_select_indices(index)
    torch.testing.assert_close(steps(gated, chosen, index), expected)


def test_repeated_and_copied_caches_go_on(built: Any) -> None:
    gated, twice = built(), torch.arange(3).repeat_interleave(2)
    expected = steps(gated, filled(gated), torch.arange(3))
    cache = filled(gated)
    copied = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(steps(gated, cache, twice), expected[twice])
    torch.testing.assert_close(steps(gated, copied, torch.arange(3)), expected)
    assert type(copied).__name__ == "DynamicCache" and isinstance(copied, transformers.DynamicCache)


def test_a_bool_selection_of_sequences(built: Any) -> None:
    gated, kept = built(), torch.tensor([True, False, True])
    cache = filled(gated)
    cache.batch_select_indices(kept)
    expected = steps(gated, filled(gated), torch.arange(3))[kept]
    torch.testing.assert_close(steps(gated, cache, kept.nonzero().squeeze(1)), expected)


def test_decisions_hold_when_the_budget_moves(built: Any) -> None:
    gated = built()
    expected = steps(gated, filled(gated), torch.arange(3))
    cache, state = filled(gated), state_of(gated)
    before, state.threshold = state.threshold, float("inf")
    try:
        torch.testing.assert_close(steps(gated, cache, torch.arange(3)), expected)
    finally:
        state.threshold = before
    cache = filled(gated)
    with surgery.execution(gated, "mask"):
        torch.testing.assert_close(steps(gated, cache, torch.arange(3)), expected)


def test_an_emptied_cache_begins_anew(built: Any) -> None:
    gated = built()
    cache = transformers.DynamicCache(config=gated.config)
    with torch.no_grad():
        gated(input_ids=IDS.flip(0), attention_mask=MASK.flip(0), past_key_values=cache)
        cache.reset()
        again = gated(**PADDED, past_key_values=cache).logits
        expected = gated(**PADDED, use_cache=True).logits
    torch.testing.assert_close(again, expected)


def test_nothing_is_kept_on_modules(built: Any) -> None:
    gated = built()
    before = {name: set(vars(gate)) for name, gate in iter_gates(gated)}
    generate(gated)
    assert {name: set(vars(gate)) for name, gate in iter_gates(gated)} == before
    with pytest.raises(PromptError):
        gated(**PADDED, use_cache=False)


def test_skipped_branches_do_not_run(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = built()
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, n=name: ran.append(n))
        for name, module in gated.named_modules()
        if name.endswith((".self_attn", ".mlp")) and "surgery_gates" not in name
    ]
    with surgery.force(gated, 0.0):
        generate(gated)
    for hook in hooks:
        hook.remove()
    assert set(ran) == {"model.layers.0.self_attn"}, "only its keys and values are needed, for the cache's length"


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_call_without_a_prompt_is_refused(built: Any) -> None:
    gated = built()
    for options in ({}, {"use_cache": False}):
        with pytest.raises(PromptError, match="does not say what that is"):
            gated(**PADDED, **options)
    with pytest.raises(PromptError, match="does not say what that is"):
        gated.model(**PADDED)


def test_caches_that_were_filled_otherwise_are_refused(built: Any) -> None:
    gated = built()
    with surgery.execution(gated, "dense"):
        cache = filled(gated)
    with pytest.raises(PromptError, match="the cache holds no decisions"):
        steps(gated, cache, torch.arange(3))
    with pytest.raises(PromptError, match="those of 3 sequences for the 2"):
        steps(gated, filled(gated), torch.arange(2))


def test_the_dense_model_does_not_go_on_with_missing_keys(built: Any) -> None:
    gated = built()
    with surgery.force(gated, 0.0):
        cache = filled(gated)
    with pytest.raises(PromptError, match="lacks keys and values"), surgery.execution(gated, "dense"):
        steps(gated, cache, torch.arange(3))


def test_a_prompt_in_parts_is_refused(built: Any) -> None:
    with pytest.raises(PromptError, match="prefill_chunk_size"):
        generate(built(), prefill_chunk_size=3)


@pytest.mark.parametrize(
    "length", [0, -1, True, 1.0, 1.5, float("nan"), "3", torch.tensor(3), [], [0, 1], torch.rand(3)]
)
def test_what_is_no_prompt_length_is_refused(length: Any, built: Any) -> None:
    with pytest.raises(PromptError, match="prompt_length must be"), surgery.prompt_length(built(), length):
        pass


def test_lengths_for_other_sequences_are_refused(built: Any) -> None:
    gated = built()
    with pytest.raises(PromptError, match="names 2 sequences, the call has 3"), surgery.prompt_length(gated, [1, 2]):
        gated(**PADDED)


def test_models_that_do_not_generate_so_are_refused() -> None:
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(num_hidden_layers=2, **decoders.SIZES)
    ).eval()
    with pytest.raises(PlanMismatch, match="'prefill' is for causal language models"):
        surgery.find_sites(bert, PADDED).plan(granularity="prefill")
    with pytest.raises(PlanMismatch, match="use_cache=False"):
        surgery.find_sites(decoder(), {**PADDED, "use_cache": False}).plan(granularity="prefill")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ).eval()
    with pytest.raises(PlanMismatch, match="'prefill' is for causal language models"):
        surgery.find_sites(t5, {**PADDED, "decoder_input_ids": IDS}).plan(granularity="prefill")


def test_a_pinned_copy_is_refused(built: Any) -> None:
    with pytest.raises(PinError, match="decided once per prompt"):
        surgery.pin(built(), PADDED)


# -- the pipeline ------------------------------------------------------------------------------------------------------


def test_a_conversion_reads_half_of_every_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(3, 100, (4, 12))} for _ in range(20)]
    read: list[Any] = []
    prompt = Gate.prompt

    def noted(self: Gate, residual: torch.Tensor) -> Any:
        read.append(prompt(self, residual))
        return read[-1]

    monkeypatch.setattr(Gate, "prompt", noted)
    model = decoder().float()
    gated = surgery.convert(
        model, 0.7, data=data, granularity="prefill", tune="train", options=surgery.Options(steps=3, nested_rate=0.0)
    )  # fmt: skip
    assert read and all(span.sum(1).eq(6).all() for span in read)
    state_of(gated).policy = "routed"
    report = surgery.measure(gated, data[4::5], speed=(1,))
    assert report.cost == pytest.approx(0.7, abs=0.05) and "nats_per_token" in report.metric
    surgery.save(gated, tmp_path / "out")
    again = surgery.load(tmp_path / "out", model=model)
    assert {row.granularity for row in surgery.status(again).sites} == {"prefill"}
    assert torch.equal(generate(again), generate(gated))
