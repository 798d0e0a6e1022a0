"""One thread in the store: loading its head, committing to it, deleting it. Sans I/O; knows no framework."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from outlast.checkpointer import keys, records
from outlast.checkpointer import life as lives
from outlast.checkpointer.client import Create, Delete, Get, Item, Pause, Steps, Swap, Whole
from outlast.checkpointer.head import Entry, Head, Index, parts
from outlast.checkpointer.leftovers import unreached
from outlast.checkpointer.registry import THREADS
from outlast.errors import CorruptRecordError, FencedError, OutlastError, StoreError

logger = logging.getLogger("outlast.store")

_TRIES = 200


@dataclass(frozen=True)
class Fence:
    """What an attempt holds of a thread: commits go through while the thread's epoch is this one."""

    epoch: int
    owner: str


class RewrittenError(OutlastError):
    """The thread was pruned since a commit was prepared; the lane prepares it anew."""


class ThreadLog:
    """The committed state of one thread.

    Args:
        thread_id: The thread.
        fence: If given, every commit fails with FencedError once another attempt has taken the thread over.
        key: Key of the head, if it is not that of a thread.
        wish: What the time to live of the thread becomes with every commit.
    """

    def __init__(
        self, thread_id: str, fence: Fence | None = None, key: str = "", wish: lives.Wish = lives.keep
    ) -> None:
        self.thread_id = thread_id
        self.key = key or keys.thread_key(thread_id)
        self.index = Index(self.key)
        self.names = keys.RecordNames()
        self._fence = fence
        self._wish = wish
        self._head: Head | None = None
        self._etag = ""

    def read(self) -> Steps[Head | None]:
        """Return the head as it is in the store now, or None if the thread has none, was deleted or has expired."""
        head = yield from self._load()
        return None if head is None or head.deleted or head.expired else head

    def touch(self) -> Steps[None]:
        """Begin the life of the thread anew, as it was read last; whoever was faster has used it, too."""
        head = self._head
        if head and head.life and head.life.stale and not (head.active or head.queue or head.deleted or head.expired):
            yield Swap(self.key, replace(head, life=head.life.renewed()).encode(), self._etag)
            self.forget()

    def reread(self, seen: Head, error: CorruptRecordError) -> Steps[Head | None]:
        """Return the head again after a record that `seen` names could not be read.

        Raises:
            CorruptRecordError: That `error`, unless the thread was rewritten or deleted meanwhile.
        """
        head = yield from self.read()
        if head is not None and head.generation == seen.generation:
            raise error
        self.index = Index(self.key)
        return head

    def _load(self) -> Steps[Head | None]:
        item: Item = (yield Get((self.key,)))[self.key]
        head = Head.decode(self.key, item.data) if item.data else None
        if head is not None and head.thread_id != self.thread_id:
            raise CorruptRecordError(f"record {self.key!r} is of thread {head.thread_id!r}, not {self.thread_id!r}")
        self._head, self._etag = head, item.etag
        return head

    def refresh(self) -> Steps[None]:
        """Read the head and its ETag again where the last commit has made them stale."""
        if not self._etag:
            yield from self._load()

    def forget(self) -> None:
        """Drop what is remembered of the head, after a commit of unknown outcome."""
        self._head, self._etag = None, ""

    def _ready(self) -> Steps[Head]:
        """Return a head that can be swapped; creates it, removes what has expired, completes what was cut short."""
        if not self._etag:
            yield from self._load()
        if self._head is None:
            yield Create(self.key, (yield from self._first()).encode())
            if (yield from self._load()) is None:
                raise StoreError(f"the head of thread {self.thread_id!r} could not be created; is the store read-only?")
        head = self._head
        assert head is not None
        if self._fence:
            return head
        if head.expired or (head.deleted and not head.empty):
            yield from self.delete(expired=head.expired)
            return (yield from self._ready())
        return replace(head, deleted=False)

    def _first(self) -> Steps[Head]:
        """Return the head to begin with; what must be known of a thread before it exists is written here."""
        if self._fence:
            raise FencedError(f"thread {self.thread_id!r} is gone; this attempt (epoch {self._fence.epoch}) stops")
        yield from THREADS.add(self.thread_id)
        return Head(self.thread_id)

    def _check(self, head: Head) -> None:
        fence = self._fence
        if fence and (head.epoch != fence.epoch or head.owner != fence.owner or head.deleted):
            raise FencedError(
                f"thread {self.thread_id!r} is at epoch {head.epoch} (owner {head.owner or 'nobody'}), this attempt "
                f"was epoch {fence.epoch}: another attempt has taken over, nothing of this one is committed any more"
            )

    def generation(self) -> Steps[int]:
        """Return how often the thread was rewritten, as far as is known here; `commit` checks it."""
        return (yield from self._ready()).generation

    def commit(
        self,
        entries: Sequence[Entry],
        pack: Sequence[tuple[str, bytes]],
        name: str,
        generation: int | None = None,
        wish: lives.Wish | None = None,
    ) -> Steps[None]:
        """Make the records of `pack` visible through `entries`.

        Args:
            wish: What the time to live of the thread becomes, if not what this log always wishes.
            generation: What `generation` returned before `pack` was prepared, if that refers to older records.

        Raises:
            FencedError: If another attempt owns the thread; then nothing has become visible.
            RewrittenError: If the thread was rewritten meanwhile; prepare the commit anew.
        """

        def enter(head: Head) -> Steps[tuple[Head, list[tuple[str, bytes]]]]:
            if generation is not None and head.generation != generation:
                raise RewrittenError(f"thread {self.thread_id!r} was rewritten")
            return (yield from self.index.extend(head, entries, self.names.next))

        yield from self._swap(enter, pack, name, wish)

    def change(self, change: Callable[[Head], Head | None]) -> Steps[Head]:
        """Swap the head for `change(head)`, which must be idempotent; None leaves it. Returns the head it then has."""

        def enter(head: Head) -> Steps[tuple[Head, list[tuple[str, bytes]]] | None]:
            yield from ()
            changed = change(head)
            return None if changed is None else (changed, [])

        return (yield from self._swap(enter, (), self.names.next()))

    def _swap(
        self,
        enter: Callable[[Head], Steps[tuple[Head, list[tuple[str, bytes]]] | None]]
        | Callable[[Head], Steps[tuple[Head, list[tuple[str, bytes]]]]],
        pack: Sequence[tuple[str, bytes]],
        name: str,
        wish: lives.Wish | None = None,
    ) -> Steps[Head]:
        for attempt in range(_TRIES):
            head = yield from self._ready()
            if attempt and name in head.recent:
                return head  # the swap went through; only its acknowledgement was lost
            self._check(head)
            entered = yield from enter(head)
            if entered is None:
                return head
            changed, pages = entered
            life = (wish or self._wish)(changed.life)
            changed = replace(changed, life=life and life.renewed()).committed(name)
            if pack:
                changed, room = self.index.make_room(changed, self.names.next)
                pages = [*pages, *room]
            swap = Swap(self.key, changed.encode(), self._etag, [*pack, *pages])
            if swap.records and not (yield Whole(swap)):
                writers = self._writers(swap.records)
                if not head.announces(writers):
                    # Before anything is written that would not be found if this writer died.
                    yield Swap(self.key, head.announcing(writers).encode(), self._etag)
                    self.forget()
                    continue
                changed = changed.announcing(writers)
                swap = replace(swap, value=changed.encode())
            if (yield swap):
                self._head, self._etag = changed, ""
                return changed
            self.forget()
            if attempt > 2:
                yield Pause(random.uniform(0, min(0.002 * attempt, 0.1)))
        raise StoreError(
            f"thread {self.thread_id!r} could not be committed to in {_TRIES} tries; "
            "is the store's optimistic locking sound?"
        )

    def _writers(self, written: Sequence[tuple[str, bytes]]) -> dict[str, int]:
        """Return the writers of these records, and the numbers that they do not reach."""
        needed: dict[str, int] = {}
        for key, _ in written:
            if not records.depth(key):
                writer, number = parts(key.removeprefix(f"{self.key}-"))
                needed[writer] = max(number + 1, needed.get(writer, 0))
        return needed

    def announce(self, seen: Head, count: int) -> Steps[Head | None]:
        """Announce that the next `count` records of this log may be there before a head names them.

        Returns:
            The head that `seen` has become; None if somebody else has changed it since it was read, as the last thing.
        """
        writer, number = parts(self.names.next())
        announced = seen.announcing({writer: number + count})
        done = yield Swap(self.key, announced.encode(), self._etag)
        self.forget()
        return announced if done else None

    def replace_index(self, seen: Head, entries: Sequence[Entry]) -> Steps[bool]:
        """Let the thread consist of `entries`, if its head still is `seen`; else return False and change nothing.

        What is not reached any more is left for `sweep`. What of the old records `entries` use must have been copied.
        """
        yield from self._load()
        if self._head is None or self._head.recent != seen.recent:
            return False
        names = self.names
        rebuilt = replace(seen, root=None, newest="", open=(), pages=(), chain="", generation=seen.generation + 1)
        written: list[tuple[str, bytes]] = []
        for start in range(0, len(entries), 16):
            rebuilt, pages = yield from self.index.extend(rebuilt, entries[start : start + 16], names.next)
            written += pages
        garbage = names.next()
        written.append((f"{self.key}-{garbage}", seen.encode()))
        changed = replace(rebuilt, garbage=garbage, life=self._head.life).committed(names.next())
        yield Swap(self.key, changed.encode(), self._etag, written)
        self.index = Index(self.key)
        current = yield from self._load()
        return current is not None and current.garbage == garbage

    def sweep(self) -> Steps[None]:
        """Delete what a rewrite has left behind; called again, completes what was cut short."""
        head = yield from self._load()
        if head is None or head.deleted or not head.garbage:
            return
        key = f"{self.key}-{head.garbage}"
        item: Item = (yield Get((key,)))[key]
        if item.data:
            old = yield from self._records(Head.decode(key, item.data))
            kept = set((yield from self._records(replace(head, garbage=""))))
            yield Delete([name for name in old if name not in kept])
        yield from self.change(lambda now: replace(now, garbage="") if now.garbage == head.garbage else None)
        yield Delete([key])

    def delete(self, expired: bool = False) -> Steps[bool]:
        """Remove the thread: marks the head, deletes what the index lists, then empties the head.

        A head stays as a tombstone, because some stores hand out the same ETags again after a delete. Cut short at any
        point, calling again completes it.

        Args:
            expired: Leave the thread alone if, when it comes to that, its time is not over.

        Returns:
            Whether there was something to remove.
        """
        head = yield from self._load()
        for _ in range(_TRIES):
            if head is None or (head.deleted and head.empty) or (expired and not (head.deleted or head.expired)):
                return False
            if head.deleted:
                break
            marked = replace(head, deleted=True, epoch=head.epoch + 1, active="", queue=(), life=None)
            # A commit on its way may share what is deleted now: it is prepared anew in the next generation.
            marked = replace(marked, generation=head.generation + 1).committed(self.names.next())
            yield Swap(self.key, marked.encode(), self._etag)
            head = yield from self._load()
        else:
            raise StoreError(f"thread {self.thread_id!r} could not be marked as deleted")
        doomed = yield from self._records(head)
        left = yield from unreached(self.key, (yield from Index(self.key).writers(head, lenient=True)), set(doomed))
        yield Delete([*left, *doomed])
        # Of those that wrote last, one may be about to write.
        emptied = Head(self.thread_id, head.epoch, generation=head.generation, deleted=True, writers=head.writers)
        yield Swap(self.key, emptied.committed(self.names.next()).encode(), self._etag)
        self.forget()
        self.index = Index(self.key)
        return True

    def leftovers(self, head: Head) -> Steps[list[str]]:
        """Return the keys of records that are there and that `head` does not reach."""
        reached = set((yield from self._records(head)))
        return (yield from unreached(self.key, (yield from self.index.writers(head)), reached))

    def _records(self, head: Head) -> Steps[list[str]]:
        """Return the keys of all records that `head` reaches, those already gone among them."""
        reader = Index(self.key)
        entries = yield from reader.versions(head, lenient=True)
        yield from reader.writers(head, lenient=True)
        names = dict.fromkeys(name for entry in entries for name in (entry.pack, *entry.writes) if name)
        doomed: list[str] = []
        if head.garbage:
            key = f"{self.key}-{head.garbage}"
            item: Item = (yield Get((key,)))[key]
            if item.data:
                doomed += yield from self._records(Head.decode(key, item.data))
            doomed.append(key)
        todo = [f"{self.key}-{name}" for name in names]
        for start in range(0, len(todo), 100):
            items: dict[str, Item] = yield Get(todo[start : start + 100])
            for key, item in items.items():
                chunks = records.chunk_keys(key, item.data)
                doomed += chunks
                found: dict[str, Item] = (yield Get(chunks)) if chunks else {}
                whole = {name: chunk.data for name, chunk in found.items()}
                if not item.data or (chunks and not all(whole.values())):
                    continue
                try:
                    data = records.join(key, item.data, whole) if chunks else item.data
                    body = records.decode(key, records.PACK, data)
                except CorruptRecordError as error:
                    # A damaged thread can be deleted; the large values that only this record named stay behind.
                    logger.warning("%s", error)
                    continue
                large = [f"{self.key}-{row[2]}" for row in body["b"] if row[1] is None]
                pieces: dict[str, Item] = (yield Get(large)) if large else {}
                for name, piece in pieces.items():
                    doomed += [*records.chunk_keys(name, piece.data), name]
        # What names other records goes after them, should this be cut short: packs, then pages, the oldest first.
        return [*doomed, *todo, *(f"{self.key}-{name}" for name in reversed(reader.sealed()))]
