"""Sets of phrases are recognised, and only texts that stand for themselves are kept."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from surgery.adapters.base import Loaded
from surgery.adapters.data import load_data
from surgery.adapters.phrases import is_phrase_set, whole_texts

WORDS = [
    "the",
    "a",
    "film",
    "story",
    "plot",
    "cast",
    "is",
    "was",
    "never",
    "always",
    "quite",
    "rather",
    "good",
    "bad",
    "dull",
    "bright",
    "and",
    "but",
]


def sentences(count: int) -> list[str]:
    return [
        " ".join(WORDS[(i * k + k * k + i // 7) % len(WORDS)] for k in range(1, 9)) + f" n{i}" for i in range(count)
    ]


def phrases(count: int) -> list[str]:
    """Every sentence with four of its parts."""
    return [part for s in sentences(count) for part in (s, s[: len(s) // 2].rsplit(" ", 1)[0], *s.split()[-3:])]


def test_the_texts_that_are_no_part_of_another_are_kept() -> None:
    assert whole_texts(["good film", "a good film .", "film", "a good film .", "filmed"]) == [1, 4]


def test_a_set_of_phrases_is_told_from_a_set_of_texts() -> None:
    assert is_phrase_set(phrases(100))
    assert not is_phrase_set(sentences(500))
    assert not is_phrase_set(phrases(10)), "too few to tell"


class Preprocess:
    needs = ("text",)

    def __call__(self, cells: Any) -> str:
        return str(cells["text"])


@pytest.mark.parametrize(("asked", "kept"), [("auto", 100), (True, 100), (False, 500)])
def test_loading_leaves_parts_out_where_asked(tmp_path: Path, asked: Any, kept: int) -> None:
    file = tmp_path / "train.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["text"], *([text] for text in phrases(100))])
    loaded: Any = Loaded.__new__(Loaded)
    object.__setattr__(loaded, "preprocess", Preprocess())
    object.__setattr__(loaded, "collate", lambda samples, labels: samples)
    loader = load_data(str(file), loaded, whole_texts=asked, shuffle=True, batch_size=50)
    texts = [text for batch in loader for text in batch]
    assert len(texts) == kept and loader.parts == 500 - kept
    if asked:
        assert set(texts) == set(sentences(100))
