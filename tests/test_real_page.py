"""The page of the real runs: sections replaced one by one, and a picture of what stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.scripts import figures, real_page

FIRST = """### First, a network

Dense: accuracy 0.8000 on 1,234 test inputs. 2 conversions.

| budget | cost | gated | minus static |
|---|---|---|---|
| 0.75 | 0.740 (0.730 to 0.750) | 0.7900 (0.7800 to 0.8000) | +1.0 (+0.5 to +1.5) |
| 0.50 | 0.500 (0.490 to 0.510) | 0.7000 (0.6900 to 0.7100) | -2.0 (-3.0 to -1.0) |

| budget | routers and skip paths: cost, accuracy, share | routers alone: cost, accuracy, share |
|---|---|---|
| 0.75 | 0.740, 0.7900, 98.8 % | 0.755, 0.7500, 93.8 % |
| 0.50 | 0.500, 0.7000, 87.5 % | 0.505, 0.6000, 75.0 % |

| budget | N = 1, two threads | N = 1, one thread |
|---|---|---|
| 0.75 | 0.90x (0.80 to 1.00) | 0.95x (0.90 to 1.00) |
| 0.50 | **0.60x** (0.50 to 0.70; all 0.65) | 0.70x (0.60 to 0.80) |
"""
SECOND = "### Second\n\nDense: nats_per_token 1.5800 on 100 texts.\n"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{real_page.START}\n\n{FIRST}\n{SECOND}\n{real_page.END}\nafter\n", encoding="utf-8")
    return file


def test_what_is_not_run_again_stays(page: Path) -> None:
    before = page.read_text(encoding="utf-8")
    real_page.replace(page, {})
    assert page.read_text(encoding="utf-8") == before
    real_page.replace(page, {"Second": "### Second\n\nmeasured again\n", "Third": "### Third\n\nnew\n"})
    expected = before.replace("Dense: nats_per_token 1.5800 on 100 texts.\n", "measured again\n\n### Third\n\nnew\n")
    assert page.read_text(encoding="utf-8") == expected


def test_an_empty_page_takes_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{real_page.START}\n{real_page.END}\nb\n", encoding="utf-8")
    real_page.replace(page, {"Second": SECOND})
    assert page.read_text(encoding="utf-8") == f"a\n{real_page.START}\n\n{SECOND}\n{real_page.END}\nb\n"


def test_what_stands_before_the_first_heading_stays(page: Path) -> None:
    before = page.read_text(encoding="utf-8").replace(FIRST, f"An introduction.\n\n{FIRST}")
    page.write_text(before, encoding="utf-8")
    real_page.replace(page, {})
    assert page.read_text(encoding="utf-8") == before


def test_two_sections_of_a_title_are_refused(page: Path) -> None:
    page.write_text(page.read_text(encoding="utf-8").replace(SECOND, f"{SECOND}\n{SECOND}"), encoding="utf-8")
    with pytest.raises(ValueError, match="two sections 'Second'"):
        real_page.replace(page, {})


def test_a_page_without_accuracies_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"{real_page.START}\n\n{SECOND}\n{real_page.END}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no table of accuracies"):
        real_page.draw(tmp_path / "p.png", tmp_path / "page.md")


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="real runs: begin"):
        real_page.replace(tmp_path / "page.md", {})


def test_the_picture_shows_the_tables(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(real_page, "draw_networks", lambda path, panels: drawn.extend(panels))
    real_page.draw(tmp_path / "p.png", page)
    [(title, dense, by_cost, by_time)] = drawn
    assert (title, dense) == ("First, a network", 0.8)
    points = {curve.label: curve.points for curve in by_cost}
    assert points["routers and skip paths trained"] == [(0.74, 0.79), (0.5, 0.7)]
    assert points["static cut, same skip paths"] == [(0.74, pytest.approx(0.78)), (0.5, pytest.approx(0.72))]
    assert points["routers alone"] == [(0.755, 0.75), (0.505, 0.6)]
    assert [(curve.label, curve.points) for curve in by_time] == [("N = 1", [(0.9, 0.79), (0.6, 0.7)])]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_it_is_a_png(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    made, canvas = [], figures._canvas
    monkeypatch.setattr(figures, "_canvas", lambda size: made.append(canvas(size)) or made[-1])
    curve = figures.Curve("a curve", [(0.5, 0.7), (0.75, 0.8)])
    figures.draw_networks(tmp_path / "p.png", [("a network", 0.8, [curve], [curve])] * count)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    [figure] = made
    assert sum(axes.axison for axes in figure.axes) == 2 * count  # what is left of the last row stays empty
