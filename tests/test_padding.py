"""Gates per token close for padding where nothing reads what becomes of it, and stay as they are where something does."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_equal, enliven, outputs, subject
from torch import Tensor, nn

import surgery
from surgery.context import state_of, tape
from surgery.padding import is_unread
from surgery.scripts.zoo import COVERAGE, find

TEXTS = [
    entry.name
    for entry in COVERAGE
    if entry.name.startswith("transformers/")
    and isinstance(example := entry.example(1), dict)
    and "attention_mask" in example
    and entry.name.partition("/")[2] not in ("albert", "mamba", "mamba2")  # no sites
]


def gated_and_example(name: str) -> tuple[nn.Module, dict[str, Any]]:
    example = find(name).example(3, seed=2)
    assert isinstance(example, dict) and not example["attention_mask"].bool().all()
    return copy.deepcopy(subject(name).gated), example


@pytest.mark.parametrize("name", TEXTS)
def test_which_networks_read_padding(name: str) -> None:
    """SigLIP's text tower and XLNet's classifier go by what the last token became, whatever it is."""
    gated, example = gated_and_example(name)
    assert is_unread(gated, [example]) == (name not in ("transformers/siglip", "transformers/xlnet"))


@pytest.mark.parametrize("name", ["transformers/bert", "transformers/llama", "transformers/t5"])
def test_closing_padding_changes_nothing_else(name: str) -> None:
    gated, example = gated_and_example(name)
    real = example["attention_mask"].bool()
    found = []
    for closed in (False, True):
        state_of(gated).padding_is_unread = closed
        with surgery.execution(gated, "skip"), tape(gated) as events:
            results = outputs(gated, example)
        found.append((results, [e for e in events if e.decisions.shape == real.shape]))
    (before, opened), (after, shut) = found
    assert any((e.decisions & ~real).any() for e in opened) and not any((e.decisions & ~real).any() for e in shut)
    assert all(torch.equal(a.decisions[real], b.decisions[real]) for a, b in zip(opened, shut, strict=True))
    for a, b in zip(before, after, strict=True):
        if a.dim() == 4 and a.shape[::2] == real.shape:  # a cache, N H T D
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        if a.shape[:2] == real.shape:
            a, b = a[real], b[real]
        assert_close([b], [a])


def test_open_gates_are_open_for_padding_too() -> None:
    gated, example = gated_and_example("transformers/llama")  # its outputs hold every token's
    state_of(gated).padding_is_unread = True
    state_of(gated).threshold = -math.inf
    for mode in ("skip", "mask", "cond"):
        with surgery.execution(gated, mode):  # type: ignore[arg-type]
            assert_equal(outputs(gated, example), outputs(subject("transformers/llama").model, example))


class Mean(nn.Module):
    """A reader of all tokens, or of real ones."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embed = nn.Embedding(20, 16)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for mlp in self.mlps:
            x = x + mlp(x)
        weights = attention_mask.to(x.dtype) if self.masked else torch.ones_like(attention_mask, dtype=x.dtype)
        return self.head((x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))


def texts(padded: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(8):
        mask = torch.ones(16, 10, dtype=torch.long)
        mask[::2, 10 - padded :] = 0
        made.append({"input_ids": torch.randint(1, 20, (16, 10), generator=generator), "attention_mask": mask})
    return made


def test_calibration_finds_out_and_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = {}
    for masked in (False, True):
        model = Mean(masked=masked).eval()
        gated = surgery.convert(model, budget=0.7, data=texts(4), tune="oneshot", second_look=False)
        found[masked] = state_of(gated).padding_is_unread
        surgery.save(gated, tmp_path / str(masked))
        again = surgery.load(tmp_path / str(masked), model=model)
        assert state_of(again).padding_is_unread == masked
        batch = texts(4)[0]
        with torch.no_grad(), tape(again) as events:
            again(**batch)
        padding = batch["attention_mask"] == 0
        assert any((event.decisions & padding).any() for event in events) != masked
    assert found == {False: False, True: True}


def test_without_padding_there_is_nothing_to_try() -> None:
    gated = enliven(surgery.insert_gates(model := Mean(masked=True).eval(), surgery.find_sites(model, texts(4)[0])))
    assert is_unread(gated, texts(4))
    assert not is_unread(gated, texts(0))
    assert not is_unread(gated, [(torch.zeros(2, 10, dtype=torch.long), torch.ones(2, 10, dtype=torch.long))])
    assert not is_unread(subject("transformers/bert@sample").gated, [find("transformers/bert").example(3, seed=2)])
