"""Streams of convolutions along one axis, `(N, C, T)`.

Axis letters: `N` samples, `C` channels, `T` positions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import Residual, Stack, gate_all, gates, path_of

import surgery
from surgery.context import state_of
from surgery.probing import layout_of
from surgery.routers import SampleRouter
from surgery.rows import positions_shape, rows_at
from surgery.scripts.zoo import find

N, C, T = 4, 6, 9


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(C, 4 * C, 3, padding=1), nn.ReLU(), nn.Conv1d(4 * C, C, 3, padding=1))


class Transposed(nn.Module):
    """A convolution along the tokens of `(N, T, C)`, as in a Conformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.convolve = nn.LayerNorm(C), nn.Conv1d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(self.norm(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("module", "shape", "layout"),
    [
        (nn.Conv1d(C, C, 1), (N, C, T), "NCT"),
        (nn.Conv1d(C, C, 1), (N, C, C), "NCT"),
        (nn.BatchNorm1d(C), (N, C, T), "NCT"),
        (nn.GroupNorm(2, C), (N, C, T), "NCT"),
        (nn.Linear(C, C), (N, T, C), "NTC"),
        (Transposed(), (N, T, C), "NTC"),
        (Transposed(), (N, C, C), "NTC"),
        (nn.Conv1d(C, C, 1), (N, T, C), "NTC"),
        (nn.GELU(), (N, T, C), "NTC"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value).split("(")[0],
)
def test_layouts(module: nn.Module, shape: tuple[int, ...], layout: str) -> None:
    assert layout_of(torch.randn(shape), [module]) == layout


def test_rows_are_positions() -> None:
    x = torch.randn(N, C, T)
    assert positions_shape(x, "NCT") == (N, T)
    assert torch.equal(
        rows_at([x], torch.tensor([0, T, N * T - 1]), "NCT"), torch.stack([x[0, :, 0], x[1, :, 0], x[-1, :, -1]])
    )


@pytest.mark.parametrize("kind", ["affine", "linear", "low-rank"])
def test_skip_paths_are_those_of_tokens(kind: str) -> None:
    first, other = path_of(kind, C, "NCT", 2), path_of(kind, C, "NTC", 2)
    for mine, theirs in zip(first.parameters(), other.parameters(), strict=True):
        nn.init.normal_(mine)
        theirs.data = mine.data
    for size in (N, 1, 2000):
        x = torch.randn(size, C, T)
        with torch.set_grad_enabled(size == 1):
            for added in (False, True):
                expected = other(x.transpose(1, 2), added=added).transpose(1, 2)
                torch.testing.assert_close(first(x, added=added), expected, atol=1e-4, rtol=1e-4)
    assert first.flops(T) == other.flops(T)


def test_linear_branches_are_reproduced_at_any_length() -> None:
    model = Stack(*(nn.Conv1d(C, C, 1) for _ in range(3)), head=nn.Conv1d(C, 2, 3))
    gated = gate_all(model, torch.randn(2, C, T), skip="linear")
    assert {(gate.site.layout, gate.site.channels, gate.site.positions) for gate in gates(gated)} == {("NCT", C, T)}
    surgery.fit_skip_paths(gated, [torch.randn(64, C, T)])
    x = torch.randn(N, C, 2 * T)
    with torch.no_grad(), surgery.force(gated, 0.0):
        assert (gated(x) - model(x)).abs().max() < 1e-3 * model(x).abs().max()


def test_a_network_on_signals_is_converted(tmp_path: object) -> None:
    model = find("plain/waves").make().eval()
    data = [torch.randn(16, 1, 44) for _ in range(8)]
    gated = surgery.convert(model, 0.7, data=data, options=surgery.Options(steps=3))
    assert {(p.site.layout, p.site.channels, p.site.positions, p.granularity) for p in state_of(gated).plan.sites} == {
        ("NCT", 8, 40, "sample")
    }
    assert {name.rpartition(".")[2]: tuple(p.shape) for name, p in gated.named_parameters() if "skip_path" in name} == {
        "weight": (8, 8),
        "bias": (8,),
    }
    with torch.no_grad():
        assert gated(torch.randn(2, 1, 60)).shape == (2, 10)  # another length
    surgery.save(gated, f"{tmp_path}/waves")
    loaded = surgery.load(f"{tmp_path}/waves", model=model)
    assert torch.equal(loaded(data[0]), gated(data[0]))
    with pytest.raises(surgery.errors.PlanMismatch):
        surgery.find_sites(model, data[0]).plan(granularity="prefill")
    planned = surgery.find_sites(model, data[0]).plan(skip="depthwise")
    assert {one.skip for one in planned.sites} == {"linear"}


def test_padding_of_texts_with_channels_first_is_not_pooled() -> None:
    router = SampleRouter(C, 8, "NCT")
    x, mask = torch.randn(N, C, T), torch.arange(T) < torch.tensor([[T], [3], [1], [5]])
    pooled = router.pool(x, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(pooled[row], router.pool(x[row : row + 1, :, :length])[0])
    assert not router.pool(x[:1], mask[:1] & False).any()


class Swapped(nn.Module):
    """A residual convolution of texts, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(nn.Conv1d(C, C, 1))

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self.block(inputs_embeds.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("tokens", [T, C])
def test_padding_changes_no_decision(tokens: int) -> None:
    x, mask = torch.randn(N, tokens, C), torch.ones(N, tokens, dtype=torch.long)
    mask[1, 3:] = 0
    gated = gate_all(Swapped(), {"inputs_embeds": torch.randn(2, T, C), "attention_mask": torch.ones(2, T).long()})
    (gate,) = gates(gated)
    for parameter in gate.router.parameters():
        nn.init.normal_(parameter)
    other = x.clone()
    other[1, 3:] = 50.0
    with torch.no_grad():
        scores = []
        for value in (x, other):
            with surgery.execution(gated, "skip"), surgery.context.tape(gated) as events:
                gated(inputs_embeds=value, attention_mask=mask)
            scores.append(events[0].scores)
    assert torch.equal(scores[0], scores[1])


def test_texts_of_a_model_that_keeps_channels_first() -> None:
    import transformers

    config = transformers.SqueezeBertConfig(
        vocab_size=90,
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        q_groups=1,
        k_groups=1,
        v_groups=1,
        post_attention_groups=1,
        intermediate_groups=1,
        output_groups=1,
    )
    model = transformers.SqueezeBertForSequenceClassification(config).eval()
    sites = surgery.find_sites(
        model, {"input_ids": torch.randint(5, 90, (2, 11)), "attention_mask": torch.ones(2, 11).long()}
    )
    assert {(site.layout, site.channels, site.positions) for site in sites} == {("NCT", 32, 11)}
