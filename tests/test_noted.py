"""What transformers notes inside of branches while they run: attention weights, logits of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import PromptError

transformers = pytest.importorskip("transformers")
capture_outputs = pytest.importorskip("transformers.utils.output_capturing").capture_outputs

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(3, 33).view(3, 10)
MODES: list[Any] = ["skip", "mask", "cond", "static"]


def vit() -> nn.Module:
    sizes = {name: value for name, value in TEXT.items() if name not in ("vocab_size", "pad_token_id")}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, attn_implementation="eager")
    return transformers.ViTModel(config).eval()


def mixtral(**options: Any) -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, **options, num_key_value_heads=2, num_local_experts=4)
    ).eval()


@pytest.mark.parametrize("rate", [0.5, 0.0])
@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_attention_weights_are_those_of_all_samples_and_layers(granularity: Any, rate: float) -> None:
    model, x = vit(), torch.randn(3, 3, 16, 16)
    gated = surgery.insert_gates(model, surgery.find_sites(model, {"pixel_values": x}).plan(granularity=granularity))
    found = []
    for mode in MODES:
        with torch.no_grad(), surgery.execution(gated, mode), surgery.force(gated, rate, seed=2):
            found.append(gated(pixel_values=x, output_attentions=True))
    assert [weights.shape for weights in found[0].attentions] == [(3, 4, 5, 5)] * 2
    for other in found[1:]:
        torch.testing.assert_close(other.attentions, found[0].attentions)
        torch.testing.assert_close(other.last_hidden_state, found[0].last_hidden_state)


@pytest.mark.parametrize("configured", [True, False], ids=["by configuration", "by argument"])
@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_logits_of_experts_are_those_of_all_tokens(rate: float, configured: bool) -> None:
    model = mixtral(output_router_logits=configured)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    gated = surgery.insert_gates(model, surgery.find_sites(model, {"input_ids": IDS, "attention_mask": mask}))
    given = {} if configured else {"output_router_logits": True}
    found = []
    for mode in MODES[:2]:
        with torch.no_grad(), surgery.execution(gated, mode), surgery.force(gated, rate, seed=2):
            found.append(gated(input_ids=IDS, attention_mask=mask, labels=IDS, **given))
    assert [logits.shape for logits in found[0].router_logits] == [(30, 4)] * 2
    torch.testing.assert_close(found[0].loss, found[1].loss)


def test_generation_returns_the_encoders_attention_weights() -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    gated: Any = surgery.insert_gates(
        model, surgery.find_sites(model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]})
    )
    found = []
    for mode in MODES[:2]:
        with surgery.force(gated, 0.5, seed=1), surgery.execution(gated, mode):
            found.append(
                gated.generate(
                    IDS, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
                ).encoder_attentions
            )
    torch.testing.assert_close(*found)


def test_a_prompt_without_the_keys_of_what_is_skipped_has_no_attention_weights() -> None:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    sites = surgery.find_sites(model, {"input_ids": IDS})
    gated = surgery.insert_gates(model, sites.plan(granularity="prefill"))
    ids = IDS.clone()
    with torch.no_grad(), surgery.force(gated, 0.5, seed=2):
        whole = gated(input_ids=ids, use_cache=True, output_attentions=True)
        assert [weights.shape[0] for weights in whole.attentions] == [3, 3]
        gated(input_ids=ids[:, :1], past_key_values=whole.past_key_values, output_attentions=True)
        short = gated(input_ids=ids, use_cache=True)
        with pytest.raises(PromptError, match="attention weights"):
            gated(input_ids=ids[:, :1], past_key_values=short.past_key_values, output_attentions=True)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.map(x), x.mean(-1)


class Collecting(transformers.PreTrainedModel):  # type: ignore[name-defined, misc]
    """Its own `forward`, with a sum in it, returns what a hook on its layer notes, as RT-DETR's decoder does."""

    config_class = transformers.PreTrainedConfig
    _can_record_outputs = {"attentions": Layer}  # noqa: RUF012  (as transformers writes it)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = Layer()

    @capture_outputs
    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        made, _ = self.layer(inputs_embeds)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=inputs_embeds + made)


def test_what_hooks_note_is_returned_where_the_sum_is_in_the_function_that_collects_it() -> None:
    model, x = Collecting(transformers.PreTrainedConfig()).eval(), torch.randn(2, 3, 8)
    model(inputs_embeds=x, output_attentions=True)  # installs its hooks
    gated = surgery.insert_gates(model, surgery.find_sites(model, {"inputs_embeds": x}))
    with torch.no_grad(), surgery.force(gated, 1.0):
        assert gated(inputs_embeds=x).attentions is None
        assert len(gated(inputs_embeds=x, output_attentions=True).attentions) == 1


class Apart(nn.Module):
    """The sum lies in a module of its own, so that this one is traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        made, weights = self.layer(x)
        return residual + made, weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.apart = nn.LayerNorm(8), Apart()

    def forward(self, x: Tensor) -> Tensor:
        made, _ = self.apart(self.norm(x), x)
        return made


class Around(transformers.PreTrainedModel):  # type: ignore[name-defined, misc]
    """Hooks note what a module gives that is traced through, as DETR's attention is."""

    config_class = transformers.PreTrainedConfig
    _can_record_outputs = {"attentions": Apart}  # noqa: RUF012  (as transformers writes it)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.block = Block()

    @capture_outputs
    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=self.block(inputs_embeds))


@pytest.mark.parametrize("before", [True, False], ids=["before conversion", "after conversion"])
def test_a_call_that_returned_notes_leaves_later_calls_as_they_were(before: bool, caplog: Any) -> None:
    model = Around(transformers.PreTrainedConfig()).eval()
    x = torch.randn(2, 3, 8)
    expected = surgery.find_sites(model, {"inputs_embeds": x}).names
    if before:
        model(inputs_embeds=x, output_attentions=True)
    sites = surgery.find_sites(model, {"inputs_embeds": x})
    assert sites.names == expected
    gated = surgery.insert_gates(model, sites)
    with torch.no_grad(), surgery.force(gated, 0.0):
        was = gated(inputs_embeds=x).last_hidden_state
        assert len(gated(inputs_embeds=x, output_attentions=True).attentions) == 1
        caplog.clear()
        assert torch.equal(gated(inputs_embeds=x).last_hidden_state, was) and not caplog.records
    assert not torch.equal(was, model(inputs_embeds=x).last_hidden_state)
