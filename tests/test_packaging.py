"""What is installed, and what an import costs."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).resolve().parent.parent
PROBE = "import sys; import {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"


def imported_by(module: str) -> set[str]:
    """Top-level packages that importing `module` in a new process brings along."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_surgery_imports_no_ecosystem() -> None:
    heavy = {"timm", "transformers", "datasets", "accelerate", "torchvision", "matplotlib", "sklearn", "typer"}
    assert not heavy & imported_by("surgery")


def test_importing_the_adapters_imports_no_ecosystem() -> None:
    assert not {"timm", "transformers", "datasets", "sklearn"} & imported_by("surgery.adapters")


def test_the_command_starts_without_torch() -> None:
    heavy = {"torch", "numpy", "timm", "transformers", "datasets", "matplotlib"}
    assert not heavy & imported_by("surgery.scripts.cli")


def test_every_public_name_is_there_and_declared() -> None:
    declared = {
        alias.name
        for node in ast.walk(ast.parse((ROOT / "surgery" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgery.")
        for alias in node.names
    }
    assert declared == set(surgery.__all__) <= set(dir(surgery))
    for name in surgery.__all__:
        assert getattr(surgery, name).__name__ == name
    assert surgery.errors.SurgeryError is sys.modules["surgery.errors"].SurgeryError
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = surgery.nothing


def test_scripts_shadow_no_module() -> None:
    shadowed = {path.stem for path in (ROOT / "scripts").glob("*.py")} & set(sys.stdlib_module_names)
    assert not shadowed


def test_the_wheel_has_one_top_level_name(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("surgery", "adapters", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"surgery"}
    assert {"surgery/py.typed", "surgery/adapters/__init__.py", "surgery/scripts/cli.py"} <= set(names)
    expected = {f"surgery/{path.name}" for path in (source / "surgery").glob("*.py")}
    expected |= {
        f"surgery/{folder}/{path.name}" for folder in ("adapters", "scripts") for path in (source / folder).glob("*.py")
    }
    assert expected <= set(names)
