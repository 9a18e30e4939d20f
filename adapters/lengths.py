"""Batches of texts of like length, as transformers' `group_by_length` makes them: less of a batch is padding.

Texts are mixed, sorted by length within groups of many batches, and cut into batches, which are mixed again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

BATCHES = 50
"""Batches in a group that is sorted: enough that lengths within one batch are alike, few enough that batches differ."""


def group_by_length(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """An order of the texts, `lengths` by place, in which every `batch_size` places in a row are of like length.

    What is left over after the last full batch comes last and is of any length.
    """
    mixer = random.Random(seed)
    places = list(range(len(lengths)))
    mixer.shuffle(places)
    full = len(places) - len(places) % batch_size
    step = BATCHES * batch_size
    chunks = [
        sorted(places[start : min(start + step, full)], key=lengths.__getitem__) for start in range(0, full, step)
    ]
    cut = [chunk[start : start + batch_size] for chunk in chunks for start in range(0, len(chunk), batch_size)]
    mixer.shuffle(cut)
    return [place for batch in cut for place in batch] + places[full:]
