"""The command line as its users have it: real processes, in a folder with the agents' module."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.procs import Child, clean_env

HERE = Path(__file__).parent


@dataclass
class Cli:
    """Runs commands with the same environment and in the same folder."""

    folder: Path
    env: dict[str, str]
    cwd: Path = HERE

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self._python("-m", "outlast.cli", *arguments, env=env)

    def json(self, *arguments: str, **env: str) -> Any:
        """What a command that must go well prints as JSON."""
        done = self(*arguments, "--json", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def submit(self, *submissions: str, wait: bool = True) -> None:
        """Submit runs (AGENT/RUN_ID/INPUT) from a program of its own; without `wait` it has no worker."""
        env = {} if wait else {"OUTLAST_WORKER": "off"}
        done = self._python(str(HERE / "sample.py"), *submissions, "wait" if wait else "leave", env=env)
        assert done.returncode == 0, done.stderr

    def start(self, *arguments: str, name: str = "child", **env: str) -> Child:
        """Start a command that serves."""
        log = self.folder / f"{name}.log"
        command = ("-m", "outlast.cli", *arguments)
        return Child.python(*command, log=log, env={**self.env, **env}, cwd=self.cwd)

    def _python(self, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=clean_env({**self.env, "COLUMNS": "200", **env}),
            cwd=self.cwd,
            capture_output=True,
            text=True,
            timeout=90,
        )


@pytest.fixture
def cli(tmp_path: Path, sidecar_env: dict[str, str]) -> Cli:
    """The command line with a sidecar whose state is empty."""
    return Cli(tmp_path, {**sidecar_env, "STEPS_LOG": str(tmp_path / "steps.log")})


@pytest.fixture
def empty(tmp_path: Path) -> Cli:
    """The command line in an empty folder, with nothing configured."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return Cli(tmp_path, {}, cwd=folder)


@pytest.fixture
def start(cli: Cli) -> Iterator[Callable[..., Child]]:
    """Starts commands that serve, and ends those that are left."""
    children: list[Child] = []

    def begin(*arguments: str, **options: str) -> Child:
        children.append(cli.start(*arguments, **options))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
