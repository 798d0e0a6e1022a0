"""Upkeep of threads: copying, pruning, forgetting runs. Sans I/O; whatever is cut short, calling again completes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from outlast.checkpointer.blobs import Locator, PackReader, PackWriter, Typed
from outlast.checkpointer.client import Get, Item, Save, Steps
from outlast.checkpointer.head import Entry, Head
from outlast.checkpointer.keys import thread_key
from outlast.checkpointer.life import Wish, own
from outlast.checkpointer.names import Hidden, shown
from outlast.checkpointer.registry import THREADS
from outlast.checkpointer.thread import RewrittenError, ThreadLog
from outlast.errors import CorruptRecordError, StoreError, UnknownFormatError

logger = logging.getLogger("outlast.store")

_BATCH: Final = 20
_HEADS: Final = 100
_SPARE: Final = 8
"""Records of a rewrite that are not for single checkpoints."""
_TRIES: Final = 20

Loads = Callable[[Typed], Any]


class Row(NamedTuple):
    """A checkpoint as a pack holds it. `checkpoint`, `metadata` and the values of `channels` are locators.

    Names may be hidden: see `names`.
    """

    ns: str
    checkpoint_id: str
    parent_id: str
    checkpoint: Locator
    metadata: Locator
    channels: dict[Any, Locator]

    @property
    def locators(self) -> list[Locator]:
        """Everything the checkpoint consists of."""
        return [self.checkpoint, self.metadata, *self.channels.values()]


class WriteRow(NamedTuple):
    """A pending write as a pack holds it. `value` is a locator; `replaces` tells if it takes an earlier one's place.

    As in LangGraph's SQLite and PostgreSQL savers, the writes of a call replace if all are special ones (errors,
    interrupts, …); of all others at one place the first counts.
    """

    ns: str
    checkpoint_id: str
    task_id: str
    task_path: Hidden
    position: int
    channel: Hidden
    value: Locator
    replaces: bool


def row_of(key: str, packs: dict[str, Any], entry: Entry) -> Row:
    """Return the checkpoint of an index entry from the packs that were read."""
    for body in packs[entry.pack]["c"]:
        row = Row(*body)
        if (row.ns, row.checkpoint_id) == (entry.ns, entry.checkpoint_id):
            return row
    raise CorruptRecordError(f"record '{key}-{entry.pack}' lacks checkpoint {entry.checkpoint_id!r}")


def writes_of(packs: dict[str, Any], entry: Entry) -> list[WriteRow]:
    """Return the pending writes of an index entry in the order they were asked for."""
    found: list[WriteRow] = []
    for name in entry.writes:
        rows = (WriteRow(*body) for body in packs[name]["w"])
        found += (row for row in rows if (row.ns, row.checkpoint_id) == (entry.ns, entry.checkpoint_id))
    return found


def copy_thread(source: str, target: str, loads: Loads, limit: int, wish: Wish) -> Steps[None]:
    """Copy all checkpoints and writes of a thread to another one, which keeps what it has.

    Args:
        wish: What the time to live of the copy becomes, where the thread has none of its own.
    """
    for _ in range(_TRIES):
        log, copy = ThreadLog(source), ThreadLog(target, wish=wish)
        head = yield from log.read()
        if head is None:
            return
        try:
            return (yield from _copy_all(log, head, copy, loads, limit))
        except RewrittenError:
            continue  # later batches share what the earlier ones have put there, and that may be gone
        except CorruptRecordError as error:
            yield from log.reread(head, error)
    raise StoreError(f"thread {source!r} could not be copied: it or {target!r} was rewritten all the while; try later")


def _copy_all(log: ThreadLog, head: Head, copy: ThreadLog, loads: Loads, limit: int) -> Steps[None]:
    wish = own(head.life.minutes) if head.life and head.life.own else None
    generation = yield from copy.generation()
    entries = list(reversed((yield from log.index.entries(head))))
    copied: dict[tuple[str, int], Locator] = {}
    for start in range(0, len(entries), _BATCH):
        pack = PackWriter(copy.key, copy.names.next())
        moved = yield from _copied(log, entries[start : start + _BATCH], pack, loads, copied)
        yield from copy.commit(moved, pack.finish(limit), pack.name, generation, wish)


def sweep_expired() -> Steps[int]:
    """Remove the threads whose time to live is over; returns how many."""
    count = 0
    names = yield from THREADS.names()
    for start in range(0, len(names), _HEADS):
        batch = {thread_key(name): name for name in names[start : start + _HEADS]}
        items: dict[str, Item] = yield Get(list(batch))
        for key, item in items.items():
            try:
                head = Head.decode(key, item.data) if item.data else None
                if head and (head.expired or (head.deleted and not head.empty)):
                    count += yield from ThreadLog(batch[key]).delete(expired=True)
            except (CorruptRecordError, UnknownFormatError) as error:
                # One damaged thread must not keep the others; `outlast doctor --repair` names it.
                logger.warning("not swept: %s", error)
    return count


def _copied(
    log: ThreadLog, entries: Sequence[Entry], pack: PackWriter, loads: Loads, copied: dict[tuple[str, int], Locator]
) -> Steps[list[Entry]]:
    """Copy checkpoints and writes into `pack` and return their entries there."""
    reader = PackReader(log.key, loads)
    packs = yield from reader.packs(name for entry in entries for name in (entry.pack, *entry.writes) if name)
    rows = [row_of(log.key, packs, entry) if entry.pack else None for entry in entries]
    writes = [writes_of(packs, entry) for entry in entries]
    wanted = [locator for row in rows if row for locator in row.locators]
    yield from reader.fetch([*wanted, *(write.value for pending in writes for write in pending)])

    def move(locator: Locator) -> Locator:
        return reader.copy(locator, pack, copied)

    moved: list[Entry] = []
    for entry, row, pending in zip(entries, rows, writes, strict=True):
        if row:
            channels = {name: move(locator) for name, locator in row.channels.items()}
            there = row._replace(checkpoint=move(row.checkpoint), metadata=move(row.metadata), channels=channels)
            pack.checkpoints.append(list(there))
        pack.writes += [list(write._replace(value=move(write.value))) for write in pending]
        names = (pack.name,) if pending else ()
        moved.append(Entry(entry.ns, entry.checkpoint_id, pack.name if row else "", names))
    return moved


def _rewrite(
    log: ThreadLog, keep: Callable[[Head, list[Entry]], Steps[list[Entry]]], loads: Loads, limit: int
) -> Steps[None]:
    """Let a thread consist of the checkpoints that `keep` returns, and delete all that was there."""
    for _ in range(_TRIES):
        yield from log.sweep()
        head = yield from log.read()
        if head is None:
            return
        entries = yield from log.index.entries(head)
        kept = list(reversed((yield from keep(head, entries))))
        if len(kept) == len(entries):
            return
        head = yield from log.announce(head, 2 * len(kept) + _SPARE)
        if head is None:
            continue
        copied: dict[tuple[str, int], Locator] = {}
        moved: list[Entry] = []
        for start in range(0, len(kept), _BATCH):
            pack = PackWriter(log.key, log.names.next())
            moved += yield from _copied(log, kept[start : start + _BATCH], pack, loads, copied)
            yield Save(pack.finish(limit))
        if (yield from log.replace_index(head, moved)):
            yield from log.sweep()
            return
    raise StoreError(f"thread {log.thread_id!r} could not be pruned: it was written to all the while; try again later")


def keep_latest(thread_id: str, loads: Loads, limit: int) -> Steps[None]:
    """Keep the newest checkpoint of each namespace, its writes, and the ancestors that its delta channels need."""
    log = ThreadLog(thread_id)

    def keep(head: Head, entries: list[Entry]) -> Steps[list[Entry]]:
        newest: dict[str, Entry] = {}
        for entry in entries:
            if entry.pack:
                newest.setdefault(entry.ns, entry)
        wanted = {(entry.ns, entry.checkpoint_id) for entry in newest.values()}
        for entry in newest.values():
            wanted |= yield from _ancestors_of_deltas(log, head, entry, loads)
        return [entry for entry in entries if (entry.ns, entry.checkpoint_id) in wanted]

    yield from _rewrite(log, keep, loads, limit)


def _ancestors_of_deltas(log: ThreadLog, head: Head, entry: Entry, loads: Loads) -> Steps[set[tuple[str, str]]]:
    """Return the ancestors back to where each delta channel has a stored value; later ones are rebuilt from writes."""
    reader = PackReader(log.key, loads)
    found: set[tuple[str, str]] = set()
    row = row_of(log.key, (yield from reader.packs([entry.pack])), entry)
    yield from reader.fetch([row.metadata])
    missing = set(reader.value(row.metadata).get("counters_since_delta_snapshot") or {}) - _channels(row, loads)
    while missing and row.parent_id:
        parent = yield from log.index.find(head, row.ns, row.parent_id)
        if parent is None or not parent.pack:
            break
        found.add((parent.ns, parent.checkpoint_id))
        row = row_of(log.key, (yield from reader.packs([parent.pack])), parent)
        missing -= _channels(row, loads)
    return found


def _channels(row: Row, loads: Loads) -> set[str]:
    return {shown(name, loads) for name in row.channels}


def delete_for_runs(run_ids: Iterable[str], loads: Loads, limit: int) -> Steps[None]:
    """Remove the checkpoints whose metadata name one of these runs, with their writes, from all threads."""
    doomed = set(run_ids)
    if not doomed:
        return
    for thread_id in (yield from THREADS.names()):
        log = ThreadLog(thread_id)

        def keep(head: Head, entries: list[Entry], log: ThreadLog = log) -> Steps[list[Entry]]:
            kept: list[Entry] = []
            for start in range(0, len(entries), _BATCH):
                batch = [entry for entry in entries[start : start + _BATCH] if entry.pack]
                reader = PackReader(log.key, loads)
                packs = yield from reader.packs(entry.pack for entry in batch)
                rows = [row_of(log.key, packs, entry) for entry in batch]
                yield from reader.fetch([row.metadata for row in rows])
                for entry, row in zip(batch, rows, strict=True):
                    if str(reader.value(row.metadata).get("run_id")) not in doomed:
                        kept.append(entry)
            return kept

        yield from _rewrite(log, keep, loads, limit)
