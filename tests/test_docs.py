"""What the documentation shows works: Python blocks run, command lines parse, errors are listed, links lead on."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import surgery.errors
from surgery.errors import SurgeryError

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks whose info string is `language`."""
    return [body for info, body in FENCE.findall(page.read_text(encoding="utf-8")) if info.strip() == language]


RUNNABLE = [page for page in PAGES if blocks(page, "python runnable")]


def command_lines() -> list[str]:
    """Every `surgery …` line in a shell block or an indented one; lines that a backslash ends go on."""
    lines = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        whole = "\n".join([*blocks(page, "sh"), *re.findall(r"^    (surgery (?:.*\\\n)*.*)", text, re.MULTILINE)])
        lines += whole.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("surgery ")]


def named_commands() -> list[str]:
    """Every `surgery …` in a sentence or a cell: a command, and perhaps some of its options."""
    texts = [FENCE.sub("", page.read_text(encoding="utf-8")) for page in [*PAGES, ROOT / "CHANGELOG.md"]]
    return sorted({" ".join(line.split()) for text in texts for line in re.findall(r"`(surgery [^`]+)`", text)})


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for body in blocks(page, "python runnable"):
        exec(compile(body, str(page), "exec"), names)


def test_readme_and_quickstart_are_among_the_pages_that_run() -> None:
    assert {"README.md", "quickstart.md"} <= {page.name for page in RUNNABLE}


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line: str) -> None:
    from surgery.scripts.cli import app

    name, *arguments = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)


@pytest.mark.parametrize("line", named_commands())
def test_commands_that_are_named_exist(line: str) -> None:
    from surgery.scripts.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name, *words = line.split()[1:]
    known = (
        {option for one in commands[name].params for option in (*one.opts, *one.secondary_opts)}
        if name in commands
        else set()
    )
    assert name in {*commands, "--help"} and {word for word in words if word.startswith("--")} <= {*known, "--help"}


def test_every_error_is_listed_with_cause_and_next_step() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    listed = [name for name, _, _ in rows]
    defined = [
        name for name, cls in vars(surgery.errors).items() if inspect.isclass(cls) and issubclass(cls, SurgeryError)
    ]
    assert listed == defined, "in the order of the module"
    assert all(cause.strip() and step.strip() for _, cause, step in rows)


@pytest.mark.parametrize("name", [name for name in surgery.__all__ if inspect.isfunction(getattr(surgery, name))])
def test_exported_functions_say_what_they_take_give_and_raise(name: str) -> None:
    function = getattr(surgery, name)
    text, given = inspect.getdoc(function) or "", inspect.signature(function)
    assert not [one for one in given.parameters if not re.search(rf"^    {one}: ", text, re.MULTILINE)]
    silent = str(given.return_annotation) in ("None", "Iterator[None]")
    assert silent or re.search(r"^(Returns|Yields):\n    \S", text, re.MULTILINE)
    assert re.search(r"^Raises:\n    \S", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub makes it: letters, digits, hyphens."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                there = page.parent / target if target else page
                assert there.exists(), (page, target)
                assert not anchor or anchor in anchors(there), (page, target, anchor)


def test_pages_of_results_are_among_those_checked() -> None:
    assert {"results.md", "lab/images.md", "lab/texts.md"} <= {
        page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")
    }
