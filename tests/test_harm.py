"""First-order harm labels against derivatives worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import decoder
from subjects import subject
from torch import Tensor, nn
from toys import Masked, Residual, Stack, Times, gate_all, gates, mlp

import surgery
from surgery.calling import Batch, as_batch, call
from surgery.context import handled
from surgery.gates import Gate
from surgery.harm import label_harm
from surgery.skip_paths import AffineSkip

X = torch.tensor([[3.0, 1.0], [1.0, 3.0], [-2.0, 0.5]])
WEIGHT = torch.tensor([[0.5, 0.0], [0.0, 2.0]])


def test_one_site_by_hand() -> None:
    """stream = x + (x0 / 2, 2 x1), margin = |stream0 - stream1|, gradient (1, -1) or (-1, 1)."""
    gated = gate_all(Stack(Times(WEIGHT)), X, skip="affine")
    (label,) = label_harm(gated, Batch((X,))).values()
    assert label.harm.tolist() == pytest.approx([abs(1.5 - 2), abs(0.5 - 6), abs(-1 - 1)])
    assert label.weights is None and label.features.shape == (3, 2)


def test_the_skip_path_is_subtracted() -> None:
    gated = gate_all(Stack(Times(WEIGHT)), X, skip="affine")
    path = gates(gated)[0].skip_path
    assert isinstance(path, AffineSkip)
    with torch.no_grad():
        path.scale.copy_(torch.tensor([0.5, 0.0]))
        path.shift.copy_(torch.tensor([0.0, 1.0]))
    (label,) = label_harm(gated, Batch((X,))).values()
    assert label.harm.tolist() == pytest.approx([2 - 1, 6 - 1, 0], abs=1e-6)


def test_two_sites_by_the_chain_rule() -> None:
    """margin = h . (x + A x + B (x + A x)): the gradient at the first branch is h + B' h, at the second one h."""
    first, second = torch.randn(4, 4), torch.randn(4, 4)
    head = nn.Linear(4, 2, bias=False)
    model = Stack(Times(first), Times(second), head=head)
    x = torch.randn(5, 4)
    labels = label_harm(gate_all(model, x, skip="affine"), Batch((x,)))
    one = x @ first.T
    two = (x + one) @ second.T
    with torch.no_grad():
        logits = head(x + one + two)
        sign = (logits[:, :1] - logits[:, 1:]).sign()
        direction = sign * (head.weight[0] - head.weight[1])
        expected = [((direction + direction @ second) * one).sum(1).abs(), (direction * two).sum(1).abs()]
    for label, harm in zip(labels.values(), expected, strict=True):
        torch.testing.assert_close(label.harm, harm)


def test_positions_add_up_unsigned_where_a_whole_branch_goes() -> None:
    model = Stack(nn.Conv2d(2, 2, 1, bias=False), pool=True)
    inner = model.blocks[0].inner
    assert isinstance(inner, nn.Conv2d)
    with torch.no_grad():
        inner.weight.copy_(WEIGHT[:, :, None, None])
    x = torch.tensor([[[4.0, -4.0]], [[0.0, 0.0]]])[None]  # N C 1 2: effects +2 / 2 and -2 / 2 on the mean
    gated = gate_all(model, torch.randn(2, 2, 1, 2), granularity="sample")
    (label,) = label_harm(gated, Batch((x,))).values()
    assert label.harm.tolist() == pytest.approx([2.0])


def test_per_token_by_hand() -> None:
    """Two tokens, mean pooling: each one's effect is half of what it is alone."""
    gated = gate_all(Stack(Times(WEIGHT), pool=True), torch.randn(2, 3, 2))
    assert gates(gated)[0].per_token
    x = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])
    (label,) = label_harm(gated, Batch((x,))).values()
    assert label.harm.tolist() == [pytest.approx([0.25, 1.0])] and label.features.shape == (1, 2, 2)


@pytest.mark.parametrize("length", [0.5, 3])
def test_per_prompt_the_features_are_those_that_the_router_will_read(length: float) -> None:
    pytest.importorskip("transformers")
    ids = torch.randint(3, 100, (4, 8))
    batch = as_batch({"input_ids": ids, "attention_mask": (torch.arange(8) >= torch.arange(4)[:, None]).long()})
    model = decoder("llama", layers=2)
    gated = surgery.insert_gates(model, surgery.find_sites(model, batch.kwargs).plan(granularity="prefill"))
    read: dict[str, Tensor] = {}

    def noted(gate: Gate, branch: Any, left: Any, residual: Tensor, inputs: Any) -> Any:
        gate.router.register_forward_pre_hook(lambda router, args: read.update({gate.site.name: router.pool(*args)}))
        gate.scores(residual)
        return gate.open(branch, left, inputs)

    with surgery.prompt_length(gated, length):
        labels = label_harm(gated, batch)
        with torch.no_grad(), handled(gated, noted):
            call(gated, batch)
    assert len(labels) == 4
    for name, label in labels.items():
        torch.testing.assert_close(label.features, read[name], rtol=0, atol=0)


class Unused(nn.Module):
    """Computes more than it returns."""

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.used = nn.Identity() if alone else Residual(mlp(4))
        self.unused = Residual(mlp(4))
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        self.seen = self.unused(x).detach()
        return x


def test_zero_where_a_branch_does_not_reach_the_output() -> None:
    x = torch.randn(3, 4)
    labels = label_harm(gate_all(Unused(alone=False), x), Batch((x,)))
    assert list(labels) == ["used.inner", "unused.inner"]
    assert labels["used.inner"].harm.all() and labels["unused.inner"].harm.tolist() == [0.0] * 3


def test_zero_where_no_branch_reaches_the_output() -> None:
    x = torch.randn(3, 4)
    labels = label_harm(gate_all(Unused(alone=True), x), Batch((x,)))
    assert labels["unused.inner"].harm.tolist() == [0.0] * 3


def test_padding_is_told_apart() -> None:
    x, mask = torch.randn(2, 4, 2), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"inputs_embeds": x, "attention_mask": mask}
    (label,) = label_harm(gate_all(Masked(mlp(2)), batch), as_batch(batch)).values()
    assert label.weights is not None and torch.equal(label.weights, mask.bool())
    assert label.harm.shape == (2, 4)


@pytest.mark.parametrize("name", ["timm/vit_pico", "transformers/bert", "timm/test_resnet"])
def test_every_site_is_labelled_and_nothing_is_left_behind(name: str) -> None:
    one = subject(name)
    labels = label_harm(one.gated, as_batch(one.example))
    assert list(labels) == list(one.sites.names)
    for gate in gates(one.gated):
        harm = labels[gate.site.name].harm
        assert harm.shape[0] == 2 and harm.dim() == (2 if gate.per_token else 1)
        assert torch.isfinite(harm).all() and harm.any()
    assert all(p.grad is None for p in (*one.gated.parameters(), *one.model.parameters()))
    assert not any(p.requires_grad for p in one.model.parameters())


def test_labels_are_the_same_under_no_grad() -> None:
    x = torch.randn(3, 4)
    gated = gate_all(Stack(mlp(4)), x)
    expected = label_harm(gated, Batch((x,)))["blocks.0.inner"].harm
    with torch.no_grad():
        assert torch.equal(label_harm(gated, Batch((x,)))["blocks.0.inner"].harm, expected)


def test_small_branches_harm_as_predicted() -> None:
    """For a branch of small effect the first-order label is the change of the margin."""
    x = torch.randn(6, 4)
    model = Stack(mlp(4), mlp(4), head=nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.blocks[0].parameters():
            parameter.mul_(0.1)
    gated = gate_all(model, x, skip="identity")
    labels = label_harm(gated, Batch((x,)))
    with torch.no_grad():
        top = model(x).topk(2).indices
        margin = model(x).gather(1, top)
        with surgery.force(gated, {"blocks.0.inner": False, "blocks.1.inner": True}):
            skipped = gated(x).gather(1, top)
    change = ((margin - skipped)[:, 0] - (margin - skipped)[:, 1]).abs()
    torch.testing.assert_close(labels["blocks.0.inner"].harm, change, atol=2e-3, rtol=0.1)
