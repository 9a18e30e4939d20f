"""The content of a report, put together: numbers, pictures, inputs, tables."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.auditing import audited
from surgery.budgets import set_budget
from surgery.calling import device_of
from surgery.context import state_of
from surgery.logs import Log
from surgery.reports import Report
from surgery.scripts import outputs
from surgery.scripts import report_figures as figures
from surgery.scripts.bars import Report as Progress
from surgery.scripts.report_gallery import gallery
from surgery.scripts.report_inputs import inputs_of, viridis
from surgery.scripts.report_measuring import Subject, sweep_of, times_by_budget
from surgery.scripts.report_numbers import numbers_of, tables_of
from surgery.scripts.report_page import data_uri, page


def write(
    out: Path,
    subject: Subject,
    budgets: Sequence[float],
    speed: int,
    log: Log | None,
    seed: int,
    progress: Progress,
    measured: Mapping[float, Report] | None = None,
) -> list[Path]:
    """Write the page and its pictures.

    Args:
        out: HTML file.
        subject: What it is about.
        budgets: Of the curves.
        speed: Samples per timed call; 0 for no times.
        log: For drift over time.
        seed: Of random decisions and noise.
        progress: Called while at work.
        measured: Reports at budgets that were measured before.

    Returns:
        The pictures' paths.
    """
    gated, state = subject.gated, state_of(subject.gated)
    budget = state.budget
    texts = subject.rows.column(subject.rows.columns["text"]) if "text" in subject.rows.columns else []
    found, seen = audited(
        gated, subject.rows, subject.dense, None, subject.loaded.label_names, texts, 0.05, seed, progress
    )
    sweep = sweep_of(subject, budgets, seed, progress, measured or {})
    timed = times_by_budget(subject, list(sweep), speed, progress)
    if budget is not None:
        set_budget(gated, budget)
    drawn = gallery(subject, found, seen, sweep, timed, speed, log)
    pictures, shown = [], []
    for key, title, text, draw, width, height in drawn:
        light, dark = (figures.drawn(draw, width, height, dark=dark) for dark in (False, True))
        path = out.with_name(f"{out.stem}-{key}.png")
        outputs.write(path, _on_white(light))
        pictures.append(path)
        shown.append({"title": title, "text": text, "light": data_uri(light), "dark": data_uri(dark)})
    content = page(
        {
            "title": f"{subject.name}: what is skipped, and what that costs",
            "subtitle": f"{type(subject.dense).__name__} on {len(seen.costs):,} inputs of {Path(subject.data).name}",
            "numbers": numbers_of(found, seen, budget, sweep),
            "notes": [*state.notes, *found.notes],
            "figures": shown,
            "shown": inputs_of(subject, seen, texts),
            "tables": tables_of(found),
            "scale": ", ".join(viridis(i / 8)[0] for i in range(9)),
            "footer": f"Made by surgery report. {_conditions(subject)}",
        }
    )
    outputs.write(out, content.encode())
    return pictures


def _on_white(content: bytes) -> bytes:
    """The picture as a file of its own: transparency would be black on black in some viewers."""
    from PIL import Image

    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    stream = io.BytesIO()
    Image.alpha_composite(paper, picture).convert("RGB").save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _conditions(subject: Subject) -> str:
    from surgery.calling import dtype_of
    from surgery.timing import conditions

    found = conditions(device_of(subject.gated), dtype_of(subject.gated))
    return ", ".join(f"{name} {value}" for name, value in found.items())
