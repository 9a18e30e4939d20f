"""The page with the tables of the real runs: sections are replaced one by one, and the picture is drawn of what stands there.

So a network can be run again alone, and the picture never shows anything else than the tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from surgery.scripts.figures import Curve, draw_networks
from surgery.scripts.real_tables import COLUMNS

START, END = "<!-- real runs: begin -->", "<!-- real runs: end -->"
HEADING = "### "

Table = list[list[str]]


def replace(page: Path, sections: Mapping[str, str]) -> None:
    """Put sections between the marks of a page, in place of those of the same title; new ones come last.

    Args:
        page: Markdown file with the two marks.
        sections: Title -> text with its heading.

    Raises:
        ValueError: If a mark is missing, or a title is there twice.
    """
    before, now, after = _parts(page)
    kept = _sections(now) | {title: text.strip() for title, text in sections.items()}
    preamble = now.partition(f"\n{HEADING}")[0].strip()
    parts = [START, *([preamble] if preamble else []), *kept.values(), f"{END}{after}"]
    page.write_text(before + "\n\n".join(parts), encoding="utf-8")


def draw(picture: Path, page: Path) -> None:
    """One panel per network against cost, one below it against time; sections without an accuracy are left out.

    Raises:
        ValueError: If there is no other.
    """
    panels = []
    for title, text in _sections(_parts(page)[1]).items():
        if dense := re.search(r"^Dense: (?:accuracy|top1) ([\d.]+)", text, re.MULTILINE):
            tables = list(_tables(text))
            panels.append((title, float(dense.group(1)), list(_curves(tables)), list(_timed(tables))))
    if not panels:
        raise ValueError(f"{page} has no table of accuracies to draw")
    draw_networks(picture, panels)


def _parts(page: Path) -> tuple[str, str, str]:
    text = page.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{page} has no {START} and {END} for the tables to stand between")
    before, rest = text.split(START, 1)
    now, after = rest.split(END, 1)
    return before, now, after


def _sections(text: str) -> dict[str, str]:
    """Title -> text with its heading."""
    found: dict[str, str] = {}
    for part in re.split(rf"^(?={HEADING})", text, flags=re.MULTILINE):
        title = part.partition("\n")[0].removeprefix(HEADING)
        if title in found:
            raise ValueError(f"there are two sections {title!r}")
        if part.startswith(HEADING):
            found[title] = part.strip()
    return found


def _tables(text: str) -> Iterator[Table]:
    """Rows of cells, the line below the head left out."""
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        yield [head, *rows]


def _curves(tables: Sequence[Table]) -> Iterator[Curve]:
    """Cost -> score: the means, the static cut, and the other columns."""
    for head, *rows in tables:
        if "gated" in head:
            points = [(_number(row[head.index("cost")]), _number(row[head.index("gated")])) for row in rows]
            yield Curve("routers and skip paths trained", points)
            if "minus static" in head:
                ahead = [_number(row[head.index("minus static")]) / 100 for row in rows]
                static = [(cost, score - gap) for (cost, score), gap in zip(points, ahead, strict=True)]
                yield Curve("static cut, same skip paths", static)
        for name in ("routers", "healed"):
            for column, title in enumerate(head):
                if title.startswith(f"{COLUMNS[name]}: cost"):
                    cells = [row[column].split(", ") for row in rows]
                    yield Curve(COLUMNS[name], [(float(cost), float(score)) for cost, score, _ in cells])


def _timed(tables: Sequence[Table]) -> Iterator[Curve]:
    """Time by dense -> score, a curve for each batch size."""
    scores: dict[str, float] = {}
    for head, *rows in tables:
        if "gated" in head:
            scores = {row[0]: _number(row[head.index("gated")]) for row in rows}
        for column, title in enumerate(head):
            if title.startswith("N = ") and "one thread" not in title:
                name = title.removesuffix(", two threads")
                yield Curve(name, [(_number(row[column]), scores[row[0]]) for row in rows if row[0] in scores])


def _number(cell: str) -> float:
    """The number that a cell begins with."""
    found = re.match(r"\**([+-]?[\d.]+)", cell)
    if found is None:
        raise ValueError(f"a number was expected where the table has {cell!r}")
    return float(found.group(1))
