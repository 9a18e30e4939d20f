"""Side-by-side timing: what is called, how often, in which order, and what the ratio says."""

from __future__ import annotations

import gc
import json
import time

import pytest
import torch

from surgery import timing


def test_slower_by_a_factor() -> None:
    ratio = timing.compare(lambda: time.sleep(0.006), lambda: time.sleep(0.002), repeats=5, warmup=1)
    assert 1.5 < ratio.q1 <= ratio.median <= ratio.q3 < 4
    assert 1.5 < ratio.total < 4
    assert ratio.a_ms > ratio.b_ms >= 2
    assert ratio.repeats == 5
    assert json.loads(json.dumps(ratio.to_dict()))["median"] == ratio.median


def test_order_alternates_and_both_are_called_equally() -> None:
    calls: list[str] = []
    timing.compare(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3, warmup=1)
    assert "".join(calls) == "abbaabba"


def test_median_of_pairs_ignores_an_outlier_and_the_total_does_not() -> None:
    ratio = timing._summary([1.0, 1.0, 97.0], [2.0, 2.0, 2.0])
    assert ratio.median == 0.5
    assert ratio.total == 16.5


def test_gradients_are_off_and_state_comes_back() -> None:
    seen = []
    timing.compare(lambda: seen.append((torch.is_grad_enabled(), gc.isenabled())), lambda: None, repeats=1, warmup=0)
    assert seen == [(False, False)]
    assert torch.is_grad_enabled() and gc.isenabled()

    def broken() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        timing.compare(broken, lambda: None)
    assert torch.is_grad_enabled() and gc.isenabled()


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_refuses_nothing_to_time(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        timing.compare(lambda: None, lambda: None, **options)


def test_conditions_name_what_a_time_depends_on() -> None:
    found = timing.conditions(dtype=torch.bfloat16)
    assert found["threads"] == torch.get_num_threads()
    assert found["dtype"] == "bfloat16" and found["device"] == "cpu"
    assert json.loads(json.dumps(found)) == found
