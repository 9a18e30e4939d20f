"""The zoo itself: every network runs, tells samples apart, and has as many sites as its modules say."""

from __future__ import annotations

import pytest
import torch
from subjects import assert_equal, differ, outputs, rows, subject

import surgery
from surgery.scripts.zoo import COVERAGE, LAWS, Entry

LAW = pytest.mark.parametrize("name", [entry.name for entry in LAWS])


def test_names_are_unique() -> None:
    names = [entry.name for entry in COVERAGE]
    assert len(set(names)) == len(names)
    assert len(LAWS) >= 16


@LAW
def test_network_runs_and_tells_samples_apart(name: str) -> None:
    one = subject(name)
    both = outputs(one.model, one.example)
    assert all(t.isfinite().all() for t in both if t.is_floating_point())
    assert differ([both[0][:1]], [both[0][1:2]], 1e-3)


@LAW
def test_build_is_reproducible(name: str) -> None:
    entry = subject(name).entry
    first, second = entry.build(), entry.build()
    assert_equal(outputs(*first), outputs(*second))


@LAW
def test_sites_found_are_the_sites_expected(name: str) -> None:
    one = subject(name)
    one.sites.expect(one.entry.expected(one.model))


@LAW
def test_every_site_matters(name: str) -> None:
    """Closing any single site changes the output, so that the laws can see what they check."""
    one = subject(name)
    example = rows(one.example, [0])
    dense = outputs(one.model, example)
    for site in one.sites.names:
        with surgery.force(one.gated, {other: other != site for other in one.sites.names}):
            assert differ(outputs(one.gated, example), dense, 1e-4), site


def test_expected_counts_fail_when_a_class_is_missing() -> None:
    entry = Entry("plain/wrong", lambda: torch.nn.Linear(2, 2), lambda n: torch.zeros(n, 2), (("Block", 2),))
    with pytest.raises(AssertionError, match="no module of class Block"):
        entry.expected(entry.make())
