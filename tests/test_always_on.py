"""What runs in full whatever routers say: the first tokens of every sequence, and the first layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
from decoders import PADDED_WELL, decoder
from torch import nn

import surgery
from surgery.context import state_of
from surgery.costs import observe
from surgery.errors import CheckpointError, SurgeryError
from surgery.gates import iter_gates

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [0, 0, 21, 22, 23, 24, 25], [0, 0, 0, 0, 0, 0, 34]])
MASK = (IDS > 0).long()
PADDED = {"input_ids": IDS, "attention_mask": MASK}
NEW = 6


def routed(name: str = "llama", **options: Any) -> nn.Module:
    """A decoder whose untrained routers close about half of what they are asked for."""
    model = decoder(name)
    gated = surgery.insert_gates(model, surgery.find_sites(model, PADDED).plan(**options))
    torch.manual_seed(1)
    for _, gate in iter_gates(gated):
        nn.init.normal_(gate.router.up.weight, std=1.0)
    state = state_of(gated)
    state.budget, state.threshold = 0.5, 0.0
    return gated


@pytest.fixture(scope="module")
def both() -> nn.Module:
    return routed(first_tokens=2, first_layers=1)


def closed_by_hand(gated: nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything closed but the first layer and the first two real tokens."""
    first = (mask.cumsum(1) <= 2) & mask.bool()
    names = state_of(gated).names
    layer = ("model.layers.0.", "transformer.h.0.", "model.decoder.layers.0.", "gpt_neox.layers.0.")
    return {name: torch.ones_like(first) if name.startswith(layer) else first for name in names}


@pytest.mark.parametrize("name", PADDED_WELL)
@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_no_threshold_closes_them(name: str, mode: Any) -> None:
    gated = routed(name, first_tokens=2, first_layers=1)
    state_of(gated).threshold = float("inf")
    with torch.no_grad(), surgery.execution(gated, mode), surgery.tape(gated) as events:
        found = gated(**PADDED).logits
    with torch.no_grad(), surgery.force(gated, closed_by_hand(gated, MASK)):
        expected = gated(**PADDED).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()])
    rates = {event.site: event.rates()[0].item() for event in events}
    assert sorted(rates.values()) == pytest.approx([2 / 7] * 4 + [1.0] * 2)


def generate(gated: Any, rows: slice = slice(None), **options: Any) -> torch.Tensor:
    return decoders.generate(gated, IDS[rows], MASK[rows], NEW, **options)


@pytest.mark.parametrize("name", PADDED_WELL)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_changes_nothing(name: str, options: dict[str, Any]) -> None:
    """The last prompt is a single token, so that its second token is decided in a call of its own."""
    gated = routed(name, first_tokens=2, first_layers=1)
    uncached = generate(gated, use_cache=False, **{k: v for k, v in options.items() if k == "num_beams"})
    assert torch.equal(generate(gated, **options), uncached)


@pytest.mark.parametrize("name", PADDED_WELL)
def test_padding_changes_nothing(name: str) -> None:
    gated = routed(name, first_tokens=2)
    together = generate(gated)
    for row in range(len(IDS)):
        assert torch.equal(generate(gated, slice(row, row + 1))[0], together[row]), f"row {row}"


def test_tokens_are_counted_from_where_the_cache_ends(both: nn.Module) -> None:
    """The same text in three calls: of one token, of two, of the rest."""
    ids = IDS[:1]
    state = state_of(both)
    with torch.no_grad(), surgery.tape(both) as whole:
        expected = both(input_ids=ids).logits
    cache, parts = transformers.DynamicCache(config=both.config), []
    with torch.no_grad(), surgery.tape(both) as events:
        for part in (ids[:, :1], ids[:, 1:3], ids[:, 3:]):
            parts.append(both(input_ids=part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    for name in state.names:
        (one,) = (event.decisions for event in whole if event.site == name)
        assert torch.equal(torch.cat([event.decisions for event in events if event.site == name], 1), one)


def test_routers_of_open_layers_are_not_asked_and_cost_nothing(both: nn.Module) -> None:
    gates = dict(iter_gates(both))
    asked: list[str] = []
    hooks = [gate.router.register_forward_hook(lambda *_, n=name: asked.append(n)) for name, gate in gates.items()]
    with torch.no_grad():
        both(**PADDED)
    for hook in hooks:
        hook.remove()
    costs = state_of(both).costs.sites
    assert asked == [name for name in gates if not name.startswith("model.layers.0.")] and len(asked) == 4
    assert [name for name, cost in costs.items() if cost.router == 0] == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
    ]


def test_forced_decisions_close_them(both: nn.Module) -> None:
    with torch.no_grad(), surgery.force(both, 0.0), surgery.tape(both) as events:
        both(**PADDED)
    assert len(events) == 6 and not any(event.decisions.any() for event in events)


def test_they_are_saved_and_shown(both: nn.Module, tmp_path: Path) -> None:
    surgery.save(both, tmp_path / "out")
    again = surgery.load(tmp_path / "out", model=decoder())
    plan, settings = state_of(again).plan, surgery.status(again)
    assert plan.first_tokens == settings.first_tokens == 2
    assert settings.always_on == ("model.layers.0.self_attn", "model.layers.0.mlp")
    text = str(settings)
    assert "always on: model.layers.0.self_attn, model.layers.0.mlp" in text and "the first 2 tokens" in text
    with torch.no_grad():
        assert torch.equal(again(**PADDED).logits, both(**PADDED).logits)


@pytest.mark.parametrize("value", [-1, True, 1.5])
def test_what_is_no_number_of_tokens_is_refused(value: Any) -> None:
    model = decoder()
    sites = surgery.find_sites(model, PADDED)
    with pytest.raises(SurgeryError, match="first_tokens must be a whole number"):
        sites.plan(first_tokens=value)


def test_a_checkpoint_with_too_many_first_tokens_is_refused(both: nn.Module, tmp_path: Path) -> None:
    state = state_of(both)
    was = state.plan
    state.plan = dataclasses.replace(was, first_tokens=-1)
    try:
        surgery.save(both, tmp_path / "out")
    finally:
        state.plan = was
    with pytest.raises(CheckpointError, match="-1 first_tokens"):
        surgery.load(tmp_path / "out", model=decoder())


def test_conversion_keeps_the_budget(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(3, 100, (4, 12))} for _ in range(20)]
    options = surgery.Options(steps=4)
    gated = surgery.convert(
        decoder().float(), 0.7, data=data, options=options, first_tokens=2, first_layers=1, tune="train"
    )
    state = state_of(gated)
    state.policy = "routed"
    for budget in (0.7, 0.85, surgery.budgets.budget_range(gated)[0]):
        surgery.set_budget(gated, budget)
        usage = observe(gated, data[4::5])
        assert usage.decided.cost(state.costs) == pytest.approx(budget, abs=0.03)
        assert all(usage.decided.active_rate[name] == 1 for name in state.plan.always_on)
        assert min(usage.decided.active_rate.values()) >= 2 / 12 - 1e-6
        with surgery.execution(gated, "static"):
            static = observe(gated, data[4::5])
        assert all(static.decided.active_rate[name] == 1 for name in state.plan.always_on)
    report = surgery.measure(gated, data[4::5], speed=())
    rates = {peer.name: peer.cost for peer in report.peers}
    assert rates["random"] == pytest.approx(report.cost, abs=0.2) and set(rates) >= {"static", "shuffled"}
