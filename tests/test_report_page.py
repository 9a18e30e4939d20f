"""The report and the page: one file without requests, both themes, pictures beside it; a click in a real browser."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import convert, network, read_json, run  # noqa: F401  (network is a fixture)

from surgery.scripts.report_content import _patch_map, _shares, _viridis, jensen_shannon

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
    assert _viridis(0.0) == ("#440154", "#ffffff") and _viridis(1.0) == ("#fde725", "#000000")


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


@pytest.mark.slow
def test_page_in_a_browser(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "bypass-surgery[app]"')
    webdriver: Any = pytest.importorskip("selenium.webdriver", reason="the click is made by selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from surgery.scripts.explore import build
    from surgery.scripts.loading import Machine

    gated, loaded = Machine("cpu").load_converted(made, None)
    page = build(gated, loaded, "digits")
    picture = tmp_path / "digit.png"
    digit(picture)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=None)
    settings = webdriver.ChromeOptions()
    settings.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        settings.add_argument(flag)
    window = webdriver.Chrome(options=settings, service=Service(driver))
    try:
        window.get(address)
        wait = WebDriverWait(window, 60)
        wait.until(lambda w: w.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(picture))
        wait.until(lambda w: w.find_elements(By.CSS_SELECTOR, "img[src*='/file=']"))
        window.find_element(By.CSS_SELECTOR, "#run").click()
        wait.until(lambda w: "of dense" in w.find_element(By.CSS_SELECTOR, "#summary").text)
        assert all(word in window.page_source for word in ("Gated", "Dense", "blocks.0.mlp"))
        assert window.save_screenshot(str(tmp_path / "page.png")) and (tmp_path / "page.png").stat().st_size > 10_000
    finally:
        window.quit()
        page.close()


def digit(path: Path) -> None:
    """Write one digit as a picture."""
    from surgery.adapters import digits
    from surgery.adapters.images import to_pil

    to_pil(digits("test")[0][0], colour=False).save(path)
