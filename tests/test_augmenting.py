"""Texts that go on as another one of their batch does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from surgery.adapters.augmenting import SHARE, augment

KEYS = ("input_ids", "attention_mask", "token_type_ids")
START, END = 1, 2


def text(number: int, length: int) -> dict[str, Any]:
    """Tokens that say which text they are from and where they stood: `100 * number + place`."""
    tokens = [START, *(100 * number + place for place in range(1, length - 1)), END]
    return {"input_ids": tokens, "attention_mask": [1] * length, "token_type_ids": [number] * length}


def spliced(lengths: list[int], seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    samples = [text(number + 1, length) for number, length in enumerate(lengths)]
    made, hold = augment(samples, torch.Generator().manual_seed(seed), KEYS)
    assert not hold
    return samples, made


@pytest.mark.parametrize("seed", range(5))
def test_a_beginning_and_an_end(seed: int) -> None:
    samples, made = spliced([12, 9, 12, 30, 6, 7], seed)
    for old, new in zip(samples, made, strict=True):
        tokens, kinds = new["input_ids"], new["token_type_ids"]
        assert len(tokens) == len(kinds) == len(new["attention_mask"]) <= len(old["input_ids"])
        assert tokens[0] == START and tokens[-1] == END and START not in tokens[1:] and END not in tokens[:-1]
        inner = list(zip(tokens[1:-1], kinds[1:-1], strict=True))
        assert all(token // 100 == kind for token, kind in inner)
        runs = [kind for place, (_, kind) in enumerate(inner) if not place or kind != inner[place - 1][1]]
        assert runs[0] == old["token_type_ids"][0] and len(runs) <= 2
        for (token, kind), (after, next_kind) in pairwise(inner):
            assert after == token + 1 or kind != next_kind


def test_half_of_the_texts_change_and_keep_their_length() -> None:
    samples, made = spliced([12] * 400)
    changed = [old != new for old, new in zip(samples, made, strict=True)]
    assert abs(sum(changed) / 400 - SHARE) < 0.1
    assert {len(new["input_ids"]) for new in made} == {12}
    starts = {sum(kind == new["token_type_ids"][0] for kind in new["token_type_ids"]) for new in made}
    assert starts == {12, *range(2, 10)}


def test_short_texts_and_what_is_no_text_stay() -> None:
    samples, made = spliced([5] * 50)
    assert samples == made
    waves = [{"input_values": torch.arange(4.0)} for _ in range(8)]
    made, hold = augment(waves, torch.Generator(), KEYS)
    assert made == waves and hold
    pictures, hold = augment([torch.rand(3, 16, 16) for _ in range(8)], torch.Generator(), ())
    assert hold and all(picture.shape == (3, 16, 16) for picture in pictures)
