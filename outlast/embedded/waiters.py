"""Calls that wait for an instance to reach a state, woken by commits of this process and of others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded import workflows
from outlast.embedded.database import Database

_CHUNK = 400  # instances a query; SQLite takes 32766 parameters, older ones 999


class _Waiter:
    __slots__ = ("seen", "wake")

    def __init__(self) -> None:
        self.wake = threading.Event()
        self.seen: tuple[int, int] | None = None


class Waiters:
    """All waiting calls of one sidecar, by instance."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._mutex = threading.Lock()
        self._waiting: dict[tuple[str, str], list[_Waiter]] = {}
        self._stopped = False

    def wait(
        self,
        app: str,
        instance_id: str,
        condition: Callable[[pb.WorkflowState], bool],
        *,
        payloads: bool,
        on_end: Callable[[Callable[[], None]], bool],
    ) -> pb.WorkflowState | None:
        """Block until the instance exists and meets the condition, or the call ends.

        Args:
            on_end: Registers a callback for the end of the call; False if it has already ended.

        Returns:
            The state, or None if the call ended or the sidecar stops.
        """
        waiter = _Waiter()
        ended = threading.Event()

        def end() -> None:
            ended.set()
            waiter.wake.set()

        key = (app, instance_id)
        with self._mutex:
            self._waiting.setdefault(key, []).append(waiter)
        try:
            if not on_end(end):
                return None
            while not ended.is_set() and not self._stopped:
                waiter.wake.clear()
                with self._database.read() as connection:
                    row = connection.execute(
                        "SELECT status, updated FROM instances WHERE app = ? AND id = ?", key
                    ).fetchone()
                    waiter.seen = tuple(row) if row else None
                    if row is not None and condition(pb.WorkflowState(workflowStatus=row[0])):
                        state = workflows.state_of(connection, app, instance_id, payloads=payloads)
                        if state is not None and condition(state):
                            return state
                waiter.wake.wait()
            return None
        finally:
            with self._mutex:
                waiters = self._waiting[key]
                waiters.remove(waiter)
                if not waiters:
                    del self._waiting[key]

    def wake(self, instances: Iterable[tuple[str, str]]) -> None:
        """Wake those who wait for these instances."""
        with self._mutex:
            for key in instances:
                for waiter in self._waiting.get(key, ()):
                    waiter.wake.set()

    def wake_all(self) -> None:
        """End every wait: the sidecar stops."""
        self._stopped = True
        with self._mutex:
            for waiters in self._waiting.values():
                for waiter in waiters:
                    waiter.wake.set()

    def look(self) -> None:
        """Wake those whose instance another process has changed."""
        with self._mutex:
            keys = list(self._waiting)
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            marks = ",".join("(?,?)" for _ in chunk)
            with self._database.read() as connection:
                rows = connection.execute(
                    f"SELECT app, id, status, updated FROM instances WHERE (app, id) IN (VALUES {marks})",
                    [part for key in chunk for part in key],
                ).fetchall()
            with self._mutex:
                for app, instance_id, status, updated in rows:
                    for waiter in self._waiting.get((app, instance_id), ()):
                        if waiter.seen != (status, updated):
                            waiter.wake.set()
