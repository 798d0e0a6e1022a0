"""What the workers of a trial write down of each step, one line of JSON each, and the points they are held at."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

What = Literal["begin", "end", "failed", "recorded", "read", "held", "hung"]
POINTS: Final = ("begin", "end", "recorded")
"""Where a run can be disturbed: before a call, after it while nothing is recorded of it, and after that."""

HANG: Final = "hang"
"""File in the folder of a trial: the name of the tool whose next call hangs. The process that hangs removes it."""


@dataclass(frozen=True)
class Event:
    """Something that a worker did.

    Attributes:
        what: `begin`, `end`, `failed`: of a call; `recorded`: its outcome is committed; `read`: its code asked for the
            idempotency key; `held`: the worker waits here for what is to happen to it; `hung`: the call hangs.
        run: The run.
        key: Idempotency key of the step: the same in every attempt.
        type, name: What kind of step, and of what.
        pid: The worker.
        at: Unix time.
        detail: For `recorded` `result` or `error`; for `failed` the type of the exception; for `held` the kind of event
            it is held at; for `begin` the seconds it may take.
    """

    what: What
    run: str
    key: str
    type: str
    name: str
    pid: int
    at: float
    detail: str = ""


def read(file: Path) -> list[Event]:
    """Return the events of a file, in the order in which they were written."""
    whole, _, _half_written = file.read_bytes().rpartition(b"\n") if file.exists() else (b"", b"", b"")
    return [Event(**json.loads(line)) for line in whole.splitlines()]


@dataclass(frozen=True)
class Hold:
    """An order to a worker: stop at this point.

    Attributes:
        run: The run.
        point: Which of its points, counted from 0 in the worker that has it.
    """

    run: str
    point: int


class Writer:
    """Writes the events of this process, and stops where it is told to.

    Args:
        folder: Holds the events, the order to stop (`hold`), and the sign to go on (`go`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._points: Counter[str] = Counter()
        self._recorded: set[str] = set()

    def write(self, what: What, run: str, key: str, type: str, name: str, detail: str = "") -> None:
        """Write an event; returns when this process may go on."""
        with self._lock:
            if what == "recorded":
                if key in self._recorded:
                    return
                if detail == "result":
                    self._recorded.add(key)
            self._append(Event(what, run, key, type, name, os.getpid(), time.time(), detail))
            if what not in POINTS:
                return
            point = self._points[run]
            self._points[run] += 1
            held = self._claim(Hold(run, point))
            if held:
                self._append(Event("held", run, key, type, name, os.getpid(), time.time(), what))
        while held and not (self._folder / "go").exists():
            time.sleep(0.002)

    def _append(self, event: Event) -> None:
        # One write of a whole line: it is there even if this process is killed at once.
        out = os.open(self._folder / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(out, json.dumps(asdict(event)).encode() + b"\n")
        finally:
            os.close(out)

    def _claim(self, here: Hold) -> bool:
        order = self._folder / "hold"
        try:
            if Hold(**json.loads(order.read_bytes())) != here:
                return False
            order.unlink()
        except FileNotFoundError:
            return False
        return True


def order(folder: Path, hold: Hold) -> None:
    """Have the worker of a run stop at a point."""
    (folder / "go").unlink(missing_ok=True)
    draft = folder / "hold.new"
    draft.write_text(json.dumps(asdict(hold)))
    draft.rename(folder / "hold")


def withdraw(folder: Path) -> None:
    """Let everybody go on, and stop nobody any more."""
    (folder / "hold").unlink(missing_ok=True)
    (folder / "go").touch()


def points(events: list[Event], run: str) -> Iterator[Event]:
    """Yield the points of a run at which it can be disturbed."""
    return (event for event in events if event.run == run and event.what in POINTS)
