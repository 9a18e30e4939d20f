"""`surgery convert hf:DIR` of a causal language model, by granularity and kinds of sites."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import surgery
from surgery.cards import card
from surgery.scripts.cli import app

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["once", "upon", "time", "there", "was", "little", "girl", "boy", "dog", "cat", "red", "ball", "ran", "park"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Llama, its tokenizer, and texts."""
    where = tmp_path_factory.mktemp("language")
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(where / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(names), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(where / "model")
    draw = random.Random(0)
    rows = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(6, 12)))}) for _ in range(120)]
    (where / "texts.jsonl").write_text("\n".join(rows))
    return where


def run(*arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


EXPECTED = {
    ("token", "attention,mlp"): {("attention", "token"), ("mlp", "token")},
    ("token", "attention,mlp,heads"): {("heads", "sample"), ("mlp", "token")},
    ("sample", "attention,mlp"): {("attention", "token"), ("mlp", "sample")},
    ("sample", "attention,mlp,heads"): {("heads", "sample"), ("mlp", "sample")},
    ("prefill", "attention,mlp"): {("attention", "prefill"), ("mlp", "prefill")},
    ("prefill", "attention,mlp,heads"): {("heads", "prefill"), ("mlp", "prefill")},
}


@pytest.mark.parametrize(("granularity", "sites"), EXPECTED)
def test_converts_scores_and_generates(granularity: str, sites: str, place: Path, tmp_path: Path) -> None:
    texts, out = place / "texts.jsonl", tmp_path / "out"
    options = ("--validation-split", "train", "--budget", 0.8, "--tune", "oneshot", "--batch-size", 8)
    chosen = ("--granularity", granularity, "--sites", sites, "--data", texts, "--validation", texts)
    found = run("convert", f"hf:{place / 'model'}", "--out", out, *chosen, *options)
    assert {(row["kind"], row["granularity"]) for row in found["sites"]} == EXPECTED[granularity, sites]
    assert 0.3 < found["cost"] <= 0.82  # less where the static policy of the budget runs
    per_sample = "sample" in {grain for _, grain in EXPECTED[granularity, sites]}
    assert any("decisions per sample" in text for text in found["notes"]) == per_sample
    report = run("score", out, "--data", texts, "--split", "train", "--batch-size", 8, "--no-peers")
    assert [phase["name"] for phase in report["phases"]] == ["prefill", "decode"] and "nats_per_token" in report[
        "metric"
    ]
    assert all(0 < phase["cost"] < 1 for phase in report["phases"])
    gated: Any = surgery.load(out)
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        written = gated.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (1, 7)


def test_page_and_card_say_what_prefill_and_decode_cost(place: Path, tmp_path: Path) -> None:
    texts, out = place / "texts.jsonl", tmp_path / "out"
    options = (
        "--validation",
        texts,
        "--validation-split",
        "train",
        "--budget",
        0.8,
        "--tune",
        "oneshot",
        "--batch-size",
        8,
    )
    run("convert", f"hf:{place / 'model'}", "--out", out, "--data", texts, *options)
    run("score", out, "--data", texts, "--split", "train", "--batch-size", 8, "--no-peers", "--keep")
    text = card(json.loads((out / "surgery_config.json").read_text("utf-8")), "me/it", (), {})
    assert re.search(r"\| 0\.8\d* \| decode \| \d+ \| 0\.\d+ \|", text)
    run(
        "report",
        out,
        "--data",
        texts,
        "--split",
        "train",
        "--out",
        tmp_path / "page.html",
        "--budgets",
        0.8,
        "--timed-batch",
        1,
    )
    assert "decode, FLOPs per token at" in (tmp_path / "page.html").read_text("utf-8")


def test_granularity_prefill_is_refused_by_name_where_it_cannot_be(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64
    )
    where = tmp_path / "bert"
    transformers.BertForSequenceClassification(config).save_pretrained(where)
    transformers.AutoTokenizer.from_pretrained(place / "model").save_pretrained(where)
    arguments = [
        "convert",
        f"hf:{where}",
        "--budget",
        "0.8",
        "--out",
        str(tmp_path / "out"),
        "--granularity",
        "prefill",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "'prefill' is for causal language models" in " ".join(result.stderr.split())
