"""Graphs to readable Python functions, whose lines show in tracebacks."""

from __future__ import annotations

import inspect
import linecache
from typing import Any

from torch import fx


def code_of(graph: fx.Graph, name: str, namespace: dict[str, Any]) -> str:
    """Source of a graph as a function of that name, and what it needs added to `namespace`."""
    python = graph.python_code("self")
    namespace.update(python.globals)
    return python.src.strip().replace("def forward(", f"def {name}(", 1)


def function_of(graph: fx.Graph, name: str, filename: str) -> Any:
    """A graph as a function of that name."""
    namespace: dict[str, Any] = {}
    return functions_of(code_of(graph, name, namespace), namespace, filename)[name]


def functions_of(source: str, namespace: dict[str, Any], filename: str) -> dict[str, Any]:
    """The functions that some source defines, by name."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = dict(namespace)
    exec(compile(source, filename, "exec"), scope)
    return {
        name: value
        for name, value in scope.items()
        if inspect.isfunction(value) and value.__code__.co_filename == filename
    }
