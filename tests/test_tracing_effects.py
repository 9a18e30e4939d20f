"""What a `forward` changes beside its result: such a module is left alone, and the original is never written."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from subjects import outputs
from torch import Tensor, nn
from torch.nn import functional as F
from tracing_toys import Base, C, check, tokens

import surgery


class Holding(Base):
    """Writes into something that it holds."""

    shared: ClassVar[dict[str, Any]] = {}

    def __init__(self, held: Any, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.held, self.write = held, write

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(x))
        self.write(self, y)
        return x + y


WRITES: dict[str, tuple[Any, Callable[[Any, Tensor], Any]]] = {
    "item": ({}, lambda self, y: self.held.__setitem__("y", y)),
    "setdefault": ({}, lambda self, y: self.held.setdefault("y", y)),
    "ordered": (OrderedDict(a=1), lambda self, y: self.held.update(y=y)),
    "missing": (defaultdict(list), lambda self, y: self.held["y"]),
    "list": ([], lambda self, y: self.held.append(y)),
    "set": ({1}, lambda self, y: self.held.add(2)),
    "deque": (deque([1], maxlen=2), lambda self, y: self.held.append(y)),
    "nested": ({"a": ([],)}, lambda self, y: self.held["a"][0].append(y)),
    "object": (SimpleNamespace(a=1), lambda self, y: setattr(self.held, "a", y)),
    "inside an object": (SimpleNamespace(a=[]), lambda self, y: self.held.a.append(y)),
    "tensor": (torch.zeros(()), lambda self, y: self.held.add_(1)),
    "class": (None, lambda self, y: self.shared.update(y=y)),
    "own dict": (None, lambda self, y: self.__dict__.update(y=y)),
    "buffer": (None, lambda self, y: self.register_buffer("y", torch.ones(()))),
    "attribute": (None, lambda self, y: delattr(self, "held")),
}


@pytest.mark.parametrize("way", WRITES)
def test_what_a_module_holds_is_not_written_while_sites_are_found(way: str) -> None:
    toy, x = Holding(*WRITES[way]).eval(), tokens()
    before = repr((toy.held, sorted(vars(toy)), sorted(dict(toy.named_buffers()))))
    sites = surgery.find_sites(toy, x)
    assert len(sites) == 0
    assert any("a side effect that a graph would lose" in r.reason for r in sites.rejections), sites.rejections
    assert repr((toy.held, sorted(vars(toy)), sorted(dict(toy.named_buffers())))) == before
    assert all(
        type(value) is Tensor for value in Holding.shared.values()
    )  # the example's run fills what is the class's


class Scale(Base):
    """Makes a scale once and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = x.new_full((C,), 0.5)
        return x + self.mlp(x * self.cache["scale"])


def test_a_model_that_keeps_a_cache_goes_on_working() -> None:
    toy, x = nn.Sequential(Scale(), Scale()).eval(), tokens()
    surgery.find_sites(toy, x)
    assert not toy[0].cache
    assert outputs(toy, x)[0].shape == x.shape and type(toy[0].cache["scale"]) is Tensor


class Reading(Base):
    """Reads what it holds, and hands it to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.scales, self.names = [C], {"a": 2.0}, OrderedDict(first="a")
        self.table = torch.ones(C)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(self.mlp(x), self.sizes)
        scales = self.scales.copy()
        scales["b"] = 1.0
        return x + y * scales[self.names["first"]] * len([*self.sizes, 1])


def test_what_a_module_holds_may_be_read() -> None:
    x = tokens()
    check(Reading(), x, ["mlp"], x)


class Statement(nn.Module):
    """A function that writes into its argument, and whose result nobody reads."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.write = nn.Linear(C, 2 * C), nn.Linear(2 * C, C), write

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.write(h)
        return x + self.down(h)


@pytest.mark.parametrize(
    "write", [lambda h: F.relu(h, inplace=True), lambda h: torch.mul(h, 2, out=h), lambda h: h.relu_()]
)
def test_statements_that_write_into_a_value(write: Callable[[Tensor], Any]) -> None:
    check(Statement(write), tokens(), ["down"])
