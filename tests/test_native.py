"""Gated models as transformers' and timm's own checkpoints."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import timm
import torch
import transformers
from hub_server import WRITE, Hub
from subjects import assert_equal, enliven, outputs, subject
from test_checkpoints import converted, decisions
from torch import nn

import surgery
import surgery.adapters.huggingface
from surgery import checkpoints, configs
from surgery.adapters.timm import create_gated, evaluation_transform
from surgery.context import state_of
from surgery.errors import BaseMismatch, CheckpointError, OutputExists, PlanMismatch, SurgeryError, UnknownModel
from surgery.gates import iter_gates
from surgery.scripts.zoo import call

TEXT = ("transformers/bert", "transformers/llama")


def native(name: str, place: Path) -> nn.Module:
    gated = converted(subject(name))
    surgery.save(gated, place, native=True)
    return gated


def assert_alike(mine: nn.Module, theirs: nn.Module, example: Any) -> None:
    """Outputs and decisions, bit for bit."""
    (out, chosen), (expected, rechosen) = decisions(mine, example), decisions(theirs, example)
    assert_equal(out, expected)
    assert_equal(chosen, rechosen)


@pytest.mark.parametrize("name", TEXT)
def test_from_pretrained_gives_the_gated_model(name: str, tmp_path: Path) -> None:
    gated = native(name, tmp_path / "made")
    example = subject(name).example
    assert sorted(p.name for p in (tmp_path / "made").iterdir() if "generation" not in p.name) == [
        "config.json",
        "model.safetensors",
    ]
    loaded, info = type(subject(name).model).from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(info.values())
    assert_alike(loaded, gated, example)
    assert loaded.hf_quantizer.is_trainable and loaded.hf_quantizer.is_serializable()
    learns = {parameter for parameter in loaded.parameters() if parameter.requires_grad}
    assert learns == {p for _, gate in iter_gates(loaded) for p in gate.parameters()}
    for field in ("plan", "costs", "table", "budget", "threshold", "static", "policy"):
        assert getattr(state_of(loaded), field) == getattr(state_of(gated), field), field
    loaded.save_pretrained(tmp_path / "again")
    assert_alike(surgery.load(tmp_path / "again"), gated, example)
    dense = surgery.remove(loaded)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert_equal(
        outputs(type(dense).from_pretrained(tmp_path / "dense"), example), outputs(subject(name).model, example)
    )


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_way_to_load_in_a_dtype_is_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    one, example = subject(name), subject(name).example
    native(name, tmp_path / "native")
    surgery.save(converted(one), tmp_path / "whole", base=True)
    first = surgery.load(tmp_path / "whole", dtype=dtype)
    assert {p.dtype for _, gate in iter_gates(first) for p in gate.router.parameters()} == {torch.float32}
    assert_alike(type(one.model).from_pretrained(tmp_path / "native", dtype=dtype), first, example)
    assert_alike(surgery.load(tmp_path / "whole", dtype=dtype, device_map={"": "cpu"}), first, example)
    first.half()  # it is not taken for a quantised model


def test_a_device_map_streams_base_and_gates(tmp_path: Path) -> None:
    one = subject("transformers/bert")
    gated = converted(one)
    surgery.save(gated, tmp_path / "whole", base=True)
    loaded = surgery.load(tmp_path / "whole", device_map="auto")
    assert_alike(loaded, gated, one.example)
    assert not hasattr(loaded, "hf_quantizer") and not hasattr(loaded.config, "quantization_config")
    weights = tmp_path / "whole" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-40:] = bytes(40)
    weights.write_bytes(content)
    for options in ({}, {"device_map": "cpu"}):
        with pytest.raises(BaseMismatch, match="sha256"):
            surgery.load(tmp_path / "whole", **options)  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="device_map"):
        surgery.load(tmp_path / "whole", device_map="cpu", model=one.model)


def test_low_memory_loading_to_disk(tmp_path: Path) -> None:
    one = subject("transformers/llama")
    gated = converted(one)
    surgery.save(gated, tmp_path / "made", native=True)
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(one.model.config.num_hidden_layers)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = type(one.model).from_pretrained(
        tmp_path / "made", device_map={**layers, **rest}, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert torch.equal(call(loaded, one.example).logits, call(gated, one.example).logits)


@pytest.mark.parametrize("name", TEXT)
def test_a_base_directory_is_the_dense_model_to_transformers(name: str, tmp_path: Path) -> None:
    one = subject(name)
    gated = converted(one)
    surgery.save(gated, tmp_path / "made", base=True)
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())
    dense = type(one.model).from_pretrained(tmp_path / "made")
    assert_equal(outputs(dense, one.example), outputs(one.model, one.example))
    assert_alike(surgery.load(tmp_path / "made"), gated, one.example)


def test_a_base_directory_is_the_dense_model_to_timm(tmp_path: Path) -> None:
    for name in ("timm/test_resnet",):
        one = subject(name)
        gated = converted(one)
        surgery.save(gated, tmp_path / name, base=True)
        dense = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert_equal(outputs(dense, one.example), outputs(one.model, one.example))
        assert_alike(surgery.load(tmp_path / name), gated, one.example)
        helped = create_gated(f"local-dir:{tmp_path / name}")
        assert_alike(helped, gated, one.example)
        picture = PIL.Image.new("RGB", (200, 300))
        assert evaluation_transform(helped)(picture).shape == (3, 160, 160)  # what it was pretrained with
    with pytest.raises(UnknownModel, match="hf-hub:user/name"):
        create_gated("resnet50")


def test_networks_without_an_ecosystem_have_no_such_layout(tmp_path: Path) -> None:
    gated = converted(subject("plain/own_vit"))
    for options in ({"base": True}, {"native": True}):
        with pytest.raises(CheckpointError, match="network of your own|transformers models"):
            surgery.save(gated, tmp_path / "made", **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="base=True"):
        surgery.save(converted(subject("timm/test_resnet")), tmp_path / "made", native=True)
    with pytest.raises(SurgeryError, match="not both"):
        surgery.save(gated, tmp_path / "made", base=True, native=True)
    with pytest.raises(SurgeryError, match="spec=…"):
        surgery.save(gated, tmp_path / "made", base="timm:x")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_only_conversions_are_replaced(tmp_path: Path) -> None:
    one = subject("transformers/bert")
    gated = native("transformers/bert", tmp_path / "made")
    surgery.save(gated, tmp_path / "made", native=True, overwrite=True)
    one.model.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    with pytest.raises(OutputExists, match="no converted model"):
        surgery.save(gated, tmp_path / "dense", native=True, overwrite=True)


def test_damaged_native_configs_are_refused_by_name(tmp_path: Path) -> None:
    native("transformers/bert", tmp_path / "made")
    file = tmp_path / "made" / "config.json"
    config = json.loads(file.read_text())
    cls = type(subject("transformers/bert").model)

    def load(**changes: Any) -> None:
        broken = copy.deepcopy(config)
        broken["quantization_config"].update(changes)
        file.write_text(json.dumps(broken))
        cls.from_pretrained(tmp_path / "made")  # type: ignore[attr-defined]

    with pytest.raises(CheckpointError, match=r"format version 2.*pip install -U"):
        load(format_version=2)
    with pytest.raises(CheckpointError, match="unknown: colour"):
        load(colour=1)
    plan = config["quantization_config"]["plan"]
    with pytest.raises(PlanMismatch):
        sites = [{**one, "site": {**one["site"], "anchor": ["elsewhere"]}} for one in plan["sites"]]
        load(plan={**plan, "sites": sites})


def test_trainer_evaluates_and_trains_gates_only(tmp_path: Path) -> None:
    one = subject("transformers/bert")
    gated = enliven(surgery.insert_gates(one.model, one.plan))
    state_of(gated).budget = 0.5
    surgery.save(gated, tmp_path / "made", native=True)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "made")
    rows = [
        {"input_ids": torch.randint(5, 90, (12,)), "attention_mask": torch.ones(12, dtype=torch.long), "labels": i % 2}
        for i in range(8)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2, report_to=[],
        learning_rate=1e-2, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(loaded, arguments, train_dataset=rows, eval_dataset=rows)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert "eval_loss" in trainer.evaluate()
    trainer.train()
    changed = {name for name, value in loaded.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("skip_path" in name for name in changed)  # routers learn in `train_routers` only
    trainer.save_model(str(tmp_path / "trained"))
    assert_alike(surgery.load(tmp_path / "trained"), loaded, subject("transformers/bert").example)


def test_generate_after_loading(tmp_path: Path) -> None:
    gated = native("transformers/llama", tmp_path / "made")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    tokens = torch.randint(5, 90, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mine, theirs = loaded.generate(tokens, **options), gated.generate(tokens, **options)  # type: ignore[operator]
    assert torch.equal(mine, theirs)


def test_a_quantised_base_is_not_written_over(tmp_path: Path) -> None:
    gated = converted(subject("transformers/bert"))
    gated.config.quantization_config = {"quant_method": "other"}  # type: ignore[union-attr]
    gated.config.quantization_config = type("Q", (), {"quant_method": "other"})()  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="quantised"):
        gated.save_pretrained(tmp_path / "made")  # type: ignore[operator]


FRESH = """
import sys, torch, transformers
import surgery.adapters.huggingface
from transformers import AutoModelForSequenceClassification, pipeline

where = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(where)
served = pipeline("text-classification", model=where)
assert any("surgery_gates" in name for name in served.model.state_dict())
batch = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    assert torch.equal(model(**batch["inputs"]).logits, batch["logits"])
print(served(["fine words", "a"])[0]["label"])
"""


def test_fresh_process_serves_a_pushed_model_through_pipeline(tmp_path: Path) -> None:
    gated = text_classifier(tmp_path / "base")
    inputs = {"input_ids": torch.tensor([[2, 4, 5, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": gated(**inputs).logits}, tmp_path / "batch.pt")
    with Hub() as hub:
        places = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": WRITE,
            "HF_HUB_DISABLE_XET": "1",
        }
        environment = {**os.environ, **places, "HF_HUB_OFFLINE": "0"}
        surgery.save(gated, tmp_path / "made", native=True)
        push = [sys.executable, "-m", "surgery.scripts.cli", "push", str(tmp_path / "made"), "me/text"]
        subprocess.run(push, env=environment, check=True, capture_output=True, timeout=120)
        text = hub.files("me/text")["README.md"].decode()
        assert (
            "library_name: transformers" in text and 'BertForSequenceClassification.from_pretrained("me/text")' in text
        )
        fresh = [sys.executable, "-c", FRESH, "me/text", str(tmp_path / "batch.pt")]
        done = subprocess.run(fresh, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("LABEL_0", "LABEL_1")


def text_classifier(place: Path) -> nn.Module:
    """A tiny BERT with a tokenizer, converted."""
    (place / "words").mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "fine", "words", "a"]
    (place / "words" / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(place)
    transformers.BertTokenizer(str(place / "words" / "vocab.txt")).save_pretrained(place)
    loaded = surgery.adapters.load_model(f"hf:{place}").model
    example = {"input_ids": torch.randint(4, 7, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    gated = enliven(surgery.insert_gates(loaded, surgery.find_sites(loaded, example)))
    state_of(gated).budget = 0.5
    return gated


def test_tokenizers_travel_along(tmp_path: Path) -> None:
    gated = text_classifier(tmp_path / "base")
    for options in ({"base": True}, {"native": True}):
        surgery.save(gated, tmp_path / str(options), **options)  # type: ignore[arg-type]
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / str(options))("fine a")["input_ids"] == [
            2,
            4,
            6,
            3,
        ]


def test_plain_save_of_a_native_model_refers_to_its_base(tmp_path: Path) -> None:
    gated = native("transformers/bert", tmp_path / "native")
    loaded = surgery.load(tmp_path / "native")
    surgery.save(loaded, tmp_path / "ours")
    assert configs.read_config(tmp_path / "ours")["base"]["included"] is False
    one = subject("transformers/bert")
    assert_alike(checkpoints.load(tmp_path / "ours", model=one.model), gated, one.example)
