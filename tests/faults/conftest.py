from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stage import World, world

if not os.environ.get("FAULTS"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", name="world")
def _world() -> Iterator[World]:
    """The model and the ledger; this process's own agents, which only submit, are pointed to them, too."""
    with world() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in {**served.env, "OUTLAST_WORKER": "off"}.items():
            patch.setenv(name, value)
        yield served


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the logs of the workers."""
    return tmp_path_factory.mktemp("faults")
