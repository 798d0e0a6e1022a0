"""Lanes: the commits of one thread go through one queue, grouped, in the order they were asked for.

While one commit is on its way to the store, what arrives is collected and goes out as the next, in one transaction.
Writes wait `LINGER` for the checkpoint that follows them in a sequential graph, so that a superstep is one commit; and
a checkpoint never becomes visible before writes that were asked for earlier (langgraph issue 8039).
"""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from outlast.checkpointer.blobs import ListState, PackWriter
from outlast.checkpointer.client import StateClient, Steps
from outlast.checkpointer.head import Entry
from outlast.checkpointer.thread import Fence, RewrittenError, ThreadLog
from outlast.errors import FencedError

T = TypeVar("T")

LINGER: Final = 0.002
_CACHED: Final = 64


class Request(Protocol):
    """Something to commit."""

    completes: bool
    """Whether nothing more is expected to join the commit after it."""

    def prepare(self, lane: Lane, pack: PackWriter) -> Steps[Entry]:
        """Enter what is to be stored in `pack` and return the change of the index."""


class Lane:
    """The commit queue of one thread, and what this process remembers of the thread's values.

    Args:
        client: The store.
        log: The thread.
        submit: Runs a function on a thread of its own; the lanes' pool, if not given.
        after_commit: Called after each commit with the changes of the index, before the waiters are told.
    """

    def __init__(
        self,
        client: StateClient,
        log: ThreadLog,
        submit: Callable[[Callable[[], None]], Any] | None = None,
        after_commit: Callable[[list[Entry]], None] | None = None,
    ) -> None:
        self.log = log
        self.channels: OrderedDict[tuple[str, str], dict[str, tuple[Any, Any]]] = OrderedDict()
        self.lists: OrderedDict[tuple[str, str], ListState] = OrderedDict()
        self._generation = 0
        self._client = client
        self._submit = submit or _pool().submit
        self._after_commit = after_commit
        self._arrived = threading.Condition()
        self._queue: list[tuple[Request, Future[None]]] = []
        self._running = False
        self._fenced: FencedError | None = None

    def enqueue(self, request: Request) -> Future[None]:
        """Ask for a commit; the future ends when it is durable."""
        future: Future[None] = Future()
        with self._arrived:
            if self._fenced:
                future.set_exception(FencedError(str(self._fenced)))
                return future
            self._queue.append((request, future))
            self._arrived.notify()
            if not self._running:
                self._running = True
                self._submit(self._run)
        return future

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or on its way."""
        return not self._running

    def _run(self) -> None:
        while True:
            with self._arrived:
                if not self._queue:
                    self._running = False
                    return
                if not any(request.completes for request, _ in self._queue):
                    self._arrived.wait_for(lambda: any(request.completes for request, _ in self._queue), LINGER)
                batch, self._queue = self._queue, []
            self._commit(batch)

    def _commit(self, batch: list[tuple[Request, Future[None]]]) -> None:
        futures = [future for _, future in batch]
        try:
            entries = self._client.run(self._steps(batch))
            if self._after_commit:
                self._after_commit(entries)
        except BaseException as error:
            # What was prepared is in no head, so nothing may refer to it.
            self.channels.clear()
            self.lists.clear()
            self.log.forget()
            with self._arrived:
                if isinstance(error, FencedError):
                    self._fenced = error
                    futures += [future for _, future in self._queue]
                    self._queue = []
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future in futures:
            if not future.done():
                future.set_result(None)
        try:
            # Off the critical path: the graph goes on while the next ETag is read.
            self._client.run(self.log.refresh())
        except Exception:
            self.log.forget()

    def _steps(self, batch: list[tuple[Request, Future[None]]]) -> Steps[list[Entry]]:
        limit = self._client.capabilities.quirks.max_value
        while True:
            generation = yield from self.log.generation()
            if generation != self._generation:
                # The thread was pruned: what is remembered may be gone.
                self.channels.clear()
                self.lists.clear()
                self._generation = generation
            pack = PackWriter(self.log.key, self.log.names.next())
            entries: list[Entry] = []
            prepared: list[tuple[Request, Future[None]]] = []
            for request, future in batch:
                try:
                    entries.append((yield from request.prepare(self, pack)))
                except Exception as error:
                    future.set_exception(error)
                else:
                    prepared.append((request, future))
            batch = prepared
            try:
                if entries:
                    yield from self.log.commit(entries, pack.finish(limit), pack.name, generation)
                return entries
            except RewrittenError:
                continue

    def remember(self, ns: str, checkpoint_id: str, channels: dict[str, tuple[Any, Any]]) -> None:
        """Keep where the values of a checkpoint are: channel → (version, locator)."""
        _keep(self.channels, (ns, checkpoint_id), channels)

    def remember_list(self, ns: str, channel: str, state: ListState) -> None:
        """Keep how a list was stored last, so that the next version shares its segments."""
        _keep(self.lists, (ns, channel), state)


_KEEPING = threading.Lock()


def _keep(cache: OrderedDict[tuple[str, str], T], key: tuple[str, str], value: T) -> None:
    # Readers remember what they have read while the lane's own thread commits.
    with _KEEPING:
        cache[key] = value
        cache.move_to_end(key)
        while len(cache) > _CACHED:
            cache.popitem(last=False)


class Lanes:
    """The lanes of one saver.

    Args:
        client: The store.
        fence: See ThreadLog; such a saver serves one thread only.
        after_commit: See Lane.
        keep: How many idle threads are remembered.
    """

    def __init__(
        self,
        client: StateClient,
        fence: Fence | None = None,
        after_commit: Callable[[list[Entry]], None] | None = None,
        keep: int = 64,
    ) -> None:
        self.client = client
        self._fence = fence
        self._after_commit = after_commit
        self._keep = keep
        self._lock = threading.Lock()
        self._lanes: OrderedDict[str, Lane] = OrderedDict()

    def of(self, thread_id: str) -> Lane:
        """Return the lane of a thread."""
        with self._lock:
            lane = self._lanes.get(thread_id)
            if lane is None:
                lane = Lane(self.client, ThreadLog(thread_id, self._fence), after_commit=self._after_commit)
                self._lanes[thread_id] = lane
                idle = [name for name, old in self._lanes.items() if old.idle and name != thread_id]
                for name in idle[: max(0, len(self._lanes) - self._keep)]:
                    del self._lanes[name]
            self._lanes.move_to_end(thread_id)
            return lane

    def drop(self, thread_id: str) -> None:
        """Forget a thread."""
        with self._lock:
            self._lanes.pop(thread_id, None)


_POOL: ThreadPoolExecutor | None = None
_POOL_LOCK = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    global _POOL
    with _POOL_LOCK:
        if _POOL is None:
            _POOL = ThreadPoolExecutor(max_workers=32, thread_name_prefix="outlast-commit")
            atexit.register(_POOL.shutdown, wait=True)
        return _POOL
