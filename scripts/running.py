"""How every command runs: results on standard output, everything else on standard error, errors by name."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.syntax import Syntax
from rich.text import Text

from surgery.errors import SurgeryError

ERROR = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

TAKE_DIRECTORIES = frozenset(
    (
        "app",
        "audit",
        "benchmark",
        "calibrate",
        "compare",
        "export",
        "heal",
        "push",
        "record",
        "replay",
        "report",
        "score",
    )
)
"""Commands whose DIR is a converted model; those that are left take a MODEL, or neither."""
# What to type next, by error, then by command, by what the command takes, or for all (""). Messages that name an option or a
# command say it themselves.
HINTS: Mapping[str, Mapping[str, str]] = {
    "AlreadyConverted": {"": "give the model that it was made from, or score it as it is"},
    "BaseMismatch": {"": "give the model that DIR was made from with --model"},
    "BudgetError": {"": "0.6 means 60 % of the dense compute"},
    "CheckpointError": {
        "DIR": "DIR is what `surgery convert` wrote; --model names what it was made from, if it does not say",
    },
    "DataError": {"": "`surgery {command} --help` shows the forms that --data can have"},
    "ExportError": {"": "`surgery export --help` shows what can be written, and how"},
    "HubError": {"": "`hf auth whoami` shows who you are there; the same command goes on where it was cut off"},
    "LogError": {
        "record": "",
        "": "`surgery record DIR --data … --out LOG` writes a log; replay it with the same DIR and data",
    },
    "NoSites": {"sites": "", "": "`surgery sites MODEL` shows what was found, and why the rest was left alone"},
    "PlanMismatch": {
        "DIR": "--model names what DIR was made from; `surgery doctor` shows which versions are installed",
        "MODEL": "`surgery sites MODEL` shows what every site allows",
    },
    "UnknownModel": {
        "DIR": "--model names what DIR was made from; `surgery sites --help` shows the forms that MODEL can have",
        "": "`surgery {command} --help` shows the forms that MODEL can have",
    },
    "UnknownSite": {"": "`surgery show DIR` lists all sites"},
    "UnsupportedModel": {"sites": "", "": "`surgery sites MODEL` shows what was looked at"},
}
_SAYS_IT = re.compile(r"(?<![\w-])--[a-z]|`surgery ")


def program() -> str:
    """What to type to run this program again: `surgery` where that is found, else its path."""
    called = Path(sys.argv[0])
    found = shutil.which("surgery")
    elsewhere = called.name == "surgery" and (found is None or not called.exists() or not called.samefile(found))
    return str(called) if elsewhere else "surgery"


def command_line(*words: object, options: Mapping[str, object]) -> str:
    """A complete line to type, quoted where it must be; options whose value is None are left out."""
    given = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return shlex.join([program(), *map(str, words), *given])


def standard_error() -> Console:
    """A console on standard error, made when needed so that redirection is respected."""
    return Console(stderr=True, highlight=False)


def command(page: Callable[..., None]) -> Callable[..., None]:
    """Turn named errors and Ctrl-C into one line and an exit status.

    The page must take `debug` and may take `as_json`.
    """

    @functools.wraps(page)
    def run(**options: Any) -> None:
        try:
            page(**options)
        except SurgeryError as error:
            if options.get("debug"):
                raise
            fail(error, page.__name__, as_json=options.get("as_json", False))
        except KeyboardInterrupt:
            interrupted("interrupted")

    return run


def hint_of(error: SurgeryError, called: str) -> str | None:
    """What to type next after an error in the command `called`; None where the message says it, or nothing helps."""
    if _SAYS_IT.search(str(error)):
        return None
    takes = "DIR" if called in TAKE_DIRECTORIES else "MODEL"
    for kind in type(error).__mro__:
        hints = HINTS.get(kind.__name__, {})
        found = next((hints[key] for key in (called, takes, "") if key in hints), None)
        if found is not None:
            return found.replace("{command}", called) or None
    return None


def fail(error: SurgeryError, called: str, *, as_json: bool = False) -> NoReturn:
    """Show a named error of the command `called` and leave with status 1."""
    name = type(error).__name__
    console = standard_error()
    console.print(Text.assemble((name, "bold red"), (f": {error}", "red")), soft_wrap=True)
    hint = hint_of(error, called)
    if hint:
        console.print(Text(f"next: {hint}"), soft_wrap=True)
    if as_json:
        show_json({"error": name, "message": str(error), "next": hint})
    raise typer.Exit(ERROR)


def interrupted(message: str) -> NoReturn:
    """Say what Ctrl-C left behind and leave with status 130."""
    standard_error().print(Text(message, style="yellow"), soft_wrap=True)
    raise typer.Exit(INTERRUPTED)


def show(renderable: RenderableType) -> None:
    """Print a result for people: 120 columns wide where standard output is no terminal."""
    from surgery.tables import PLAIN_WIDTH

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(renderable)


def show_code(code: str) -> None:
    """Print Python, in colours on a terminal and as it is elsewhere."""
    console = Console()
    if console.is_terminal:
        console.print(Syntax(code, "python", background_color="default", word_wrap=True))
    else:
        typer.echo(code)


def show_json(value: Mapping[str, Any]) -> None:
    """Print a result for programs."""
    typer.echo(json.dumps(value, indent=2, default=str))


def note(message: str) -> None:
    """Tell people something that is no result."""
    standard_error().print(Text(message), soft_wrap=True)
