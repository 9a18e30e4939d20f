"""Sites whose stream is `(N * T, C)`, samples and tokens on one axis (OPT's MLPs): everything that asks or executes gates sees
samples apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import decoder, generate
from torch import Tensor, nn

import surgery
from surgery import context
from surgery.calling import as_batch
from surgery.harm import label_harm

transformers = pytest.importorskip("transformers")


def batch_of(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (16, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


DATA = [batch_of(seed) for seed in range(9)]
MLPS = ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"]
KINDS = [
    ("token", "affine", "oneshot"),
    ("token", "low-rank", "train"),
    ("sample", "linear", "oneshot"),
    ("sample", "affine", "train"),
]

Convert = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def opt() -> nn.Module:
    return decoder("opt", layers=2).float()


@pytest.fixture(scope="module")
def convert(opt: nn.Module) -> Iterator[Convert]:
    made: dict[Any, nn.Module] = {}

    def converted(grain: str, skip: str, tune: str) -> nn.Module:
        key = grain, skip, tune
        if key not in made:
            options: dict[str, Any] = {"options": surgery.Options(steps=2)} if tune == "train" else {"tune": tune}
            made[key] = surgery.convert(opt, 0.75, data=DATA, sites=MLPS, granularity=grain, skip=skip, **options)
        return made[key]

    yield converted


def logits(model: nn.Module, batch: dict[str, Tensor], rows: slice = slice(None)) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{name: value[rows] for name, value in batch.items()}).logits
    return found


@pytest.mark.parametrize(("grain", "skip", "tune"), KINDS)
def test_conversion(grain: str, skip: str, tune: str, opt: nn.Module, convert: Convert) -> None:
    gated = convert(grain, skip, tune)
    assert all(planned.site.folded for planned in context.state_of(gated).plan.sites)
    routed = logits(gated, DATA[0])
    with surgery.execution(gated, "mask"):
        assert torch.allclose(routed, logits(gated, DATA[0]), atol=1e-5)
    with surgery.force(gated, 1.0):
        assert torch.equal(logits(gated, DATA[0]), logits(opt, DATA[0]))
    pinned = surgery.pin(gated, DATA[0])
    assert torch.allclose(routed, logits(pinned, DATA[0]), atol=1e-5)
    together = logits(gated, DATA[1])
    for row in range(3):
        assert torch.allclose(logits(gated, DATA[1], slice(row, row + 1))[0], together[row], atol=1e-5)


@pytest.mark.parametrize("grain", ["token", "sample"])
def test_tapes_hold_decisions_of_samples(grain: str, convert: Convert) -> None:
    gated = convert(grain, "affine", "oneshot" if grain == "token" else "train")
    with surgery.tape(gated) as events:
        logits(gated, DATA[0])
    mask = DATA[0]["attention_mask"].bool()
    for event in events:
        assert event.decisions.shape == (mask.shape if grain == "token" else mask.shape[:1])
        assert event.weights is None if grain == "sample" else torch.equal(event.weights, mask)


@pytest.mark.parametrize("grain", ["token", "sample"])
def test_harm_is_that_of_samples_and_padding_is_known(grain: str, opt: nn.Module) -> None:
    sites = surgery.find_sites(opt, DATA[0]).filter(*MLPS)
    gated = surgery.insert_gates(opt, sites.plan(granularity=grain))
    mask = DATA[0]["attention_mask"].bool()
    for label in label_harm(gated, as_batch(DATA[0])).values():
        assert label.harm.shape == (mask.shape if grain == "token" else mask.shape[:1])
        assert label.features.shape == ((*mask.shape, 32) if grain == "token" else (len(mask), 64))
        assert label.weights is None if grain == "sample" else torch.equal(label.weights, mask)


@pytest.mark.parametrize(("grain", "skip", "tune"), [KINDS[0], KINDS[-1]])
def test_measured_with_peers(grain: str, skip: str, tune: str, opt: nn.Module, convert: Convert) -> None:
    report = surgery.measure(convert(grain, skip, tune), DATA, dense=opt, speed=())
    assert {"static", "importance", "random", "shuffled"} <= {peer.name for peer in report.peers}
    assert all(abs(peer.cost - report.cost) < 0.08 for peer in report.peers)


@pytest.mark.parametrize(("grain", "skip", "tune"), [KINDS[0], KINDS[-1]])
def test_replay(grain: str, skip: str, tune: str, convert: Convert, tmp_path: Path) -> None:
    gated = convert(grain, skip, tune)
    with surgery.record(gated, tmp_path / "log"):
        for batch in DATA[:2]:
            logits(gated, batch)
    replayed = surgery.replay(gated, surgery.read_log(tmp_path / "log"), DATA[:2])
    assert replayed.rows == replayed.equal == 32 and not replayed.differing


@pytest.mark.parametrize("grain", ["token", "prefill"])
def test_routed_generation_with_and_without_a_cache(grain: str) -> None:
    model = decoder("opt", layers=2)
    gated = surgery.convert(model, 0.75, data=DATA, tune="oneshot", granularity=grain, skip="affine")
    ids, mask = DATA[0]["input_ids"][-2:], DATA[0]["attention_mask"][-2:]
    cached = generate(gated, ids, mask, 8, use_cache=True)
    assert torch.equal(cached, generate(gated, ids, mask, 8, use_cache=False))
