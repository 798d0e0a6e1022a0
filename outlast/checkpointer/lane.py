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
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from outlast.checkpointer.blobs import PackWriter
from outlast.checkpointer.client import StateClient, Steps
from outlast.checkpointer.head import Entry
from outlast.checkpointer.life import Wish, keep
from outlast.checkpointer.lists import ListState
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


class _Asked(NamedTuple):
    request: Request
    future: Future[None]
    wish: Wish | None


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
        self._remembering = threading.Lock()
        self._generation = self._preparing = 0
        self._client = client
        self._submit = submit or _pool().submit
        self._after_commit = after_commit
        self._arrived = threading.Condition()
        self._queue: list[_Asked] = []
        self._running = False
        self._fenced: FencedError | None = None

    def enqueue(self, request: Request, wish: Wish | None = None) -> Future[None]:
        """Ask for a commit; the future ends when it is durable.

        Args:
            wish: What the time to live of the thread becomes, if not what its log always wishes.
        """
        future: Future[None] = Future()
        with self._arrived:
            if self._fenced:
                future.set_exception(FencedError(str(self._fenced)))
                return future
            self._queue.append(_Asked(request, future, wish))
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
                if not any(asked.request.completes for asked in self._queue):
                    self._arrived.wait_for(lambda: any(asked.request.completes for asked in self._queue), LINGER)
                batch, self._queue = self._queue, []
            self._commit(batch)

    def _commit(self, batch: list[_Asked]) -> None:
        futures = [asked.future for asked in batch]
        try:
            entries = self._client.run(self._steps(batch))
            if self._after_commit:
                self._after_commit(entries)
        except BaseException as error:
            # What was prepared is in no head, so nothing may refer to it.
            self._forget_values()
            self.log.forget()
            with self._arrived:
                if isinstance(error, FencedError):
                    self._fenced = error
                    futures += [asked.future for asked in self._queue]
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

    def _steps(self, batch: list[_Asked]) -> Steps[list[Entry]]:
        limit = self._client.capabilities.quirks.max_value
        while True:
            generation = yield from self.log.generation()
            self._preparing = generation
            with self._remembering:
                self._of(generation)
            pack = PackWriter(self.log.key, self.log.names.next())
            entries: list[Entry] = []
            prepared: list[_Asked] = []
            for asked in batch:
                try:
                    entries.append((yield from asked.request.prepare(self, pack)))
                except Exception as error:
                    asked.future.set_exception(error)
                else:
                    prepared.append(asked)
            batch = prepared
            try:
                if entries:
                    wish = next((asked.wish for asked in reversed(batch) if asked.wish), None)
                    yield from self.log.commit(entries, pack.finish(limit), pack.name, generation, wish)
                return entries
            except RewrittenError:
                # What was just prepared is remembered, and is nowhere.
                self._forget_values()

    def remember(
        self, ns: str, checkpoint_id: str, channels: dict[str, tuple[Any, Any]], generation: int | None = None
    ) -> None:
        """Keep where the values of a checkpoint are: channel → (version, locator).

        Args:
            generation: Of the thread they were read from; not given for what this lane is about to commit.
        """
        self._keep(self.channels, (ns, checkpoint_id), channels, generation)

    def remember_list(self, ns: str, channel: str, state: ListState, generation: int | None = None) -> None:
        """Keep how a list was stored last, so that the next version shares its segments."""
        self._keep(self.lists, (ns, channel), state, generation)

    def _keep(
        self, cache: OrderedDict[tuple[str, str], T], key: tuple[str, str], value: T, generation: int | None
    ) -> None:
        # Readers remember what they have read while the lane's own thread commits.
        with self._remembering:
            if not self._of(self._preparing if generation is None else generation):
                return
            cache[key] = value
            cache.move_to_end(key)
            while len(cache) > _CACHED:
                cache.popitem(last=False)

    def _of(self, generation: int) -> bool:
        """Tell whether what belongs to `generation` of the thread may be remembered; drop what is older."""
        if generation > self._generation:
            self._forget_values()
            self._generation = generation
        return generation == self._generation

    def _forget_values(self) -> None:
        self.channels.clear()
        self.lists.clear()


class Lanes:
    """The lanes of one saver.

    Args:
        client: The store.
        fence: See ThreadLog; such a saver serves one thread only.
        after_commit: See Lane.
        wish: See ThreadLog.
        remembered: How many idle threads are remembered.
    """

    def __init__(
        self,
        client: StateClient,
        fence: Fence | None = None,
        after_commit: Callable[[list[Entry]], None] | None = None,
        wish: Wish = keep,
        remembered: int = 64,
    ) -> None:
        self.client = client
        self._fence = fence
        self._after_commit = after_commit
        self._wish = wish
        self._remembered = remembered
        self._lock = threading.Lock()
        self._lanes: OrderedDict[str, Lane] = OrderedDict()

    def of(self, thread_id: str) -> Lane:
        """Return the lane of a thread."""
        with self._lock:
            lane = self._lanes.get(thread_id)
            if lane is None:
                lane = Lane(
                    self.client, ThreadLog(thread_id, self._fence, wish=self._wish), after_commit=self._after_commit
                )
                self._lanes[thread_id] = lane
                idle = [name for name, old in self._lanes.items() if old.idle and name != thread_id]
                for name in idle[: max(0, len(self._lanes) - self._remembered)]:
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
