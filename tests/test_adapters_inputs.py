"""Made-up inputs: the model runs on them, they are alike on every pass, and they look as they should."""

from __future__ import annotations

import io

import numpy
import pytest
import timm
import torch
import transformers as t
from PIL import Image

from surgery.adapters import adapter_for
from surgery.adapters.images import natural_images, to_pil, to_tensor
from surgery.adapters.timm import TimmPreprocess
from surgery.adapters.vocabulary import Vocabulary
from surgery.calling import call, dtype_of
from surgery.errors import DataError

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {**SIZE, "vocab_size": 96, "max_position_embeddings": 40}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN_DECODER = {key: value for key, value in DECODER.items() if key not in ("num_key_value_heads", "head_dim")}
PICTURE = {**SIZE, "image_size": 16, "patch_size": 8}
WAVES = {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 4]} | {
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
SEQUENCES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 96} | {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
TEXT, PIXELS, DECODES = {"input_ids", "attention_mask"}, {"pixel_values"}, {"decoder_input_ids"}
TYPED = TEXT | {"token_type_ids"}

ZOO = [
    ("BertForSequenceClassification", ENCODER, TYPED),
    ("RobertaModel", {**ENCODER, "type_vocab_size": 1}, TEXT),
    ("XLMRobertaModel", {**ENCODER, "type_vocab_size": 1}, TEXT),
    ("ElectraModel", {**ENCODER, "embedding_size": 16}, TYPED),
    ("DistilBertModel", {"vocab_size": 96, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, TEXT),
    ("AlbertModel", {**ENCODER, "embedding_size": 8}, TYPED),
    ("MPNetModel", ENCODER, TEXT),
    ("DebertaV2Model", ENCODER, TEXT),
    ("ModernBertModel", {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, TEXT),
    ("ViTForImageClassification", PICTURE, PIXELS),
    ("DeiTModel", PICTURE, PIXELS),
    ("Dinov2Model", PICTURE, PIXELS),
    ("SwinModel", {"image_size": 16, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}, PIXELS),
    ("CLIPModel", {"text_config": ENCODER, "vision_config": PICTURE}, TEXT | PIXELS),
    ("CLIPForImageClassification", {"text_config": ENCODER, "vision_config": PICTURE}, PIXELS),
    ("SiglipModel", {"text_config": ENCODER, "vision_config": PICTURE}, TEXT | PIXELS),
    ("ConvNextModel", {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}, PIXELS),
    ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}, PIXELS),
    (
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "image_size": 64},
        PIXELS,
    ),
    ("VideoMAEModel", {**PICTURE, "num_frames": 4}, PIXELS),
    ("Wav2Vec2Model", {**SIZE, **WAVES}, {"input_values"}),
    ("HubertModel", {**SIZE, **WAVES, "feat_extract_norm": "layer"}, {"input_values", "attention_mask"}),
    ("ASTModel", {**SIZE, "max_length": 48, "num_mel_bins": 24}, {"input_values"}),
    (
        "WhisperForConditionalGeneration",
        {**SEQUENCES, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 12}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        {"input_features"} | DECODES,
    ),
    (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
        | {"decoder_start_token_id": 0},
        TEXT | DECODES,
    ),
    ("BartForConditionalGeneration", {**SEQUENCES, "max_position_embeddings": 40}, TEXT | DECODES),
    ("BartForSequenceClassification", {**SEQUENCES, "max_position_embeddings": 40}, TEXT),
    (
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 96, "n_positions": 40}
        | {"bos_token_id": 1, "eos_token_id": 1},
        TEXT,
    ),
    ("GPTNeoXForCausalLM", PLAIN_DECODER, TEXT),
    (
        "OPTForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 96}
        | {"max_position_embeddings": 40, "word_embed_proj_dim": 16},
        TEXT,
    ),
    ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 96}, TEXT),
    ("FalconForCausalLM", PLAIN_DECODER, TEXT),
    ("PhiForCausalLM", PLAIN_DECODER, TEXT),
    ("Phi3ForCausalLM", {**PLAIN_DECODER, "num_key_value_heads": 1}, TEXT),
    ("LlamaForCausalLM", DECODER, TEXT),
    ("MistralForCausalLM", DECODER, TEXT),
    ("Qwen2ForCausalLM", {**PLAIN_DECODER, "num_key_value_heads": 1}, TEXT),
    ("Qwen3ForCausalLM", DECODER, TEXT),
    ("Gemma2ForCausalLM", DECODER, TEXT),
    ("Gemma3ForCausalLM", DECODER, TEXT),
    ("Olmo2ForCausalLM", {**PLAIN_DECODER, "num_key_value_heads": 1}, TEXT),
    ("MixtralForCausalLM", {**DECODER, "num_local_experts": 2}, TEXT),
    ("Qwen3MoeForCausalLM", {**DECODER, **MOE}, TEXT),
    ("MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 96, "state_size": 4}, TEXT),
]


def build(name, changes):
    torch.manual_seed(0)
    cls = getattr(t, name)
    return cls(cls.config_class(**changes)).eval()


def llama(**changes):
    return build("LlamaForCausalLM", {**DECODER, **changes})


@pytest.mark.parametrize(("name", "changes", "names"), ZOO, ids=[entry[0] for entry in ZOO])
def test_transformers_models_run_on_what_is_made_up(name, changes, names):
    model = build(name, changes)
    adapter = adapter_for(model)
    example = adapter.example(model, 3)
    assert set(example.kwargs) == names
    assert example.size == 3
    synthetic = list(adapter.inputs(model, 3, batch_size=2))
    assert [batch.size for batch in synthetic] == [2, 1]
    for batch in (example, adapter.example(model, 1), *synthetic):
        with torch.no_grad():
            call(model, batch)
        if "input_ids" in batch.kwargs:
            assert 0 <= int(batch.kwargs["input_ids"].min()) <= int(batch.kwargs["input_ids"].max()) < 96


def test_the_last_row_of_an_example_is_padded():
    batch = adapter_for(model := llama()).example(model, 3)
    mask = batch.kwargs["attention_mask"]
    assert mask[:2].all()
    assert 0 < int(mask[2].sum()) < mask.shape[1]
    assert (batch.kwargs["input_ids"][mask == 0] == 0).all()


def test_synthetic_texts_of_encoders_differ_in_length():
    model = build("BertModel", {**ENCODER, "pad_token_id": 0, "cls_token_id": 5, "sep_token_id": 6})
    (batch,) = adapter_for(model).inputs(model, 16, 16)
    lengths = batch.kwargs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 4
    assert int(lengths.max()) <= 40
    tokens = batch.kwargs["input_ids"]
    assert (tokens[:, 0] == 5).all()
    assert (tokens[torch.arange(16), lengths - 1] == 6).all()
    inner = torch.cat([row[1 : n - 1] for row, n in zip(tokens, lengths, strict=True)])
    assert not torch.isin(inner, torch.tensor([0, 5, 6])).any()


def test_language_models_write_their_own_text():
    model = llama()
    with torch.no_grad():  # a model that says 7 after everything
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
        model.model.norm.weight.zero_()
        model.model.norm.register_forward_hook(lambda *_: torch.full_like(_[2], 50.0))
    (batch,) = adapter_for(model).inputs(model, 4, 4)
    assert (batch.kwargs["input_ids"][:, 0] == 1).all()
    assert (batch.kwargs["input_ids"][:, 1:] == 7).all()
    assert batch.kwargs["attention_mask"].all()


def test_text_after_the_end_is_masked():
    model = llama(eos_token_id=[2, *range(3, 40)])  # something ends nearly every text soon
    (batch,) = adapter_for(model).inputs(model, 8, 8)
    tokens, mask = batch.kwargs["input_ids"], batch.kwargs["attention_mask"]
    lengths = mask.sum(1)
    assert int(lengths.min()) < tokens.shape[1]
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        ends = torch.isin(row[1:length], torch.tensor([2, *range(3, 40)]))
        assert not ends[:-1].any()
        assert (row[length:] == 0).all()


def test_models_that_cannot_write_get_random_tokens(monkeypatch, caplog):
    model = llama()
    monkeypatch.setattr(model, "generate", lambda *_, **__: (_ for _ in ()).throw(ValueError("no")), raising=False)
    (batch,) = adapter_for(model).inputs(model, 4, 4)
    assert batch.size == 4
    assert "LlamaForCausalLM cannot write text (no)" in caplog.text


@pytest.mark.parametrize("make", [llama, lambda: build("ViTModel", PICTURE), lambda: timm.create_model("resnet10t")])
def test_every_pass_is_alike_and_seeds_differ(make):
    model = make()
    adapter = adapter_for(model)

    def first(batch):
        return next(iter((*batch.args, *batch.kwargs.values())))

    data = adapter.inputs(model, 4, 2, seed=1)
    one, two = [first(batch) for batch in data], [first(batch) for batch in data]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1])
    other = [first(batch) for batch in adapter.inputs(model, 4, 2, seed=2)]
    assert not torch.equal(one[0], other[0])


def test_making_inputs_leaves_the_model_and_the_random_state_alone():
    model = llama().train()
    state = torch.get_rng_state()
    list(adapter_for(model).inputs(model, 2, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())


def test_inputs_take_the_models_dtype():
    model = build("ViTModel", PICTURE).to(torch.bfloat16)
    assert adapter_for(model).example(model).kwargs["pixel_values"].dtype is dtype_of(model) is torch.bfloat16


def test_unknown_main_inputs_are_refused():
    model = llama()
    model.main_input_name = "spectrum"
    with pytest.raises(DataError, match=r"called with 'spectrum'.*example="):
        adapter_for(model).example(model)


@pytest.mark.parametrize(("count", "size"), [(0, 2), (2, 0)])
def test_counts_are_checked(count, size):
    with pytest.raises(ValueError, match="at least 1"):
        adapter_for(model := llama()).inputs(model, count, size)


def test_specials_of_the_config_are_no_words():
    words = Vocabulary.of(llama(pad_token_id=3)).words.tolist()
    assert not {1, 2, 3} & set(words)
    assert len(words) == 93


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "options", [{}, {"in_chans": 1}, {"in_chans": 4}, {"img_size": 64, "name": "vit_tiny_patch16_224"}]
)
def test_timm_models_run_on_what_is_made_up(options):
    options = dict(options)
    model = timm.create_model(options.pop("name", "resnet10t"), **options).eval()
    batch = adapter_for(model).example(model)
    with torch.no_grad():
        call(model, batch)
    assert batch.args[0].shape[1] == options.get("in_chans", 3)
    assert batch.args[0].shape[2] == options.get("img_size", batch.args[0].shape[2])


def test_synthetic_pictures_have_the_statistics_of_natural_ones():
    pictures = natural_images(24, (3, 96, 96), mean=(0.0,), std=(1.0,), seed=0)
    assert float(pictures.min()) >= 0.0
    assert float(pictures.max()) <= 1.0
    assert 0.3 < float(pictures.mean()) < 0.6
    assert 0.15 < float(pictures.std()) < 0.4
    channels = torch.corrcoef(pictures.permute(1, 0, 2, 3).flatten(1))
    assert float(channels.min()) > 0.5  # colours are correlated
    neighbours = torch.corrcoef(torch.stack([pictures[..., 1:].flatten(), pictures[..., :-1].flatten()]))[0, 1]
    assert 0.8 < float(neighbours) < 0.99  # and so are neighbours

    # power falls as f^-2 or thereabouts: a line of slope -3 to -1.2 in the logarithms of power and frequency
    power = torch.fft.rfft(pictures - pictures.mean((-2, -1), keepdim=True)).abs().square().mean((0, 1, 2))[2:40]
    log_f = torch.arange(2, 40).float().log()
    slope = torch.corrcoef(torch.stack([log_f, power.log()]))[0, 1] * power.log().std() / log_f.std()
    assert -3.0 < float(slope) < -1.2


def test_synthetic_pictures_are_normalised_as_asked():
    plain = natural_images(2, (3, 32, 32), mean=(0.0,), std=(1.0,), seed=5)
    shifted = natural_images(2, (3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2,), seed=5)
    torch.testing.assert_close(shifted[:, 1], (plain[:, 1] - 0.4) / 0.2)


def _png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_pictures_of_all_kinds_are_read():
    tensor = torch.randint(0, 256, (3, 5, 7)).float() / 255
    picture = to_pil(tensor)
    assert picture.size == (7, 5)
    torch.testing.assert_close(to_tensor(picture), tensor)
    assert to_tensor(tensor, channels=1).shape == (1, 5, 7)
    assert to_pil(tensor[:1], colour=False).mode == "L"
    grey = numpy.linspace(0, 2**16 - 1, 35).astype(numpy.uint16).reshape(5, 7)
    for deep in (grey, _png(grey), Image.fromarray(grey.astype(numpy.int32))):
        expected = torch.from_numpy((grey / 257).round() / 255).float()[None]
        torch.testing.assert_close(to_tensor(deep), expected)
        torch.testing.assert_close(to_tensor(to_pil(deep)), expected.expand(3, -1, -1))
    assert (TimmPreprocess(numpy.asarray, channels=1)({"image": grey}) == (grey / 257).round()).all()
    assert to_pil(grey, colour=False).mode == "I;16", "what reads it itself gets all of it"
    for numbers, reason in ((numpy.ones((5, 7), numpy.float32), "floating-point"), (grey.astype(numpy.int32), "int32")):
        for read in (to_pil, to_tensor):
            with pytest.raises(DataError, match=f"{reason}.* has no known range"):
                read(numbers)
    with pytest.raises(DataError, match="values from 0 to 131070, expected 0 to 65535"):
        to_pil(Image.fromarray(2 * grey.astype(numpy.int32)))
    for bad in (3, b"no picture", {"bytes": None, "path": None}):
        with pytest.raises(DataError, match=r"decoded|expected an image"):
            to_pil(bad)
