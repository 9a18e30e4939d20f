"""`Batch`: everything that a model may be called with, and how it is cut, moved and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import gate_all, mlp

import surgery
from surgery.calling import Batch, as_batch
from surgery.errors import DataError
from surgery.log_rows import input_hashes
from surgery.made_inputs import vary


def test_a_tuple_beside_labels_is_the_positional_arguments() -> None:
    x, lengths, labels = torch.randn(4, 3), torch.tensor([1, 2, 3, 1]), torch.tensor([0, 1, 1, 0])
    for inner in ((x, lengths), [x, lengths]):
        batch = as_batch((inner, labels))
        assert batch.args == (x, lengths) and batch.labels is labels
    assert as_batch((x, labels)).labels is labels and as_batch((x, labels)).args == (x,)
    assert as_batch(({"x": x}, labels)).kwargs == {"x": x}


NESTED = {"list": lambda x, shared: [x, [shared]], "dict": lambda x, shared: {"a": x, "b": (shared, None)}}


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
def test_tensors_in_lists_and_dicts_are_cut_and_moved(nest: Any) -> None:
    x, other, shared = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0), torch.zeros(2, 2)
    batch = Batch((nest(other, shared),), {"x": x, "flag": True}, labels=torch.arange(4))
    assert batch.size == 4 and [t is u for t, u in zip(batch.tensors, (other, shared, x), strict=True)] == [True] * 3
    part = batch.rows(torch.tensor([2, 0]))
    assert [t.flatten().tolist() for t in part.tensors] == [[12, 10], [0, 0, 0, 0], [2, 0]]
    assert part.labels is not None and part.labels.tolist() == [2, 0] and part.kwargs["flag"] is True
    assert {t.dtype for t in batch.to("cpu", torch.float64).tensors} == {torch.float64}
    filled = batch.filled([other + 1, shared, x])
    assert filled.tensors[0].tolist() == [11, 12, 13, 14]
    assert len(set(input_hashes(batch))) == 4
    changed = Batch((nest(other + torch.tensor([0, 0, 0, 1.0]), shared),), batch.kwargs)
    assert [a == b for a, b in zip(input_hashes(batch), input_hashes(changed), strict=True)] == [True] * 3 + [False]


class Scaled(nn.Module):
    """Two branches, and a factor for every sample that comes in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(8), mlp(8)

    def forward(self, x: Tensor, extra: list[Tensor]) -> Tensor:
        x = x + self.first(x)
        x = x * extra[0]
        return x + self.second(x)


def test_models_with_tensors_in_lists_are_converted() -> None:
    data = [(torch.randn(16, 8), [torch.rand(16, 1)]) for _ in range(8)]
    model = Scaled().eval()
    gated = surgery.convert(model, 0.8, data=data, tune="oneshot", granularity="sample", skip="affine")
    assert len(surgery.status(gated).sites) == 2
    report = surgery.measure(gated, data, dense=model, speed=(8,), repeats=2, peers=False)
    assert report.speed
    made = vary(as_batch(data[0]), seed=0)
    assert made[0].args[1][0].shape == (16, 1) and not torch.equal(made[0].args[1][0], data[0][1][0])


class InOneDict(Scaled):
    def forward(self, inputs: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(inputs["x"], [inputs["factor"]])


def test_models_that_take_one_dict_are_measured() -> None:
    data = [{"inputs": {"x": torch.randn(16, 8), "factor": torch.rand(16, 1)}} for _ in range(4)]
    model = InOneDict().eval()
    gated = surgery.insert_gates(model, surgery.find_sites(model, data[0]))
    assert surgery.measure(gated, data, dense=model).samples == 64


def test_an_example_of_one_sample_with_a_list() -> None:
    assert len(surgery.find_sites(Scaled().eval(), (torch.randn(1, 8), [torch.rand(1, 1)]))) == 2


class Masked(nn.Module):
    """Attention with a mask that is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.mlp = nn.Linear(8, 8), mlp(8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.queries(x)
        x = x + nn.functional.scaled_dot_product_attention(q, x, x, attn_mask=mask)
        return x + self.mlp(x)


@pytest.mark.parametrize("rows", [1, 4])
def test_minus_infinity_in_masks_is_no_mistake(rows: int) -> None:
    model, mask = Masked().eval(), nn.Transformer.generate_square_subsequent_mask(6)
    assert as_batch((torch.randn(rows, 6, 8), mask)).args[1] is mask  # it has no axis for samples
    for given in (mask, mask.expand(rows, 6, 6)):
        example = {"x": torch.randn(rows, 6, 8), "mask": given}
        assert len(surgery.find_sites(model, example)) == 2
        assert all(not batch.kwargs["mask"].isnan().any() for batch in vary(as_batch(example), 0))
    data = [{"x": torch.randn(16, 6, 8), "mask": mask} for _ in range(10)]
    gated = gate_all(model, data[0], skip="affine", granularity="sample")
    left = surgery.fit_skip_paths(gated, data)  # of batches joined to one
    surgery.regress_routers(gated, data)
    assert all(0 < share < 1 for share in left.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_values_that_are_not_finite_are_refused(value: float) -> None:
    x, mask = torch.randn(4, 6), torch.zeros(6, 6)
    mask[0, 0] = value
    for batch in ((x, mask), {"x": x, "mask": mask}, (x, [mask]), {"x": {"mask": mask}}):
        with pytest.raises(DataError, match=r"shape \(6, 6\) holds NaN or infinity in row 0"):
            as_batch(batch)
    x[2, 0] = -torch.inf
    for nested in (x, (x, [torch.zeros(4, 1)]), {"x": [x]}):
        with pytest.raises(DataError, match="holds NaN or infinity in row 2"):
            as_batch(nested)


@pytest.mark.parametrize(
    "labels", [torch.eye(3)[:2], torch.zeros(2, 1, dtype=torch.long), torch.rand(2)], ids=["one-hot", "column", "float"]
)
def test_what_counts_as_labels_is_said(labels: Tensor) -> None:
    model = nn.Sequential(nn.Linear(8, 8), mlp(8), nn.Linear(8, 3)).eval()
    pattern = r"of a pair \(inputs, labels\) labels are whole numbers of shape \(N,\).*give class numbers, or the inputs alone"
    with pytest.raises(DataError, match=pattern):
        surgery.find_sites(model, (torch.randn(2, 8), labels))


def test_time_steps_that_were_taken_for_labels_are_named() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.steps = mlp(8), nn.Embedding(10, 8)

        def forward(self, x: Tensor, steps: Tensor) -> Tensor:
            return x + self.mlp(x + self.steps(steps))

    x, steps = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(DataError, match="taken for labels.*give the arguments in a dict, by name"):
        surgery.find_sites(Timed(), (x, steps))
    assert surgery.find_sites(Timed(), {"x": x, "steps": steps}).names == ("mlp",)
