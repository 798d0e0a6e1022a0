"""Child processes that tests start, watch, kill and freeze, and the waiting that goes with it."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Child:
    """A child process with its output in a file. It dies with the thread that started it: start it in the main one."""

    def __init__(self, command: Sequence[str | Path], *, log: Path, env: Mapping[str, str], cwd: Path = REPOSITORY):
        self.command = [str(part) for part in command]
        self.log = log
        self._seen = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                preexec_fn=_die_with_parent,
            )

    @classmethod
    def python(
        cls, *arguments: str | Path, log: Path, env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
    ) -> Child:
        """This Python with these arguments; `env` is added to a clean environment that can import the repository."""
        return cls([sys.executable, "-u", *arguments], log=log, env=clean_env(env or {}), cwd=cwd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def alive(self) -> bool:
        return self.returncode is None

    def output(self) -> str:
        """All it has printed, and what a predecessor with the same log printed before."""
        return self.log.read_text(errors="replace")

    def wait_for_line(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """The first match of a pattern in what this process prints; fails at once when it ends without one."""

        def match() -> re.Match[str] | None:
            ended = not self.alive
            with self.log.open("rb") as log:
                log.seek(self._seen)
                found = re.search(pattern, log.read().decode(errors="replace"), re.MULTILINE)
            if found is None and ended:
                raise AssertionError(
                    f"the process ended with status {self.returncode} before printing {pattern!r}:\n{self.tail()}"
                )
            return found

        return wait_for(match, timeout, lambda: f"a line {pattern!r}; it printed:\n{self.tail()}")

    def wait(self, timeout: float = 30) -> int:
        """Its exit status (negative: the signal that ended it)."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the process still runs after {timeout} s; it printed:\n{self.tail()}") from None

    def check(self, timeout: float = 30) -> None:
        """Wait for it, and fail unless it ended well."""
        status = self.wait(timeout)
        assert status == 0, f"the process ended with status {status}; it printed:\n{self.tail()}"

    def kill(self) -> None:
        """SIGKILL, and gone when this returns. It is no error when it has ended already."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        self._process.terminate()

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and locks, and does nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def tail(self, characters: int = 4000) -> str:
        return self.output()[-characters:]

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def clean_env(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child: ours without any setting of Dapr, OpenAI or outlast, and with `extra`."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("DAPR_", "OPENAI_", "OUTLAST_"))}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**ours, "PYTHONPATH": path, **extra}


def wait_for(
    attempt: Callable[[], T | None], timeout: float = 30, what: str | Callable[[], str] = "it", every: float = 0.01
) -> T:
    """Call `attempt` until it returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        result = attempt()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for {what() if callable(what) else what}")
        time.sleep(every)


def wait_for_file(path: Path, timeout: float = 30) -> str:
    """The text of a file, once it is there and not empty."""
    return wait_for(lambda: path.read_text() if path.exists() else None, timeout, f"the file {path.name}")


def wait_for_lines(path: Path, count: int, timeout: float = 30) -> int:
    """The number of lines of a file, once it has at least `count`."""

    def enough() -> int | None:
        lines = count_lines(path)
        return lines if lines >= count else None

    return wait_for(enough, timeout, lambda: f"{count} lines in {path.name}; it has {count_lines(path)}")


def count_lines(path: Path, containing: str = "") -> int:
    """The number of whole lines (that contain a text); 0 when there is no such file."""
    if not path.exists():
        return 0
    whole, _, _partial = path.read_text().rpartition("\n")
    return sum(1 for line in whole.split("\n") if line and containing in line)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _die_with_parent() -> None:
    """Runs in the child before the program: SIGKILL for it when the test process dies. Linux only."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
