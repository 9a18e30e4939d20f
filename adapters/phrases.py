"""Sets of phrases: most texts are parts of others, as in GLUE's SST-2, whose training set holds every phrase of every sentence.

A network that is run on whole texts is better tuned and calibrated on these alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

SAMPLE = 200
SHARE = 0.5
MOST = 200_000


def is_phrase_set(texts: Sequence[str], seed: int = 0) -> bool:
    """Whether more than half of a sample of the texts are parts of other texts, word for word."""
    if not 2 * SAMPLE <= len(texts) <= MOST:
        return False
    joined = "\n".join(map(_framed, texts))
    sample = random.Random(seed).sample(range(len(texts)), SAMPLE)
    return sum(joined.count(_framed(texts[index])) > 1 for index in sample) > SHARE * SAMPLE


def whole_texts(texts: Sequence[str]) -> list[int]:
    """Indices, rising, of the texts that are no part of another one; of equal texts the first."""
    seen = ""
    kept = []
    for index in sorted(range(len(texts)), key=lambda index: (-len(texts[index].strip()), index)):
        framed = _framed(texts[index])
        if framed not in seen:
            kept.append(index)
            seen += framed + "\n"
    return sorted(kept)


def _framed(text: str) -> str:
    return f" {text.strip()} "
