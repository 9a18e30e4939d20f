"""Fixtures that all tests share: one thread, fixed seeds, and the zoo's networks built once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import transformers


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SURGERY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
