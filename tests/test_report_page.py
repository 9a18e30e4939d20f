"""The report and the page: one file without requests, both themes, pictures beside it; a click in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import convert, network, read_json, run  # noqa: F401  (network is a fixture)

from surgery.adapters import digits
from surgery.audits import GroupAudit
from surgery.errors import DataError
from surgery.logs import Decision, Row
from surgery.scripts import report_figures
from surgery.scripts.report_gallery import _slices, first_rates, jensen_shannon
from surgery.scripts.report_inputs import _patch_map, _shares, viridis

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def made(network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A conversion, and a log of it."""
    out = tmp_path_factory.mktemp("made") / "digits-c60"
    convert(network, out, "--tune", "oneshot", "--limit", 320)
    read_json("record", out, "--data", "digits", "--limit", 64, "--batch-size", 8, "--out", out.with_name("log"))
    return out


def test_divergence_of_two_shares() -> None:
    assert jensen_shannon(0.3, 0.3) == 0 and jensen_shannon(0.0, 1.0) == 1
    assert jensen_shannon(0.0, 0.5) == pytest.approx(-0.25 * math.log2(0.25) - 0.75 * math.log2(0.75) - 0.5)


def test_shares_and_patches() -> None:
    decisions = {"a": torch.tensor([True, False, True, True, True]), "b": torch.tensor([True] * 4 + [False])}
    assert _shares(decisions) == [1.0, 0.5, 1.0, 1.0, 0.5]
    assert _patch_map([1.0] * 5).startswith("data:image/png;base64,") and _patch_map([1.0] * 6) == ""
    assert viridis(0.0) == ("#440154", "#ffffff") and viridis(1.0) == ("#fde725", "#000000")


def drawn(draw: Callable[[Any, bool], None]) -> Any:
    """The axes of a picture."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, False)
    return figure.axes


@pytest.mark.parametrize(("seconds", "label"), [(0.4, "(seconds)"), (600, "(minutes)"), (90_000, "(hours)")])
def test_drift_is_over_a_time_that_can_be_read(seconds: float, label: str) -> None:
    _, axes = drawn(report_figures.drift([0, seconds], [0.5, 0.6], {"a": [0.1, 0.2]}))
    assert axes.get_xlabel().endswith(label) and max(axes.lines[0].get_xdata()) < 100


def test_groups_without_labels_show_agreement() -> None:
    part = GroupAudit("a", 3, 0.5, 0.4, 0.6, accuracy=1.0, dense_accuracy=1.0, agreement=0.9)
    for one, label, names in (
        (part, "accuracy", ["gated", "dense"]),
        (replace(part, accuracy=None, dense_accuracy=None), "agreement with dense", ["gated"]),
    ):
        _, axes = drawn(report_figures.groups([one]))
        assert axes.get_xlabel().startswith(label) and [line.get_label() for line in axes.lines] == names
        assert axes.get_xlim()[1] < 102 and not any(math.isnan(line.get_xdata()[0]) for line in axes.lines)
    assert len(drawn(report_figures.groups([replace(part, accuracy=None, dense_accuracy=None, agreement=None)]))) == 1


def test_report_is_one_file_that_asks_for_nothing(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    out = tmp_path / "report.html"
    options = ("--limit", 60, "--budgets", "0.6", "--log", made.with_name("log"))
    found = read_json("report", made, "--data", "digits", "--out", out, *options)
    assert {Path(one).name for one in found["pictures"]} == {
        f"report-{name}.png" for name in ("tradeoff", "classes", "costs", "policies", "drift")
    }
    text = out.read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|srcset|href)=["']([^"']*)""", text)
    assert addresses and all(one.startswith("data:image/png;base64,") for one in addresses)
    assert "http" not in text and "<script" not in text and "prefers-color-scheme: dark" in text
    assert text.count("<source media") == 5 and "Easiest inputs" in text and "Hardest inputs" in text


def test_a_port_that_is_taken_is_refused_before_the_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = run("app", tmp_path / "no", "--port", port, "--json", expect=1)
    assert json.loads(said.stdout)["message"].startswith(
        f"--host 127.0.0.1 --port {port} cannot be used: Address already"
    )
    assert "--host no.such" in run("app", tmp_path / "no", "--host", "no.such", expect=1).stderr


@pytest.mark.slow
def test_page_in_a_browser(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "bypass-surgery[app]"')
    pytest.importorskip("selenium.webdriver", reason="the click is made by selenium")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed")
    from surgery.scripts import app_picture
    from surgery.scripts.explore import build
    from surgery.scripts.loading import Machine

    gated, loaded = Machine("cpu").load_converted(made, None)
    page = build(gated, loaded, "digits")
    picture = tmp_path / "digit.png"
    digit(picture)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=None)
    try:
        with app_picture.browser(1200, 900) as window:
            window.get(address)
            app_picture.run(window, None, picture)
            assert all(word in window.page_source for word in ("Gated", "Dense", "blocks.0.mlp"))
            assert window.save_screenshot(str(tmp_path / "page.png"))
            assert (tmp_path / "page.png").stat().st_size > 10_000
    finally:
        page.close()


def test_rows_of_one_call_stay_together() -> None:
    rows = [SimpleNamespace(time=call) for call in range(6) for _ in range(5)]
    parts = _slices(rows, 4)  # type: ignore[arg-type]
    assert [row.time for part in parts for row in part] == [row.time for row in rows]
    assert [len(part) for part in parts] == [10, 10, 10] and _slices(rows[:5], 3) == [rows[:5]]  # type: ignore[arg-type]


def test_rates_of_a_log_go_by_tokens_and_first_passes() -> None:
    """Two real tokens, one of them open; four closed ones of an input that was looked at again; padding alone."""

    def row(values: list[bool], real: list[bool] | None, looked: bool) -> Row:
        decision = Decision("mlp", torch.tensor(values), None, None if real is None else torch.tensor(real))
        known: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Row))
        return Row(**{**known, "passes": ((decision,),), "looked": looked})

    short = row([True, False, True], [True, True, False], looked=False)
    long, empty = row([False] * 4, None, looked=True), row([True], [False], looked=False)
    assert first_rates([short, long, empty]) == {"mlp": 1 / 6}
    assert [one.rates() for one in (short, long, empty)] == [{"mlp": 0.5}, {"mlp": 1.0}, {"mlp": 0.0}]


def digit(path: Path) -> None:
    """Write one digit as a picture."""
    from surgery.adapters.images import to_pil

    to_pil(digits("test")[0][0], colour=False).save(path)


def test_the_page_says_what_the_cost_is_made_of(made: Path) -> None:
    from surgery.scripts.explore import look, sites_html, summary_html
    from surgery.scripts.loading import Machine

    gated, loaded = Machine("cpu").load_converted(made, None)
    row = {"image": digits("test")[0][0]}
    found = look(gated, loaded, row, 0.7)
    assert 0 < found["routers"] < found["cost"] <= 1 + found["routers"] + 1e-9 and not found["again"]
    assert f"deciding costs {100 * found['routers']:.1f} %" in summary_html(found)
    assert "on top" in summary_html({**found, "cost": 1.03}) and "on top" not in summary_html({**found, "cost": 0.9})
    assert "both passes count" in summary_html({**found, "cost": 1.6, "again": True})
    page = sites_html({"blocks.0.attn": 1.0, "blocks.0.mlp": 0.25, "blocks.1.mlp": 0.0})
    assert "sites of blocks<" in page and ">0.attn<" in page and "25 % of tokens ran" in page and "skipped" in page
    assert "sites of" not in sites_html({"mlp": 1.0})
    with pytest.raises(DataError, match="refuses what it is called with"):
        look(gated, loaded, {"image": digits("test", size=16)[0][0]}, 0.7)
