"""Tables say what the values say, in plain text of 120 columns."""

from __future__ import annotations

import dataclasses

import pytest

from surgery.reports import Peer, Report
from surgery.sites import Rejection, Site, Sites
from surgery.tables import percent, quantity, render, report_table, rows_table, sites_table
from surgery.timing import Ratio

SITE = Site(
    name="blocks.0.mlp",
    kind="mlp",
    host="blocks.0",
    flops=12_345_678,
    share=0.25,
    parameters=33_200,
    granularities=("sample", "token"),
    layout="NTC",
    channels=64,
    positions=17,
)
REPORT = Report(
    data="500 labelled inputs",
    samples=500,
    metric={"accuracy": 0.912},
    dense_metric={"accuracy": 0.93},
    agreement=0.95,
    agreement_of="argmax",
    cost=0.61,
    cost_unit="flops",
    budget=0.6,
    submodules=0.4,
    active_rate={"blocks.0.mlp": 0.3, "layers[1]": 1.0},
    entropy={"blocks.0.mlp": 0.88, "layers[1]": 0.0},
    policies=12,
    deciding="500 inputs",
    speed={8: Ratio(0.7, 0.65, 0.8, 7.0, 10.0, 30, 0.71)},
    conditions={"device": "cpu", "threads": 1},
    peers=(Peer("static", 0.61, 0.9, 0.012, -0.001, 0.02),),
    notes=("a small test set",),
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12, "12"),
        (999, "999"),
        (1000, "1.00 k"),
        (999_999, "1.00 M"),
        (12_345_678, "12.3 M"),
        (4.11e9, "4.11 G"),
    ],
)
def test_quantity_has_three_digits(value: float, text: str) -> None:
    assert quantity(value) == text


def test_percent() -> None:
    assert (percent(0.1234), percent(1, 0)) == ("12.3 %", "100 %")


def test_sites_table_names_sites_totals_and_reasons() -> None:
    inner = dataclasses.replace(SITE, name="blocks.0.mlp.inner")
    text = render(
        sites_table(
            Sites(
                [SITE, inner],
                [Rejection("head", "no residual"), Rejection("", "no residual"), Rejection("a[0]", "something else")],
                model_name="Net",
                model_flops=50_000_000,
                model_parameters=1_000_000,
            )
        )
    )
    assert "Sites of Net" in text
    assert "blocks.0.mlp" in text and "sample, token" in text and "12.3 M" in text and "25.0 %" in text
    assert "2 sites hold 25.0 % of 50.0 MFLOPs per sample" in text, "a site inside another is not counted twice"
    assert "1.00 M parameters in the model" in text
    assert "blocks.0.mlp.inner" in text
    assert "head, (the model itself)  no residual" in text, "places with the same reason share a line"
    assert "a[0]" in text, "brackets in names are no markup"
    assert max(map(len, text.splitlines())) <= 120


def test_report_table_shows_every_number() -> None:
    text = render(report_table(REPORT))
    for part in ("91.20 %", "93.00 %", "-1.80 pt", "95.0 %", "61.0 %", "40.0 %", "+1.20 pt", "-0.10 pt … +2.00 pt"):
        assert part in text, part
    for part in ("0.70", "0.65 … 0.80", "device cpu, threads 1", "layers[1]", "note: a small test set", "500 inputs"):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 120


def test_report_table_without_options_is_short() -> None:
    text = render(
        report_table(dataclasses.replace(REPORT, metric={}, dense_metric={}, speed={}, peers=(), active_rate={}))
    )
    assert "policy" not in text and "batch" not in text and "agreement with dense" in text


def test_cosines_are_not_shown_as_percent() -> None:
    peers = (Peer("static", 0.61, 0.9, 0.0125, -0.001, 0.02),)
    report = dataclasses.replace(REPORT, metric={}, dense_metric={}, agreement_of="cosine", peers=peers)
    lines = [line.split() for line in render(report_table(report)).splitlines()]
    assert ["static", "61.0", "%", "0.9", "+0.0125", "-0.001", "…", "+0.02"] in lines
    assert any(line[:3] == ["policy", "cost", "cosine"] for line in lines)
    equal = render(report_table(dataclasses.replace(report, agreement_of="argmax")))
    assert "90.00 %" in equal and "+1.25 pt" in equal


def test_losses_are_not_shown_as_percent() -> None:
    report = dataclasses.replace(REPORT, metric={"nats_per_token": 1.58}, dense_metric={"nats_per_token": 1.5})
    assert "nats per token" in render(report_table(report)) and "+0.08" in render(report_table(report))


def test_rows_table_aligns_numbers_and_takes_cells_literally() -> None:
    text = render(
        rows_table(
            "Rows",
            [{"site": "a[red]", "active_rate": 0.25, "count": 3}, {"site": "b", "active_rate": None, "count": 40}],
        )
    )
    assert "a[red]" in text and "25.0 %" in text and "active rate" in text
    assert render(rows_table("Rows", [])) == "Rows: nothing to show"
