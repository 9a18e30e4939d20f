"""The part of the zoo from Hugging Face transformers: random networks of two or three layers, 32 channels wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgery.scripts.zoo import Adds, Entry, Example, pixel_values, texts

WIDTH = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {
    **WIDTH,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = {**WIDTH, "image_size": 32, "patch_size": 8}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
GPT = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PAIR = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def entry(
    name: str,
    model: str,
    config: str,
    options: dict[str, Any],
    inputs: Callable[[int], Example],
    note: str = "",
    **adds: Adds,
) -> Entry:
    """An entry for `transformers.<model>(transformers.<config>(**options))`."""

    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Entry(f"transformers/{name}", make, inputs, tuple(adds.items()), note)


def _text_and_image(length: int) -> Callable[[int], Example]:
    return lambda samples: {**texts(length)(samples), **pixel_values(32)(samples)}


def _sound(samples: int) -> Example:
    return {"input_values": torch.randn(samples, 800)}


def _video(samples: int) -> Example:
    return {"pixel_values": torch.randn(samples, 4, 3, 32, 32)}


def _spectrogram(samples: int) -> Example:
    return {
        "input_features": torch.randn(samples, 16, 40),
        "decoder_input_ids": torch.randint(5, 90, (samples, 6)),
    }


_PAIRS = texts(10, decoder_input_ids=6)

ENTRIES: tuple[Entry, ...] = (
    # Encoders of text.
    entry("bert", "BertForSequenceClassification", "BertConfig", TEXT, texts(), BertLayer=2),
    entry("roberta", "RobertaForSequenceClassification", "RobertaConfig", TEXT, texts(), RobertaLayer=2),
    entry("xlm-roberta", "XLMRobertaForTokenClassification", "XLMRobertaConfig", TEXT, texts(), XLMRobertaLayer=2),
    entry("electra", "ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 16}, texts(),
          ElectraLayer=2),
    entry("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig",
          {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
          texts(), TransformerBlock=2),
    entry("albert", "AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16}, texts(),
          note="one layer, used three times", AlbertLayer=2),
    entry("mpnet", "MPNetForSequenceClassification", "MPNetConfig", TEXT, texts(), MPNetLayer=2),
    entry("deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config",
          {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
           "norm_rel_ebd": "layer_norm", "share_att_key": True}, texts(), DebertaV2Layer=2),
    entry("xlnet", "XLNetForSequenceClassification", "XLNetConfig",
          {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "pad_token_id": 0}, texts(),
          note="samples on the second axis", XLNetRelativeAttention=1, XLNetFeedForward=1),
    entry("modernbert", "ModernBertForSequenceClassification", "ModernBertConfig",
          {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, texts(), ModernBertEncoderLayer=2),
    # Images.
    entry("vit", "ViTForImageClassification", "ViTConfig", IMAGE, pixel_values(32), ViTLayer=2),
    entry("deit", "DeiTForImageClassification", "DeiTConfig", IMAGE, pixel_values(32), DeiTLayer=2),
    entry("dinov2", "Dinov2ForImageClassification", "Dinov2Config", IMAGE, pixel_values(32), Dinov2Layer=2),
    entry("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", IMAGE, pixel_values(32), DINOv3ViTLayer=2),
    entry("beit", "BeitForImageClassification", "BeitConfig", {**IMAGE, "use_relative_position_bias": True},
          pixel_values(32), BeitLayer=2),
    entry("videomae", "VideoMAEForVideoClassification", "VideoMAEConfig", {**IMAGE, "num_frames": 4}, _video,
          VideoMAELayer=2),
    entry("vitdet", "VitDetModel", "VitDetConfig",
          {**WIDTH, "image_size": 32, "patch_size": 4, "window_size": 4, "window_block_indices": [0],
           "residual_block_indices": [1], "use_relative_position_embeddings": True}, pixel_values(32), VitDetLayer=2,
          VitDetResBottleneckBlock=1),
    entry("swin", "SwinForImageClassification", "SwinConfig",
          {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
          pixel_values(32), SwinLayer=2),
    entry("convnext", "ConvNextForImageClassification", "ConvNextConfig",
          {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]}, pixel_values(64), ConvNextLayer=1),
    entry("resnet", "ResNetForImageClassification", "ResNetConfig",
          {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]}, pixel_values(64),
          ResNetBottleNeckLayer=1),
    entry("segformer", "SegformerForImageClassification", "SegformerConfig",
          {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2], "num_attention_heads": [1, 2, 2, 4]},
          pixel_values(64), SegformerLayer=2),
    # Two towers, sound, encoder and decoder.
    entry("clip", "CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
          _text_and_image(10), CLIPEncoderLayer=2),
    entry("siglip", "SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": IMAGE}, _text_and_image(10),
          note="the pooling head has an MLP branch", SiglipEncoderLayer=2, SiglipMultiheadAttentionPoolingHead=1),
    entry("wav2vec2", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
          {**WIDTH, "vocab_size": 99, "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
           "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}, _sound,
          note="the positional convolution is a branch", Wav2Vec2EncoderLayer=2, Wav2Vec2PositionalConvEmbedding=1),
    entry("whisper", "WhisperForConditionalGeneration", "WhisperConfig",
          {**PAIR, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}, _spectrogram,
          WhisperEncoderLayer=2, WhisperDecoderLayer=3),
    entry("t5", "T5ForConditionalGeneration", "T5Config",
          {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0}, _PAIRS, T5LayerSelfAttention=1, T5LayerCrossAttention=1, T5LayerFF=1),
    entry("bart", "BartForConditionalGeneration", "BartConfig",
          {**PAIR, "max_position_embeddings": 64, "forced_eos_token_id": 2}, _PAIRS, BartEncoderLayer=2,
          BartDecoderLayer=3),
    entry("marian", "MarianMTModel", "MarianConfig", {**PAIR, "max_position_embeddings": 64}, _PAIRS,
          MarianEncoderLayer=2, MarianDecoderLayer=3),
    # Decoders of text.
    entry("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT, texts(), GPT2Block=2),
    entry("gptj", "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, texts(), GPTJBlock=2),
    entry("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, texts(), GPTNeoXLayer=2),
    entry("opt", "OPTForCausalLM", "OPTConfig",
          {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64,
           "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0}, texts(), OPTDecoderLayer=2),
    entry("bloom", "BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 3, "n_head": 4},
          texts(), BloomBlock=2),
    entry("falcon", "FalconForCausalLM", "FalconConfig",
          {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bos_token_id": 1,
           "eos_token_id": 2}, texts(), FalconDecoderLayer=2),
    entry("cohere", "CohereForCausalLM", "CohereConfig", GROUPED, texts(), CohereDecoderLayer=2),
    entry("phi", "PhiForCausalLM", "PhiConfig", TEXT, texts(), PhiDecoderLayer=2),
    entry("phi3", "Phi3ForCausalLM", "Phi3Config", GROUPED, texts(), Phi3DecoderLayer=2),
    entry("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED, texts(), LlamaDecoderLayer=2),
    entry("mistral", "MistralForCausalLM", "MistralConfig", GROUPED, texts(), MistralDecoderLayer=2),
    entry("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, texts(), Qwen2DecoderLayer=2),
    entry("qwen3", "Qwen3ForCausalLM", "Qwen3Config", HEADS, texts(), Qwen3DecoderLayer=2),
    entry("gemma2", "Gemma2ForCausalLM", "Gemma2Config", HEADS, texts(), Gemma2DecoderLayer=2),
    entry("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", HEADS, texts(), Gemma3DecoderLayer=2),
    entry("olmo2", "Olmo2ForCausalLM", "Olmo2Config", GROUPED, texts(), Olmo2DecoderLayer=2),
    entry("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", GROUPED, texts(), SmolLM3DecoderLayer=2),
    entry("stablelm", "StableLmForCausalLM", "StableLmConfig", GROUPED, texts(), StableLmDecoderLayer=2),
    entry("glm4", "Glm4ForCausalLM", "Glm4Config", HEADS, texts(), Glm4DecoderLayer=2),
    entry("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config",
          {**TEXT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
           "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
           "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}, texts(), DeepseekV3DecoderLayer=2),
    entry("mixtral", "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, texts(),
          MixtralDecoderLayer=2),
    entry("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
          {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, texts(),
          Qwen3MoeDecoderLayer=2),
    entry("mamba", "MambaForCausalLM", "MambaConfig",
          {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}, texts(), MambaBlock=1),
    entry("mamba2", "Mamba2ForCausalLM", "Mamba2Config",
          {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8, "head_dim": 8,
           "n_groups": 2, "chunk_size": 8}, texts(), Mamba2Block=1),
)  # fmt: skip
