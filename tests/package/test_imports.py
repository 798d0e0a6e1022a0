"""What importing outlast brings along, each import in a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import outlast

FRAMEWORKS = ("agents", "langchain", "langchain_core", "langgraph", "openai")


def _loaded(module: str) -> set[str]:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", ["outlast", "outlast.checkpointer", "outlast.embedded", "outlast.testing", "outlast.cli"]
)
def test_no_framework_is_imported(module: str) -> None:
    assert not _loaded(module) & set(FRAMEWORKS)


ROOMS = {
    "embedded": {"embedded"},
    "checkpointer": {"checkpointer", "errors", "embedded"},
    "recovery": {"recovery", "checkpointer", "errors", "embedded"},
    "adapters": {"adapters", "recovery", "checkpointer", "errors"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_imports_upward(room: str) -> None:
    found: set[str] = set()
    for path in (Path(outlast.__file__).parent / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("outlast."):
                found.add((node.module or "").split(".")[1])
    assert found <= ROOMS[room]
