"""What is refused: a named error that says what, where and what to do next, and nothing half-done."""

from __future__ import annotations

import pytest
import torch
from subjects import assert_equal, outputs, subject
from torch import nn

import surgery
from surgery import errors
from surgery.overview import status


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_gated_model_is_not_converted_twice() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.AlreadyConverted, match="remove"):
        surgery.insert_gates(one.gated, one.sites)
    with pytest.raises(errors.AlreadyConverted, match="remove"):
        surgery.find_sites(one.gated, one.example)


def test_model_without_sites() -> None:
    model, x = Plain(), torch.randn(2, 8)
    sites = surgery.find_sites(model, x)
    assert len(sites) == 0
    with pytest.raises(errors.NoSites, match="Plain"):
        surgery.insert_gates(model, sites)


@pytest.mark.parametrize("value", [None, "timm:resnet18", lambda x: x])
def test_not_a_module(value: object) -> None:
    with pytest.raises(errors.UnsupportedModel, match=type(value).__name__):
        surgery.find_sites(value, torch.zeros(2, 3))  # type: ignore[arg-type]


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(errors.UnsupportedModel, match="meta"):
        surgery.find_sites(model, torch.zeros(2, 8))


def test_example_that_does_not_fit() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.SurgeryError, match=r"2, 3, 7, 7"):
        surgery.find_sites(one.model, torch.zeros(2, 3, 7, 7))


def test_plan_of_another_model() -> None:
    plan = subject("timm/mixer").sites.plan()
    with pytest.raises(errors.PlanMismatch, match="blocks"):
        surgery.insert_gates(subject("timm/test_resnet").model, plan)


def test_plan_survives_json() -> None:
    one = subject("transformers/bert")
    plan = one.sites.plan()
    again = surgery.Plan.from_dict(plan.to_dict())
    assert again.names == plan.names
    gated = surgery.insert_gates(one.model, again)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, one.example), outputs(one.model, one.example))


def test_granularity_that_probes_forbid() -> None:
    sites = subject("timm/test_resnet").sites
    per_sample = [site.name for site in sites if "token" not in site.granularities]
    assert per_sample
    plan = sites.plan(granularity="token")  # applies where allowed
    assert all(planned.granularity in planned.site.granularities for planned in plan.sites)


def test_gates_are_needed() -> None:
    model = Plain()
    for use in (surgery.remove, status, lambda m: surgery.force(m, 0.5).__enter__()):
        with pytest.raises(errors.NotConverted, match="Plain"):
            use(model)  # type: ignore[operator]


def test_forced_site_that_does_not_exist() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match=r"blocks\.7\.mlp"), surgery.force(one.gated, {"blocks.7.mlp": False}):
        pass


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_forced_rate_outside_its_range(rate: float) -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match=r"\[0, 1\]"), surgery.force(one.gated, rate):
        pass


def test_forced_decisions_of_the_wrong_shape() -> None:
    one = subject("timm/vit_pico")
    site = one.sites.names[0]
    with surgery.force(one.gated, {site: torch.ones(5, dtype=torch.bool)}):
        with pytest.raises(errors.ForceError, match=rf"(?s){site}.*\(5,\).*\(2"):
            outputs(one.gated, one.example)


@pytest.mark.parametrize("value", [torch.ones(2), 1, "open"])
def test_forced_decisions_of_the_wrong_type(value: object) -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match="bool"), surgery.force(one.gated, {one.sites.names[0]: value}):  # type: ignore[dict-item]
        pass


def test_unknown_execution() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match="dense, mask, skip"), surgery.execution(one.gated, "fast"):  # type: ignore[arg-type]
        pass


def test_selection_that_leaves_nothing() -> None:
    with pytest.raises(errors.NoSites, match="blocks"):
        subject("timm/vit_pico").sites.filter("stages.*")
