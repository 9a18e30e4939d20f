"""Tiny decoders of every family that the laws of generation are shown on, and how they generate. Float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
OLDER: dict[str, Any] = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}


def _gemma3(transformers: Any, layers: int) -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"][:layers]
    options = {"head_dim": 8, "sliding_window": 4, "layer_types": kinds, **GROUPED}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(num_hidden_layers=layers, **options))


MODELS: dict[str, Callable[[Any, int], Any]] = {
    "llama": lambda t, n: t.LlamaForCausalLM(t.LlamaConfig(num_hidden_layers=n, **GROUPED)),
    "qwen3": lambda t, n: t.Qwen3ForCausalLM(t.Qwen3Config(num_hidden_layers=n, head_dim=8, **GROUPED)),
    "gemma3": _gemma3,
    "phi3": lambda t, n: t.Phi3ForCausalLM(t.Phi3Config(num_hidden_layers=n, **GROUPED)),
    "gemma2": lambda t, n: t.Gemma2ForCausalLM(
        t.Gemma2Config(num_hidden_layers=n, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, **GROUPED)
    ),
    "olmo2": lambda t, n: t.Olmo2ForCausalLM(t.Olmo2Config(num_hidden_layers=n, **GROUPED)),
    "mixtral": lambda t, n: t.MixtralForCausalLM(
        t.MixtralConfig(num_hidden_layers=n, num_local_experts=4, experts_implementation="eager", **GROUPED)
    ),
    "falcon": lambda t, n: t.FalconForCausalLM(
        t.FalconConfig(hidden_size=32, num_hidden_layers=n, num_attention_heads=4, **OLDER)
    ),
    "gptj": lambda t, n: t.GPTJForCausalLM(t.GPTJConfig(n_embd=32, n_layer=n, n_head=4, rotary_dim=4, **OLDER)),
    "gpt_neox": lambda t, n: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(num_hidden_layers=n, **SIZES)),
    "gpt2": lambda t, n: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=n, n_head=4, **OLDER)),
    "opt": lambda t, n: t.OPTForCausalLM(
        t.OPTConfig(
            hidden_size=32, num_hidden_layers=n, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, **OLDER
        )
    ),
}
"""Family -> builder, given transformers and the number of layers (2 or 3)."""
PADDED_WELL = [name for name in MODELS if name != "gemma2"]
"""Without Gemma 2, whose own mask overflows in float64: with three layers a padded prompt gives the dense model NaN."""


def decoder(name: str = "llama", layers: int = 3) -> nn.Module:
    """One of them; parameters that begin at zero or one are moved away from there."""
    import transformers

    torch.manual_seed(0)
    model: nn.Module = MODELS[name](transformers, layers).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double()


def generate(model: Any, ids: Tensor, mask: Tensor, new: int, **options: Any) -> Tensor:
    """The `new` tokens that a model writes greedily; a prompt that is alone has no padding."""
    if len(ids) == 1:
        ids, mask = ids[:, mask[0].bool()], mask[:, mask[0].bool()]
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
        )  # fmt: skip
    return out[:, -new:]
