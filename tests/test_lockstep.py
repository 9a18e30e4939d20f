"""Parts of one pass that wait for each other."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from toys import Stack, frozen, gate_all, mlp

from surgery import fitting
from surgery.errors import SurgeryError
from surgery.fitting import fit_skip_paths
from surgery.lockstep import Lockstep

CPU = torch.device("cpu")


def sums(values: list[int]) -> list[int]:
    """What every part gets: the sum of what all have brought, and its own number."""
    return [10 * sum(values) + part for part in range(len(values))]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_meet_and_take_turns_in_order(count: int) -> None:
    steps, seen = Lockstep(count), []

    def job(part: int) -> None:
        for meeting in range(3):
            seen.append((meeting, part))
            found = steps.meet(part, meeting + part, sums)
            assert found == 10 * sum(meeting + other for other in range(count)) + part
        seen.append((3, part))

    steps.run([partial(job, part) for part in range(count)], CPU)
    assert seen == [(meeting, part) for meeting in range(4) for part in range(count)]


def test_what_one_part_raises_ends_all() -> None:
    steps, reached = Lockstep(3), []

    def job(part: int) -> None:
        steps.meet(part, part, sums)
        if part == 1:
            raise ValueError("here")
        steps.meet(part, part, sums)
        reached.append(part)

    before = threading.active_count()
    with pytest.raises(ValueError, match="here"):
        steps.run([partial(job, part) for part in range(3)], CPU)
    assert not reached and threading.active_count() == before


def test_what_is_done_together_may_fail() -> None:
    steps = Lockstep(2)

    def together(values: list[int]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.run([lambda: steps.meet(0, 0, together), lambda: steps.meet(1, 1, together)], CPU)


@pytest.mark.parametrize("meetings", [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_parts_that_do_not_meet_equally_often(meetings: tuple[int, int]) -> None:
    steps = Lockstep(2)

    def job(part: int) -> None:
        for _ in range(meetings[part]):
            steps.meet(part, part, sums)

    with pytest.raises(SurgeryError, match="different sites"):
        steps.run([partial(job, part) for part in range(2)], CPU)


def test_parts_run_under_the_settings_of_their_caller() -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    steps, seen = Lockstep(2), []

    def job() -> None:
        here = torch.ones(2)
        seen.append((variable.get(), torch.is_grad_enabled(), here.device.type, (here @ here).dtype))

    token = variable.set(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        steps.run([job, job], CPU)
    with torch.enable_grad(), torch.device("meta"):
        Lockstep(2).run([job, job], CPU)
    variable.reset(token)
    assert seen[:2] == [(3, False, "cpu", torch.bfloat16)] * 2 and seen[2:] == [(3, True, "meta", torch.float32)] * 2


class Watched(nn.Module):
    """An MLP that notes how many samples it is called with."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.sizes = mlp(channels), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        self.sizes.append(len(x))
        return self.inner(x)


@pytest.mark.parametrize("decisions", ["random", "routed"])
def test_fits_do_not_hang_on_the_parts(decisions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [torch.randn(50, 5, 6) for _ in range(2)]
    model = Stack(mlp(6), mlp(6), mlp(6)).eval()

    def fit(part: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(fitting, "_PART", part)
        gated = gate_all(model, data[0][:2], skip="affine")
        left = fit_skip_paths(gated, data, decisions=decisions)
        assert len(left) == 3
        return {name: value for name, value in frozen(gated).items() if "skip_path" in name} | {
            "left": torch.tensor(list(left.values()))
        }

    whole, parts = fit(1000), fit(32)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


def test_no_branch_holds_more_than_a_part_of_the_samples() -> None:
    data = [torch.randn(50, 5, 6) for _ in range(2)]
    model = Stack(Watched(6), Watched(6)).eval()
    gated = gate_all(model, data[0][:2], skip="affine")
    watched = [module for module in gated.modules() if isinstance(module, Watched)]
    for module in watched:
        module.sizes.clear()
    fit_skip_paths(gated, data)
    assert [module.sizes for module in watched] == [[64, 64, 64, 8]] * 2
