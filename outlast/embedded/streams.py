"""Connected workers: one stream each, with what it holds and what is on its way to it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded.workflows import Task, Turn

MAX_TURNS = 100
MAX_TASKS = 1000
_PING_SECONDS = 30.0
_SLOW_SECONDS = 1.5
"""A worker answers a turn within milliseconds; one that has not for so long may be frozen."""
_CLOSE = None


class WorkerStream:
    """A worker's GetWorkItems call."""

    def __init__(self, *, keeps_history: bool) -> None:
        self.keeps_history = keeps_history
        self.turns: dict[str, Turn] = {}
        self.tasks: dict[str, Task] = {}
        self.handed: dict[str, float] = {}
        # How many committed events of an instance's execution the worker has in its cache.
        self.cached: dict[str, tuple[int, int, int]] = {}
        self.closed = False
        self._queue: queue.SimpleQueue[pb.WorkItem | None] = queue.SimpleQueue()

    def send(self, item: pb.WorkItem) -> None:
        self._queue.put(item)

    @property
    def slow(self) -> bool:
        """Whether a turn handed out a while ago is not answered yet."""
        oldest = next(iter(self.handed.values()), None)
        return oldest is not None and time.monotonic() - oldest > _SLOW_SECONDS

    def items(self) -> Iterator[pb.WorkItem]:
        """Work items as they come, with a health ping now and then; ends when the stream is closed."""
        while not self.closed:
            try:
                item = self._queue.get(timeout=_PING_SECONDS)
            except queue.Empty:
                item = pb.WorkItem(healthPing=pb.HealthPing())
            if item is _CLOSE:
                return
            yield item

    def close(self) -> None:
        self.closed = True
        self._queue.put(_CLOSE)


class Streams:
    """The workers connected to this sidecar, and who of them holds which item."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._streams: list[WorkerStream] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: WorkerStream) -> None:
        with self._mutex:
            self._streams.append(stream)

    def remove(self, stream: WorkerStream) -> list[Turn | Task]:
        """Forget a stream; returns what it held."""
        with self._mutex:
            if stream in self._streams:
                self._streams.remove(stream)
            items: list[Turn | Task] = [*stream.turns.values(), *stream.tasks.values()]
            stream.turns.clear()
            stream.tasks.clear()
            stream.handed.clear()
        stream.close()
        return items

    def all(self) -> list[WorkerStream]:
        with self._mutex:
            return list(self._streams)

    def room(self) -> tuple[int, int]:
        """How many more turns and activities the workers take."""
        with self._mutex:
            return (
                sum(max(0, MAX_TURNS - len(stream.turns)) for stream in self._streams),
                sum(max(0, MAX_TASKS - len(stream.tasks)) for stream in self._streams),
            )

    def held(self) -> tuple[int, int]:
        """How many turns and activities the workers have."""
        with self._mutex:
            return sum(len(stream.turns) for stream in self._streams), sum(len(s.tasks) for s in self._streams)

    def assign(self, item: Turn | Task) -> WorkerStream | None:
        """Choose the worker for an item: in turn, but rather one that answers, and one that holds less.

        Returns None if no worker is connected.
        """
        with self._mutex:
            count = len(self._streams)
            if not count:
                return None
            order = [self._streams[(self._next + index) % count] for index in range(count)]
            self._next = (self._next + 1) % count
            # Else a frozen one would get its part of what others do to overtake it, again and again: in turn alone it
            # may be every activity, and never a turn that it does not answer.
            held = "turns" if isinstance(item, Turn) else "tasks"
            order.sort(key=lambda stream: (stream.slow, len(getattr(stream, held))))
            if isinstance(item, Turn):
                stream = next((s for s in order if len(s.turns) < MAX_TURNS), order[0])
                stream.turns[item.token] = item
                stream.handed[item.token] = time.monotonic()
            else:
                stream = next((s for s in order if len(s.tasks) < MAX_TASKS), order[0])
                stream.tasks[item.token] = item
            return stream

    def take_turn(self, token: str) -> tuple[WorkerStream, Turn] | None:
        """Remove and return the turn with this token, once."""
        with self._mutex:
            for stream in self._streams:
                turn = stream.turns.pop(token, None)
                if turn is not None:
                    stream.handed.pop(token, None)
                    return stream, turn
        return None

    def take_task(self, token: str) -> Task | None:
        """Remove and return the activity with this token, once."""
        with self._mutex:
            for stream in self._streams:
                task = stream.tasks.pop(token, None)
                if task is not None:
                    return task
        return None
