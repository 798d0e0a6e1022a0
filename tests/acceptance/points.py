"""In the processes under test: effects that are counted outside, and the points at which a process is killed or held.

Everything goes through files of a folder that the test shares with its processes:

* `effects`: one line per effect of a node, appended;
* `trace`: one line per point that a process reached, appended;
* `kill_at`: a point; the first process to reach it removes the file and dies by SIGKILL there;
* `hold_at`: a point; the first process to reach it removes the file, says so in `trace`, and waits for the file `go`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

_folder: Path | None = None


def use(folder: str | Path) -> None:
    """Set the folder that this process shares with the test."""
    global _folder
    _folder = Path(folder)


def _append(name: str, line: str) -> None:
    assert _folder is not None
    out = os.open(_folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(out, line.encode() + b"\n")
    finally:
        os.close(out)


def note(line: str) -> None:
    """Tell the test something, in `trace`."""
    _append("trace", line)


def effect(name: str) -> None:
    """Do what a node is there for: something that the world can count."""
    reached(f"node {name} before")
    _append("effects", name)
    note(f"by {name} {os.getpid()}")
    reached(f"node {name} after")


def reached(point: str) -> None:
    """Mark a point; the process may die or stop here."""
    assert _folder is not None
    _append("trace", point)
    if claimed(_folder, "kill_at", point):
        os.kill(os.getpid(), signal.SIGKILL)
    if claimed(_folder, "hold_at", point):
        _append("trace", f"held {os.getpid()}")
        while not (_folder / "go").exists():
            time.sleep(0.005)


def claimed(folder: Path, name: str, point: str) -> bool:
    """Whether `kill_at` or `hold_at` is armed for this point; it is not any more, then."""
    file = folder / name
    try:
        if file.read_text() != point:
            return False
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def instrument(run_id: str, thread_id: str) -> None:
    """Make points of this process's writes to the store, of scheduling workflows, and of `advance`.

    Writes are named for their kind and the first letter of their key; those for another run or thread are no points.
    """
    from outlast.checkpointer import client, keys
    from outlast.recovery.journal import journal_key
    from outlast.recovery.runtime import Runtime
    from outlast.recovery.worker import Worker

    lock = threading.Lock()
    seen: Counter[str] = Counter()

    own = (keys.run_key(run_id), keys.thread_key(thread_id), journal_key(run_id))

    def numbered(what: str) -> str:
        with lock:
            seen[what] += 1
            return f"{what} #{seen[what]}"

    def label(operation: Any) -> str | None:
        match operation:
            case client.Save():
                key = operation.records[0][0] if operation.records else ""
            case client.Create() | client.Swap():
                key = operation.key
            case client.Delete():
                if not operation.keys:
                    return None
                key = operation.keys[0]
            case _:
                return None
        if key[:2] in ("r-", "t-", "j-") and not key.startswith(own):
            return None
        return numbered(f"{type(operation).__name__} {key[:1]}")

    perform, aperform = client.StateClient._perform, client.StateClient._aperform

    def performed(self: Any, operation: Any) -> Any:
        name = label(operation)
        if name is None:
            return perform(self, operation)
        reached(f"{name} before")
        result = perform(self, operation)
        reached(f"{name} after")
        return result

    async def aperformed(self: Any, operation: Any) -> Any:
        name = label(operation)
        if name is None:
            return await aperform(self, operation)
        reached(f"{name} before")
        result = await aperform(self, operation)
        reached(f"{name} after")
        return result

    def around(what: str, function: Any) -> Any:
        def surrounded(self: Any, *arguments: Any) -> Any:
            name = numbered(what)
            reached(f"{name} before")
            result = function(self, *arguments)
            reached(f"{name} after")
            return result

        return surrounded

    cls: Any = client.StateClient
    cls._perform, cls._aperform = performed, aperformed
    for owner, name in ((Runtime, "schedule"), (Worker, "advance"), (Runtime, "wake")):
        setattr(owner, name, around(name, getattr(owner, name)))
