"""Routers: what they read, and that the folded parameters of calls without gradients are never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from surgery.routers import SampleRouter

C = 6


def router(seed: int = 0) -> SampleRouter:
    """A router with statistics and weights that matter."""
    torch.manual_seed(seed)
    made = SampleRouter(C, 4, "NTC")
    nn.init.normal_(made.up.weight)
    made.standardise(3 + 2 * torch.randn(50, 2 * C))
    return made


def unfolded(one: SampleRouter, x: Tensor) -> Tensor:
    return one.score(one.extract(x)).detach()


def _step(one: SampleRouter) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.Adam(one.parameters(), 0.1)
        one.score(torch.randn(8, 2 * C)).square().sum().backward()
        optimizer.step()


CHANGES: dict[str, Callable[[SampleRouter], object]] = {
    "an optimiser's step": _step,
    "statistics": lambda one: one.standardise(torch.randn(20, 2 * C)),
    "a state dict": lambda one: one.load_state_dict(router(1).state_dict()),
    "an assigned state dict": lambda one: one.load_state_dict(router(1).state_dict(), assign=True),
    "data": lambda one: setattr(one.down.weight, "data", torch.randn(4, 2 * C)),
    "another parameter": lambda one: setattr(one.down, "bias", nn.Parameter(torch.randn(4))),
    "a hook": lambda one: one.down.register_forward_hook(lambda *_: _[2] + 1),
    "half precision and back": lambda one: one.half().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_folded_parameters_follow_every_change(change: Callable[[SampleRouter], object]) -> None:
    one, x = router(), torch.randn(3, 5, C)
    with torch.no_grad():
        torch.testing.assert_close(one(x), unfolded(one, x), rtol=1e-5, atol=1e-5)
        change(one)
        torch.testing.assert_close(one(x), unfolded(one, x), rtol=1e-5, atol=1e-5)
        twin = copy.deepcopy(one)
        change(twin)
        torch.testing.assert_close(twin(x), unfolded(twin, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one(x), unfolded(one, x), rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    one, x = router(), torch.randn(3, 5, C)
    with torch.no_grad():
        one(x)
    one(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in one.parameters())
