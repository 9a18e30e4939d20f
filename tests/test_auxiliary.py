"""Auxiliary targets of routers: the gradients are those of what they are said to be of."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from toys import Stack, gate_all, gates, mlp

import surgery
from surgery.auxiliary import diversity_gradients, harm_gradients
from surgery.calling import as_batch
from surgery.context import handled, state_of
from surgery.costs import run
from surgery.gates import Gate
from surgery.harm import HarmLabels, label_harm
from surgery.options import Options
from surgery.straight_through import SoftDecision, SoftGates
from surgery.training import train_routers

C = 8


def alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


@pytest.fixture
def some_gates() -> list[Gate]:
    torch.manual_seed(0)
    model = Stack(mlp(C), mlp(C), head=nn.Linear(C, 4))
    return gates(gate_all(model, torch.randn(2, C)))


def decision(gate: Gate, scores: Tensor, padding: Tensor | None = None) -> SoftDecision:
    leaf = scores.detach().requires_grad_()
    return SoftDecision(gate, scores, leaf, torch.sigmoid(leaf.detach()), leaf.detach() > 0, padding)


def labels_of(some_gates: Sequence[Gate], harms: Sequence[Tensor]) -> dict[str, HarmLabels]:
    return {g.site.name: HarmLabels(torch.zeros(0), harm, None) for g, harm in zip(some_gates, harms, strict=True)}


def test_harm_gradients_by_hand(some_gates: list[Gate]) -> None:
    e = torch.e
    scores, harm = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, e, e**2])  # scores minus log harm: 1, 1, 4
    found = harm_gradients([decision(some_gates[0], scores)], labels_of(some_gates[:1], [harm]), alone)
    # their mean is 2; the floor below logarithms is a thousandth of the mean harm
    assert found[0].tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3], abs=2e-3)


def test_diversity_gradients_by_hand(some_gates: list[Gate]) -> None:
    third = torch.log(torch.tensor(0.5))  # sigmoid gives 1/3
    scores = torch.stack((third, -third)) + 0.7
    found = diversity_gradients([decision(some_gates[0], scores)], 0.7, alone)
    # mean chance 1/2: p (1 - p) = 2/9, logits -log 2 and log 2, over two rows
    each = 2 / 9 * torch.log(torch.tensor(2.0)).item() / 2
    assert found[0].tolist() == pytest.approx([each, -each], abs=1e-6)


@pytest.mark.parametrize("shape", [(6,), (4, 3)])
def test_gradients_are_those_of_the_objectives(some_gates: list[Gate], shape: tuple[int, ...]) -> None:
    scores = [torch.randn(shape) for _ in some_gates]
    harms = [torch.rand(shape) for _ in some_gates]
    padding = torch.rand(shape) > 0.3 if len(shape) > 1 else None
    decided = [decision(g, s, padding) for g, s in zip(some_gates, scores, strict=True)]
    real = torch.ones(shape, dtype=torch.bool) if padding is None else padding

    def entropy(p: Tensor) -> Tensor:
        return -p * torch.log(p) - (1 - p) * torch.log(1 - p)

    errors, information = [], []
    for one, harm in zip(decided, harms, strict=True):
        target = torch.log(harm + 1e-3 * harm[real].mean() + 1e-12)
        errors.append((one.leaf - target)[real].var(correction=0) / 2)
        p = torch.sigmoid(one.leaf - 0.2)[real]
        information.append(entropy(p.mean()) - entropy(p).mean())
    leaves = [one.leaf for one in decided]
    by_harm = torch.autograd.grad(torch.stack(errors).mean(), leaves)
    by_information = torch.autograd.grad(-torch.stack(information).mean(), leaves)
    torch.testing.assert_close(harm_gradients(decided, labels_of(some_gates, harms), alone), list(by_harm))
    torch.testing.assert_close(diversity_gradients(decided, 0.2, alone), list(by_information))
    assert all(g.sum().abs() < 1e-6 for g in harm_gradients(decided, labels_of(some_gates, harms), alone))


def test_processes_with_parts_of_the_rows_give_the_same(some_gates: list[Gate]) -> None:
    scores, harm = torch.randn(7), torch.rand(7)
    labels = labels_of(some_gates[:1], [harm])
    whole = harm_gradients([decision(some_gates[0], scores)], labels, alone)[0]
    diverse = diversity_gradients([decision(some_gates[0], scores)], 0.1, alone)[0]
    parts = [slice(0, 7, 2), slice(1, 7, 2)]

    def asked(part: slice, sums: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
        def total(value: Tensor) -> Tensor:
            seen.append(value)
            return sums[len(seen) - 1] if len(seen) <= len(sums) else value

        one = decision(some_gates[0], scores[part])
        mine = labels_of(some_gates[:1], [harm[part]])
        return [harm_gradients([one], mine, total)[0], diversity_gradients([one], 0.1, total)[0]]

    sums: list[Tensor] = []
    for _ in range(8):  # every pass learns one more of the sums that both need
        seen: list[list[Tensor]] = [[], []]
        found = [asked(part, sums, mine) for part, mine in zip(parts, seen, strict=True)]
        if len(sums) == len(seen[0]):
            break
        sums.append(seen[0][len(sums)] + seen[1][len(sums)])
    for part, (by_harm, by_information) in zip(parts, found, strict=True):
        torch.testing.assert_close(by_harm, whole[part])
        torch.testing.assert_close(by_information, diverse[part])


def test_what_always_runs_and_padding_do_not_count(some_gates: list[Gate]) -> None:
    scores, harm = torch.randn(2, 4), torch.rand(2, 4)
    padding = torch.tensor([[True, True, True, True], [True, True, True, False]])
    scores[:, 0] = torch.inf  # first tokens
    harm[1, 3] = torch.nan
    one = decision(some_gates[0], scores, padding)
    for found in (
        harm_gradients([one], labels_of(some_gates[:1], [harm]), alone)[0],
        diversity_gradients([one], 0.0, alone)[0],
    ):
        assert found.isfinite().all()
        assert (found[:, 0] == 0).all() and found[1, 3] == 0
        assert (found[:, 1:3] != 0).all()


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    data = [torch.randn(32, C) for _ in range(6)]
    model = Stack(mlp(C), mlp(C), mlp(C), head=nn.Linear(C, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    gated = gate_all(model, data[0][:2])
    surgery.fit_skip_paths(gated, data)
    surgery.calibrate(gated, data, 0.8, grid=())
    return gated, data


def trained(fitted: tuple[nn.Module, list[Tensor]], **weights: float) -> tuple[nn.Module, list[SoftDecision]]:
    gated, data = copy.deepcopy(fitted[0]), fitted[1]
    options = Options(steps=60, router_rate=2e-2, noise=0.0, skip_rate=0.0, **weights)  # type: ignore[arg-type]
    train_routers(gated, data, budget=0.6, options=options)
    soft = SoftGates(32, torch.arange(32), state_of(gated).threshold, 0.0, 0)
    with torch.enable_grad(), handled(gated, soft):
        run(gated, as_batch(data[0]))
    return gated, soft.decided


def test_scores_learn_to_differ_as_harm_does(fitted: tuple[nn.Module, list[Tensor]]) -> None:
    def correlation(gated: nn.Module, decided: Sequence[SoftDecision]) -> float:
        labels = label_harm(gated, as_batch(fitted[1][0]))
        pairs = [(one.leaf.detach(), labels[one.gate.site.name].harm.log()) for one in decided]
        return sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs) / len(pairs)

    assert correlation(*trained(fitted, harm_weight=3.0)) > correlation(*trained(fitted)) + 0.1


def test_decisions_learn_to_differ(fitted: tuple[nn.Module, list[Tensor]]) -> None:
    def spread(decided: Sequence[SoftDecision]) -> float:
        return sum(float(one.leaf.detach().std()) for one in decided) / len(decided)

    assert spread(trained(fitted, diversity_weight=3.0)[1]) > 1.5 * spread(trained(fitted)[1])


def test_without_them_training_is_what_it_was(fitted: tuple[nn.Module, list[Tensor]]) -> None:
    plain, zero = trained(fitted)[0].state_dict(), trained(fitted, harm_weight=0.0)[0].state_dict()
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
