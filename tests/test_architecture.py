"""Imports go down the table of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ORDER = [
    name for line in PAGE.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])
]
UPWARDS = {"tables", "adapters", "planning"}
"""What may be imported from above, inside a function: the page says why."""


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of `surgery` that this piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("surgery."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "surgery":
            path = (node.module or "").split(".")
            yield from path[1:2] or (alias.name for alias in node.names)


def wrong(name: str, source: str) -> list[str]:
    """Imports of a module that go against the order."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        inside = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for other in imports(node):
            if (inside and other in UPWARDS) or (other in ORDER and ORDER.index(other) < ORDER.index(name)):
                continue
            found.append(f"{name} imports {other}")
    return found


def test_the_table_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in (ROOT / "surgery").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_down_the_table(name: str) -> None:
    assert not wrong(name, (ROOT / "surgery" / f"{name}.py").read_text())


def test_imports_against_the_order_are_seen() -> None:
    assert wrong("sites", "from surgery.conversion import convert") == ["sites imports conversion"]
    assert wrong("sites", "from surgery import conversion") == ["sites imports conversion"]
    assert wrong("sites", "def f():\n    import surgery.hub") == ["sites imports hub"]
    assert wrong("sites", "from surgery.tables import shown") == ["sites imports tables"]
    assert not wrong("sites", "from surgery import errors\ndef f():\n    from surgery.tables import shown")


def test_the_command_line_is_imported_by_nothing_else() -> None:
    for path in (*(ROOT / "surgery").glob("*.py"), *(ROOT / "adapters").glob("*.py")):
        assert "scripts" not in imports(ast.parse(path.read_text())), path.name
