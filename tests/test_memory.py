"""Memory that commands which train keep for themselves."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from surgery.scripts import convert, heal
from surgery.scripts.cli import app

FAULTS = """
import resource, sys
import torch
from surgery.scripts.memory import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
for _ in range(16):  # until aligned blocks find their places
    torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library is asked to keep memory")
def test_what_is_freed_is_not_given_back() -> None:
    def faults(mode: str) -> int:
        found = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        return int(found.stdout)

    assert faults("kept") < faults("default") / 4


@pytest.mark.parametrize("command", ["convert", "heal"])
def test_commands_that_train_ask_for_it(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[str] = []
    for module in (convert, heal):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: called.append(command))
    arguments: dict[str, list[Any]] = {
        "convert": ["python:nowhere.py:model", "--budget", "0.6"],
        "heal": [str(tmp_path / "nowhere"), "--data", "nowhere.csv", "--kind", "norms"],
    }
    CliRunner().invoke(app, [command, *arguments[command], "--out", str(tmp_path / "out")])
    assert called == [command]
