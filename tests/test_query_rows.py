"""Attention for some query tokens of one sample in generated code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.patterns import signature_of
from surgery.query_rows import QueryRows, attend_rows, rows_program, take_rows
from surgery.scripts.zoo import find


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        made = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.out(made.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))


class Fused(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        query, key = self.both(x).chunk(2, -1)
        made = F.scaled_dot_product_attention(self.split(query), self.split(key), self.split(self.value(x)))
        return self.out(made.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))


class Mixing(Attention):
    """What follows the product depends on other tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return super().forward(x, mask).cumsum(1)


class InPlace(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return super().forward(x, mask).mul_(2)


class Counting(Attention):
    """It asks for the number of tokens, and whether there is more than one."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        many = query.shape[2] > 1 and mask is None
        single = x.size(1) == 1
        made = F.scaled_dot_product_attention(query, key, value, mask, is_causal=many and not single)
        return self.out(made.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))


class Sized(Attention):
    """Its code holds the number of tokens fixed."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return super().forward(x, mask).view(1, 5, 8)


def runner() -> QueryRows:
    return QueryRows("", lambda host, *inputs: (inputs, {}), lambda host, made: made)


INDEX = torch.tensor([0, 3])


def test_rows_are_taken_along_the_axis_of_tokens() -> None:
    x, mask, positions = torch.randn(1, 5, 8), torch.randn(1, 2, 5, 7), torch.arange(5)[None]
    assert torch.equal(take_rows(x, INDEX, 5), x[:, [0, 3]])
    assert torch.equal(take_rows(mask, INDEX, 5), mask[:, :, [0, 3]])
    assert take_rows(positions, INDEX, 5).tolist() == [[0, 3]]
    shared = torch.randn(1, 1, 1, 5)
    assert take_rows(shared, INDEX, 5) is shared and take_rows("eager", INDEX, 5) == "eager"


@pytest.mark.parametrize("kind", ["none", "causal", "rows", "shared"])
def test_products_of_some_queries_are_those_of_all(kind: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    mask = {"rows": torch.rand(1, 1, 5, 5) < 0.7, "shared": torch.randn(1, 1, 1, 5)}.get(kind)
    if kind == "rows":
        assert mask is not None
        mask[..., 0] = True
    whole = F.scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal")
    part = attend_rows(INDEX, 5, query[:, :, INDEX], key, value, mask, is_causal=kind == "causal")
    torch.testing.assert_close(part, whole[:, :, INDEX])


@pytest.mark.parametrize("kind", [Attention, Counting])
@pytest.mark.parametrize("rows", [[0, 3], [4], [1, 2, 3, 4]])
@pytest.mark.parametrize("call", ["plain", "mask", "causal"])
def test_active_tokens_get_what_the_module_gives_them(kind: type[Attention], rows: list[int], call: str) -> None:
    torch.manual_seed(0)
    module, x, index = kind().eval(), torch.randn(1, 5, 8), torch.tensor(rows)
    mask = torch.randn(1, 1, 5, 5) if call == "mask" else None
    made = runner()
    with torch.no_grad():
        for _ in range(2):  # the first call compares, the second one trusts it
            torch.testing.assert_close(
                made.run(module, (x, mask, call == "causal"), index, 5), module(x, mask, call == "causal")[:, index]
            )
    assert len(made.programs) == 1


def test_keys_and_values_are_made_for_all_tokens_and_queries_for_active_ones() -> None:
    module, made, seen = Attention().eval(), runner(), {}
    with torch.no_grad():
        made.run(module, (torch.randn(1, 5, 8),), INDEX, 5)
        for name, child in module.named_children():
            child.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.shape[1]}))
        made.run(module, (torch.randn(1, 5, 8),), INDEX, 5)
    assert seen == {"query": 2, "key": 5, "value": 5, "out": 2}


@pytest.mark.parametrize("kind", [Fused, Mixing, InPlace, Sized])
def test_what_cannot_be_cut_is_left_to_the_caller(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    module, made = kind().eval(), runner()
    with torch.no_grad():
        assert made.run(module, (torch.randn(1, 5, 8),), INDEX, 5) is None
        assert made.run(module, (torch.randn(1, 5, 8),), INDEX, 5) is None
    assert list(made.programs.values()) == [None]


def test_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    for kind, reason in ((Fused, "one map makes queries together"), (Mixing, "another result"), (InPlace, "in place")):
        caplog.clear()
        with caplog.at_level("INFO", "surgery.query_rows"), torch.no_grad():
            runner().run(kind().eval(), (torch.randn(1, 5, 8),), INDEX, 5)
        assert reason in caplog.text


def test_a_watched_module_and_one_in_training_run_themselves() -> None:
    module, made = Attention(), runner()
    inputs = (torch.randn(1, 5, 8),)
    with torch.no_grad():
        assert made.run(module.train(), inputs, INDEX, 5) is None
        assert made.run(module.eval(), inputs, INDEX, 5) is not None
        handle = module.register_forward_hook(lambda *_: None)
        assert made.run(module, inputs, INDEX, 5) is None
        handle.remove()
        assert made.run(module, inputs, INDEX, 5) is not None


def test_under_autocast_it_computes_as_the_module_does() -> None:
    module, made, x = Attention().eval(), runner(), torch.randn(1, 5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            ours = made.run(module, (x,), INDEX, 5)
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours, module(x)[:, INDEX], rtol=2e-2, atol=2e-2)


def test_gradients_are_those_of_the_module() -> None:
    module, made, x = Attention().eval(), runner(), torch.randn(1, 5, 8, requires_grad=True)
    made.run(module, (x,), INDEX, 5)
    (ours,) = torch.autograd.grad(made.run(module, (x,), INDEX, 5).sum(), x)
    (theirs,) = torch.autograd.grad(module(x)[:, INDEX].sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_programs_are_made_per_call_pattern() -> None:
    module = Attention().eval()
    signature = signature_of(Attention)
    plain = signature.pattern((torch.randn(1, 5, 8),), {})
    assert rows_program(module, signature, plain) is not None
    made = runner()
    with torch.no_grad():
        made.run(module, (torch.randn(1, 5, 8),), INDEX, 5)
        made.run(module, (torch.randn(1, 9, 8),), INDEX, 9)
        assert len(made.programs) == 1
        made.run(module, (torch.randn(1, 5, 8), torch.randn(1, 1, 5, 5)), INDEX, 5)
    assert len(made.programs) == 2


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "electra", "distilbert", "vit", "deit", "dinov2", "siglip", "bart", "whisper"]
)
def test_networks_that_use_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    entry = find(f"transformers/{name}")
    model, _ = entry.build()
    model.eval()
    example = entry.example(1)
    gated = surgery.insert_gates(model, surgery.find_sites(model, example))
    used: list[bool] = []
    run = QueryRows.run

    def noted(self: QueryRows, *args: Any) -> Any:
        made = run(self, *args)
        used.append(made is not None)
        return made

    monkeypatch.setattr(QueryRows, "run", noted)
    with torch.no_grad(), surgery.force(gated, 0.5, seed=3, samples=[0]):
        gated(**example)
        used.clear()
        part = gated(**example)
        with surgery.execution(gated, "mask"):
            whole = gated(**example)
    assert used and all(used)
    for ours, theirs in zip(part.values(), whole.values(), strict=True):
        if isinstance(ours, Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
