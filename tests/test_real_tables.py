"""Tables of the real runs, from numbers made up here."""

from __future__ import annotations

from typing import Any

from surgery.scripts import real_runs, real_tables


def point(budget: float, *scores: float) -> dict[str, Any]:
    return {
        "budget": budget,
        "costs": [budget - 0.01, budget + 0.01],
        "submodules": [budget, budget],
        "scores": list(scores),
        "agreements": [0.9, 0.9],
        "gap": (-0.01, -0.02, 0.0),
        "peers": {"static": [0.7, 0.7], "shuffled": [0.5, 0.5]},
        "ahead": {"static": (0.1, 0.05, 0.15), "shuffled": (0.3, 0.2, 0.4)},
    }


RESULT: dict[str, Any] = {
    "name": "net",
    "title": "A network",
    "dense": 0.8,
    "metric": "accuracy",
    "inputs": 1234,
    "targets": {"0.6": "98 %"},
    "policy": ["routed", "routed"],
    "looks": [False, False],
    "trained": [point(0.75, 0.8, 0.78), point(0.6, 0.76, 0.72)],
    "routers": [point(0.75, 0.77), point(0.6, 0.6)],
    "healed": None,
    "peers": {"0.75": [{"name": "static+look", "difference": 0.02, "low": -0.01, "high": 0.05}]},
    "peer_inputs": 100,
    "times": {"0.6": {"1": {"median": 0.9, "q1": 0.8, "q3": 1.0}, "32": {"median": 0.5, "q1": 0.4, "q3": 0.6}}},
    "conditions": {"threads": 2},
}


def test_every_number_is_in_its_row() -> None:
    lines = real_tables.markdown(RESULT).splitlines()
    assert "accuracy 0.8000 on 1,234 test inputs. 2 conversions" in lines[2]
    assert (
        "| 0.60 | 0.600 (0.590 to 0.610) | 0.600 (0.600 to 0.600) | 0.7400 (0.7200 to 0.7600) | 92.5 % | 98 % "
        "| -1.0 (-2.0 to +0.0) | +10.0 (+5.0 to +15.0) | +30.0 (+20.0 to +40.0) |"
    ) in lines
    assert "| 0.60 | 0.600, 0.7400, 92.5 % | 0.600, 0.6000, 75.0 % |" in lines
    assert "| 0.75 | +2.0 (-1.0 to +5.0) |" in lines
    assert "| 0.60 | 0.90x (0.80 to 1.00) | 0.50x (0.40 to 0.60) |" in lines
    assert any("was undone" in line for line in lines)


def test_second_looks_are_in_the_sum_of_all_calls() -> None:
    ratio = {"median": 0.4, "q1": 0.35, "q3": 0.5, "total": 0.625}
    lines = real_tables.markdown({**RESULT, "looks": [True, True], "times": {"0.6": {"1": ratio}}}).splitlines()
    assert "| 0.60 | 0.40x (0.35 to 0.50; all 0.62) |" in lines


def test_what_was_not_run_is_not_there() -> None:
    text = real_tables.markdown({k: v for k, v in RESULT.items() if k not in ("routers", "healed", "peers", "times")})
    assert "minus policies" not in text and "Time of" not in text and "undone" not in text
    assert "not scored yet" in real_tables.markdown({"title": "A network"})


def test_runs_name_what_exists() -> None:
    assert len({run.name for run in real_runs.RUNS}) == len(real_runs.RUNS)
    assert all(set(run.targets) <= set(run.budgets) and run.budget in run.budgets for run in real_runs.RUNS)
