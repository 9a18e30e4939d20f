"""The story writer's conversions, on a toy: rows, columns and tables, and what is kept."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.scripts import stories

WORDS = ("<unk>", "<s>", "a", "dog", "saw", "the", "red", "ball", "and", "ran", ".")
VARIANT = replace(stories.VARIANTS[0], budget=0.8)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path_factory.mktemp("stories")
    weights, data = root / "weights/stories260K", root / "data/tinystories"
    data.mkdir(parents=True)
    words = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(weights)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )
    ).save_pretrained(weights)  # fmt: skip
    draw = random.Random(0)
    for split, count in (("train", 64), ("test", 12)):
        texts = [" ".join(draw.choices(WORDS[2:], k=draw.randint(6, 12))) for _ in range(count)]
        pq.write_table(pa.table({"text": texts}), data / f"{split}.parquet")
    return root


def test_seeds_columns_and_times_end_in_one_table(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stories, "VARIANTS", (VARIANT,))
    monkeypatch.setattr(stories, "_HEALING", 2)

    def run(**more: Any) -> dict[str, Any]:
        stories.main(
            shared, tmp_path, limit=64, test_limit=12, epochs=1, only=None, skip=None, validate=False,
            threads=torch.get_num_threads(), **more,
        )  # fmt: skip
        return json.loads((tmp_path / "MLP-per-token.json").read_text("utf-8"))  # type: ignore[no-any-return]

    found = run(seeds=2, columns=True, timing=False)
    assert [(one["column"], one["seed"]) for one in found["runs"]] == [
        ("trained", 0), ("trained", 1), ("routers", 0), ("healed", 0),
    ]  # fmt: skip
    assert 1 < found["dense nats"] < 4  # ln 11 = 2.4 for weights that know nothing
    executions = [row["MLP executions"] for row in found["runs"][0]["rows"]]
    assert executions == sorted(executions, reverse=True) and executions[0] > executions[-1] + 0.1
    assert all(0.5 < row["skip cost"] < 1 for one in found["runs"] for row in one["rows"])
    table = capsys.readouterr().out
    assert "| MLP per token | 2 |" in table and "| row | trained | routers | healed |" in table and "x |" not in table

    again = run(seeds=2, columns=True, timing=True)  # nothing is converted a second time
    assert again["runs"] == found["runs"] and set(again["times"]) == {row["row"] for row in found["runs"][0]["rows"]}
    assert "x |" in capsys.readouterr().out

    with pytest.raises(SurgeryError, match="other settings.*choose another --out"):
        stories.tell(stories.Setting(shared, tmp_path, 64, 12, 1, skip="low-rank"), VARIANT, "trained", 0)


def test_nats_are_of_the_next_real_token() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]]))
    batch = {"input_ids": torch.tensor([[0, 1, 2]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    assert stories.nats([logits], [batch]) == pytest.approx(-(torch.tensor([0.25, 0.8]).log().mean().item()))
    batch["attention_mask"] = torch.tensor([[1, 1, 0]])
    assert stories.nats([logits], [batch]) == pytest.approx(1.386294, abs=1e-5)  # -ln 0.25
