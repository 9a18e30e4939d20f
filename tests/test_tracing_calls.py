"""Ways of being called: arguments that choose a path, sizes, stores, tuples; one graph per pattern."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_equal, outputs
from torch import Tensor, nn
from tracing_toys import Base, C, N, Residual, T, check, convert, maps, mlp, tokens

import surgery
from surgery import programs
from surgery.gates import iter_gates
from surgery.vetting import vet


class Optional(Base):
    """An argument that defaults to None and changes the path."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.mlp(self.norm(x))
        if mask is not None:
            y = y * mask[..., None]
        return x + y * scale


@pytest.mark.parametrize("probed_with_mask", [False, True])
def test_none_default_keeps_one_graph_per_pattern(probed_with_mask: bool) -> None:
    x, toy = tokens(), Optional().eval()
    mask = (torch.rand(N, T) > 0.5).float()
    with_mask, without = {"x": x, "mask": mask}, {"x": x}
    _, gated = convert(toy, **(with_mask if probed_with_mask else without))
    for example in (
        with_mask,
        without,
        {"x": x, "mask": mask, "scale": 2.0},
        {"x": x, "mask": None},
        {"x": x, "scale": 0.5},
    ):
        with surgery.force(gated, 1.0):
            assert_equal(outputs(gated, example), outputs(toy, example))
        with surgery.force(gated, 0.0):
            assert_equal(outputs(gated, example), [x])
        found = []
        for mode in ("skip", "mask"):
            with (
                surgery.execution(gated, mode),
                surgery.force(gated, {gated_name(gated): torch.tensor([True, False, True])}),
            ):  # type: ignore[arg-type]
                found.append(outputs(gated, example))
        assert_close(*found, 1e-6)
    with surgery.force(gated, 1.0):
        for call in ((x,), (x, None), (x, mask), (x, mask, 2.0), (x, None, 0.5)):  # by place as well
            assert_equal([gated(*call).detach()], [toy(*call).detach()])


def gated_name(gated: nn.Module) -> str:
    return next(iter(iter_gates(gated)))[0]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C, C)

    def forward(self, x: Tensor, *, gain: float = 1.0, shift: Tensor | None = None) -> Tensor:
        y = self.map(x) * gain
        return y if shift is None else y + shift


class Keywords(nn.Module):
    """Transformers layers hand their **kwargs down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.inner(x, **kwargs)


def test_keyword_arguments_pass_through() -> None:
    x, toy = tokens(), Keywords().eval()
    sites, gated = convert(toy, x)
    assert sites.names == ("inner",)
    shift = torch.randn(N, T, C)
    for extra in ({}, {"gain": 2.0}, {"shift": shift}, {"gain": 0.5, "shift": shift}):
        with surgery.force(gated, 1.0):
            assert_equal([gated(x, **extra).detach()], [toy(x, **extra).detach()])
        with surgery.force(gated, 0.0):
            assert_equal([gated(x, **extra).detach()], [x])
        found = []
        for mode in ("skip", "mask"):
            with surgery.execution(gated, mode), surgery.force(gated, {"inner": torch.tensor([True, False, True])}):  # type: ignore[arg-type]
                found.append([gated(x, **extra).detach()])
        assert_close(*found, 1e-6)


class Cache(nn.Module):
    """Keys are written to a store that the caller reads later."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(C, C)
        self.query = nn.Linear(C, C)
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor, store: list[Tensor]) -> Tensor:
        key = self.key(x)
        store.append(key)
        weights = (self.query(x) @ key.transpose(1, 2)).softmax(-1)
        return x + self.out(weights @ x)


def test_side_effects_stay_outside_the_branch() -> None:
    x, toy = tokens(), Cache().eval()
    sites, gated = convert(toy, x, [])
    assert len(sites) == 1
    assert "key" not in sites[0].modules and {"query", "out"} <= set(sites[0].modules)
    for mode in ("skip", "mask"):
        for rate in (0.0, 0.5, 1.0):
            store: list[Tensor] = []
            with surgery.execution(gated, mode), surgery.force(gated, rate):  # type: ignore[arg-type]
                y = gated(x, store)
            assert_equal(store, [toy.key(x)])
            if rate == 0.0:
                assert torch.equal(y, x)


class Counting(Base):
    """The branch counts its calls in a buffer, and writes into a value of its own."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        if self.own:
            return x + self.mlp(hidden.mul_(2))
        return x + self.mlp(hidden) * (self.calls.add_(1) > 0)


def test_a_branch_may_write_into_its_own_values_only() -> None:
    assert len(check(Counting(own=True), tokens(), ["mlp"])) == 1
    toy = Counting(own=False).eval()
    sites = surgery.find_sites(toy, tokens())
    assert not len(sites) and [r.reason for r in sites.rejections] == ["it has a side effect"]


class CountingModule(nn.Module):
    """Counts its calls where no graph sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def test_what_a_forward_counts_is_as_it_was_after_sites_were_found() -> None:
    toy = Residual()
    toy.mlp = CountingModule()  # type: ignore[assignment]
    assert len(surgery.find_sites(toy, tokens())) == 1 and int(toy.mlp.calls) == 0


class Varied(Base):
    """Another function for every argument that is given; and arguments after others."""

    def forward(self, x: Tensor, a: Tensor | None = None, *more: Tensor, b: Tensor | None = None) -> Tensor:
        y = self.mlp(self.norm(x))
        if a is not None:
            y = y * a
        if b is not None:
            y = y * b.sin()
        for value in more:
            y = y + value
        return x + y


def test_threads_may_meet_new_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens()
    toy = Varied().eval().requires_grad_(False)
    gated = surgery.insert_gates(toy, surgery.find_sites(toy, x))
    generate, calls = programs._generate, threading.Barrier(2)

    def slow(*args: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            calls.wait(0.3)  # both at once, if they can be
        return generate(*args)

    monkeypatch.setattr(programs, "_generate", slow)
    ways = [{"a": torch.rand(C)}, {"b": torch.rand(C)}]

    def work(kwargs: dict[str, Any]) -> None:
        with surgery.force(gated, 1.0):
            gated(x, **kwargs)

    threads = [threading.Thread(target=work, args=(kwargs,)) for kwargs in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kwargs in ways:
        with surgery.force(gated, 1.0):
            assert torch.equal(gated(x, **kwargs), toy(x, **kwargs))
        with surgery.force(gated, 0.0):  # the calls do not run dense: the programs were right when they were compared
            assert not torch.equal(gated(x, **kwargs), toy(x, **kwargs))


def test_calls_that_python_refuses_are_refused() -> None:
    x, one = tokens(), torch.rand(C)
    toy = Varied().eval().requires_grad_(False)
    gated = surgery.insert_gates(toy, surgery.find_sites(toy, x))
    with surgery.force(gated, 1.0):
        assert torch.equal(gated(x, one, one, one, b=one), toy(x, one, one, one, b=one))
        for args, kwargs in (((), {}), ((x, one), {"a": one}), ((x,), {"c": one})):
            with pytest.raises(TypeError, match="argument"):
                gated(*args, **kwargs)
    plain = Residual().eval().requires_grad_(False)
    gated = surgery.insert_gates(plain, surgery.find_sites(plain, x))
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        gated(x, x)


class Shapes(nn.Module):
    """The branch reads the stream's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(T, T)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        y = self.mix(x.transpose(1, 2).reshape(B * D, L)).reshape(B, D, -1)
        return x + y.transpose(1, 2).reshape(x.size(0), L, D)


def test_shape_reads_are_the_branchs_own() -> None:
    """B is read from the branch's own input, so fewer samples give a smaller B; tokens are mixed, so sample only."""
    x = tokens()
    sites = check(Shapes(), x, ["mix"], x)
    assert sites[0].granularities == ("sample",)


class Lengths(nn.Module):
    """The rank and the number of samples by `len`, as everywhere else in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(T * C, T * C)

    def forward(self, x: Tensor) -> Tensor:
        if len(x.shape) != 3:
            raise ValueError("three axes are expected")
        parts = [self.mix(x.reshape(len(x), -1))]
        return x + sum(part.view(len(x), T, C) for part in parts) / len(parts)


def test_lengths_are_read_as_python_reads_them() -> None:
    x = tokens()
    sites = check(Lengths(), x, ["mix"], x)
    assert sites[0].granularities == ("sample",)


class Asking(Base):
    """Takes a tensor, or several in a list."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, (list, tuple)):
            x = torch.stack(list(x))
        if not isinstance(x, Tensor):
            raise TypeError("a tensor is expected")
        return x + self.mlp(self.norm(x))


def test_an_argument_that_is_asked_whether_it_is_a_tensor() -> None:
    check(Asking(), tokens(), ["mlp"])


class Windowed(nn.Module):
    """A branch whose program depends on the size of the map (TinyViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        if height % 4:
            padded = nn.functional.pad(x, (0, 0, 0, 4 - height % 4))
            return x + self.conv(padded)[:, :, :height]
        return x + self.conv(x)


def test_sizes_that_decide_what_is_computed_belong_to_the_call_pattern() -> None:
    x = maps()
    model = Windowed()
    sites = check(model, x, ["conv"], closed=x)
    assert sites.patterns[""] == [[[f"sized:4:{C},6,6"], [], []]]
    vet(sites.plan())  # a checkpoint may hold such a pattern
    _, gated = convert(model, x)
    other = torch.randn(N, C, 8, 6)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, other), outputs(model, other))
    with surgery.force(gated, 0.0):
        assert_equal(outputs(gated, other), [other])


def test_endless_sizes_run_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("surgery.programs.MOST", 2)
    model = Windowed()
    _, gated = convert(model, maps())
    with surgery.force(gated, 0.0):
        for height in (8, 9, 10):
            x = torch.randn(N, C, height, 6)
            assert_equal(outputs(gated, x), [x] if height == 8 else outputs(model, x))
    assert caplog.text.count("further ones run dense") == 1


class Rest(nn.Module):
    """A module whose further outputs are passed on as a tuple, `outputs[1:]` (MPNet)."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(C, C)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.map(x),)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Rest.Inner()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            found = self.inner(x)
            return (found[0] + x,) + found[1:]  # noqa: RUF005  (as MPNet writes it)

    def __init__(self) -> None:
        super().__init__()
        self.outer = Rest.Outer()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.outer(x)
        assert len(outputs) == 1
        return outputs[0].relu()


def test_the_rest_of_a_tuple_is_empty_where_the_branch_is_skipped() -> None:
    x = tokens()
    check(Rest(), x, ["outer.inner"], closed=x.relu())


class RunsItsChildren(nn.Module):
    """All children one after another, as VitDet's bottleneck writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for child in self.children():
            y = child(y)
        return x + y


class InSequence(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("make", [RunsItsChildren, lambda: InSequence(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C))])
def test_a_host_that_runs_all_of_its_children_may_run_dense(make: Any) -> None:
    x = tokens()
    sites, gated = convert(model := make(), x)
    assert len(sites) == 1
    assert torch.equal(gated(x), model(x))
    with surgery.execution(gated, "dense"):
        assert torch.equal(gated(x), model(x))
