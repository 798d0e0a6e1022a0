"""What a migration must know of each checkpointer beyond its own methods: which threads and checkpoints it has.

Values are read and written through the savers' public methods only (`get_tuple`, `put`, `put_writes`); the tables are
asked for what these do not tell: names of threads, ids of checkpoints, and the place of each pending write.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import WRITES_IDX_MAP, BaseCheckpointSaver, CheckpointTuple, writes_sort_key
from langgraph.checkpoint.serde.types import ERROR

from outlast.checkpointer.blobs import PackReader
from outlast.checkpointer.head import Entry
from outlast.checkpointer.names import Names, shown
from outlast.checkpointer.registry import THREADS
from outlast.checkpointer.saver import DaprSaver
from outlast.checkpointer.thread import ThreadLog
from outlast.checkpointer.upkeep import writes_of
from outlast.errors import OutlastError
from outlast.migrate.verbatim import Foreign, pack

Place = tuple[str, str]
"""Namespace and id of a checkpoint."""

_LISTS: Final = 64


class MigrationError(OutlastError):
    """Threads cannot be copied; the message names the mend."""


class Write(NamedTuple):
    """A pending write and its place among the others."""

    task_id: str
    path: str
    position: int
    channel: str
    value: Any


@dataclass(frozen=True)
class Record:
    """One checkpoint with its writes, as a saver has it."""

    ns: str
    checkpoint_id: str
    parent_id: str
    checkpoint: dict[str, Any]
    metadata: dict[str, Any]
    writes: tuple[Write, ...]


class Side:
    """A checkpointer, as source or target. This class does for any; those below know more of one kind.

    Args:
        saver: The checkpointer.
    """

    json_metadata = False
    """Whether it keeps metadata as JSON."""
    shares_versions = False
    """Whether a channel's version alone, without the checkpoint, says where its value is."""

    def __init__(self, saver: BaseCheckpointSaver[Any]) -> None:
        self.saver: Any = saver

    @property
    def textual_versions(self) -> bool:
        """Whether it continues threads with textual versions, which do not compare with numbers."""
        return isinstance(self.saver.get_next_version(None, None), str)

    def threads(self) -> Iterator[str]:
        """Yield the ids of all threads."""
        seen: set[str] = set()
        for item in self.saver.list(None):
            thread_id = str(item.config["configurable"]["thread_id"])
            if thread_id not in seen:
                seen.add(thread_id)
                yield thread_id

    def places(self, thread_id: str) -> list[Place]:
        """Return the checkpoints of a thread, oldest first."""
        found = (item.config["configurable"] for item in self.saver.list(_config(thread_id)))
        return _oldest_first((place.get("checkpoint_ns", ""), place["checkpoint_id"]) for place in found)

    def where(self, thread_id: str, place: Place) -> list[tuple[str, str, int, str]] | None:
        """Return task id, path, position and channel of the writes of a checkpoint; None if that is not known."""
        return None

    def busy(self, thread_id: str) -> str:
        """Return what uses the thread now, or nothing."""
        return ""

    def forget(self) -> None:
        """Drop what is remembered of a thread."""

    def read_many(self, thread_id: str, places: Sequence[Place]) -> dict[Place, Record]:
        """Return those of some neighbouring checkpoints, oldest first, that there are."""
        found = ((place, self.read(thread_id, place)) for place in places)
        return {place: record for place, record in found if record}

    def read(self, thread_id: str, place: Place) -> Record | None:
        """Return a checkpoint with its writes, or None if there is none."""
        # The place of the writes first: what is written meanwhile is then seen as unknown, not as wrong.
        where = self.where(thread_id, place)
        try:
            found: CheckpointTuple | None = self.saver.get_tuple(_config(thread_id, *place))
        except TypeError as error:
            _check_closed(place, error)
            raise
        return self._record(place, found, where) if found else None

    def _record(
        self, place: Place, found: CheckpointTuple, where: Sequence[tuple[str, str, int, str]] | None
    ) -> Record:
        ns, checkpoint_id = place
        for part in (found.checkpoint, found.metadata):
            if isinstance(part, Foreign):
                raise _closed(place, part.kind)
        parent = found.parent_config["configurable"]["checkpoint_id"] if found.parent_config else ""
        return Record(
            ns=ns,
            checkpoint_id=checkpoint_id,
            parent_id=parent,
            checkpoint=cast(dict[str, Any], found.checkpoint),
            metadata=cast(dict[str, Any], found.metadata),
            writes=_placed(found.pending_writes or [], where),
        )

    def write(self, thread_id: str, record: Record, *, whole: bool = True) -> None:
        """Store a checkpoint: its writes before it, so that one that is there has all of them.

        Args:
            whole: Store every value, also where an older version of the same number is there.
        """
        self.write_writes(thread_id, record)
        config = _config(thread_id, record.ns, record.parent_id or None)
        versions = record.checkpoint["channel_versions"] if whole else {}
        self._put(config, record.checkpoint, record.metadata, versions)

    def write_writes(self, thread_id: str, record: Record) -> None:
        """Store the writes of a checkpoint."""
        config = _config(thread_id, record.ns, record.checkpoint_id)
        for task_id, path, writes in _calls(record.writes):
            self._put_writes(config, writes, task_id, path)

    def settle(self) -> None:
        """Return when everything is stored."""

    def close(self) -> None:
        """Let go of what the migration needed."""

    def _put(self, *arguments: Any) -> None:
        self.saver.put(*arguments)

    def _put_writes(self, *arguments: Any) -> None:
        self.saver.put_writes(*arguments)


class SqliteSide(Side):
    """LangGraph's SqliteSaver."""

    json_metadata = True

    def _rows(self, query: str, *arguments: str) -> list[tuple[Any, ...]]:
        with self.saver.cursor(transaction=False) as cursor:
            return list(cursor.execute(query, arguments))

    def threads(self) -> Iterator[str]:
        after = ""
        query = "SELECT DISTINCT thread_id FROM checkpoints WHERE thread_id > ? ORDER BY thread_id LIMIT 1000"
        if self._rows("SELECT 1 FROM checkpoints WHERE thread_id = '' LIMIT 1"):
            yield ""
        while rows := self._rows(query, after):
            yield from (row[0] for row in rows)
            after = rows[-1][0]

    def places(self, thread_id: str) -> list[Place]:
        rows = self._rows("SELECT checkpoint_ns, checkpoint_id FROM checkpoints WHERE thread_id = ?", thread_id)
        return _oldest_first((row[0], row[1]) for row in rows)

    def where(self, thread_id: str, place: Place) -> list[tuple[str, str, int, str]] | None:
        path = "task_path" if self.saver._has_task_path else "''"
        return [
            (row[0], row[1], row[2], row[3])
            for row in self._rows(
                f"SELECT task_id, {path}, idx, channel FROM writes "
                "WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?",
                thread_id,
                *place,
            )
        ]


class PostgresSide(Side):
    """LangGraph's PostgresSaver."""

    json_metadata = True
    shares_versions = True

    def _rows(self, query: str, *arguments: str) -> list[dict[str, Any]]:
        with self.saver._cursor() as cursor:
            return list(cursor.execute(query, arguments).fetchall())

    def threads(self) -> Iterator[str]:
        # Step by step along the primary key: DISTINCT over a large table would read all of it each time.
        query = (
            'SELECT thread_id FROM checkpoints WHERE thread_id COLLATE "C" > %s '
            'ORDER BY thread_id COLLATE "C" LIMIT 1000'
        )
        distinct = f"SELECT DISTINCT thread_id FROM ({query}) AS page"
        after = ""
        if self._rows("SELECT 1 FROM checkpoints WHERE thread_id = '' LIMIT 1"):
            yield ""
        while rows := self._rows(distinct, after):
            names = sorted((row["thread_id"] for row in rows), key=str.encode)
            yield from names
            after = names[-1]

    def places(self, thread_id: str) -> list[Place]:
        rows = self._rows("SELECT checkpoint_ns, checkpoint_id FROM checkpoints WHERE thread_id = %s", thread_id)
        return _oldest_first((row["checkpoint_ns"], row["checkpoint_id"]) for row in rows)

    def where(self, thread_id: str, place: Place) -> list[tuple[str, str, int, str]] | None:
        return [
            (row["task_id"], row["task_path"], row["idx"], row["channel"])
            for row in self._rows(
                "SELECT task_id, task_path, idx, channel FROM checkpoint_writes "
                "WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s",
                thread_id,
                *place,
            )
        ]


class MemorySide(Side):
    """LangGraph's InMemorySaver."""

    shares_versions = True

    def threads(self) -> Iterator[str]:
        yield from list(self.saver.storage)

    def places(self, thread_id: str) -> list[Place]:
        namespaces = dict(self.saver.storage.get(thread_id, {}))
        return _oldest_first((ns, checkpoint_id) for ns, found in namespaces.items() for checkpoint_id in found)

    def where(self, thread_id: str, place: Place) -> list[tuple[str, str, int, str]] | None:
        writes = self.saver.writes.get((thread_id, *place), {})
        return [(task_id, row[3], position, row[1]) for (task_id, position), row in writes.items()]


class DaprSide(Side):
    """DaprSaver. Commits several checkpoints at once, and lets lists share what they have in common."""

    def __init__(self, saver: DaprSaver) -> None:
        super().__init__(saver)
        self._client = saver.client
        self._log: ThreadLog | None = None
        self._lists: dict[tuple[str, str], list[Any]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="outlast-migrate", daemon=True)
        self._thread.start()
        self._pending: list[Future[None]] = []

    def threads(self) -> Iterator[str]:
        yield from self._client.run(THREADS.names())

    def places(self, thread_id: str) -> list[Place]:
        log = self._log_of(thread_id)
        head = self._client.run(log.read())
        entries = self._client.run(log.index.entries(head)) if head else []
        names = self.saver.namespaces_of(thread_id)
        return _oldest_first((names[entry.ns], entry.checkpoint_id) for entry in entries if entry.pack)

    def read_many(self, thread_id: str, places: Sequence[Place]) -> dict[Place, Record]:
        # In one go: several checkpoints are in one record.
        head = self._client.run(self._log_of(thread_id).read())
        if head is None or not places:
            return {}
        wanted = set(places)
        every = self._client.run(self._log_of(thread_id).index.entries(head))
        namespaces = self.saver.namespaces_of(thread_id)
        entries = {(namespaces[entry.ns], entry.checkpoint_id): entry for entry in every if entry.pack}
        reader = PackReader(self._log_of(thread_id).key, self.saver.serde.loads_typed)
        names = [name for place in places if place in entries for name in entries[place].writes]
        packs = self._client.run(reader.packs(names))
        found: dict[Place, Record] = {}
        # Above the last of them, and below every other one.
        before = _config(thread_id, checkpoint_id=places[-1][1] + "~")
        listing = self.saver.list(_config(thread_id), before=before)
        while True:
            try:
                item = next(listing, None)
            except TypeError as error:
                _check_closed(places[-1], error)
                raise
            if item is None:
                break
            configurable = item.config["configurable"]
            place = (configurable["checkpoint_ns"], configurable["checkpoint_id"])
            if place[1] < places[0][1] or len(found) == len(wanted):
                break
            if place in wanted and place in entries:
                found[place] = self._record(place, item, self._where(packs, entries[place]))
        return found

    def where(self, thread_id: str, place: Place) -> list[tuple[str, str, int, str]] | None:
        log = self._log_of(thread_id)
        head = self._client.run(log.read())
        entry = (
            self._client.run(log.index.find(head, Names(self.saver.serde).place(place[0]), place[1])) if head else None
        )
        if entry is None or not entry.writes:
            return []
        packs = self._client.run(PackReader(log.key, self.saver.serde.loads_typed).packs(entry.writes))
        return self._where(packs, entry)

    def _where(self, packs: dict[str, Any], entry: Entry) -> list[tuple[str, str, int, str]]:
        loads = self.saver.serde.loads_typed
        kept = {(row.task_id, row.position): row for row in writes_of(packs, entry)}
        return [
            (row.task_id, shown(row.task_path, loads), row.position, shown(row.channel, loads)) for row in kept.values()
        ]

    def _log_of(self, thread_id: str) -> ThreadLog:
        # One for each thread: it keeps the pages of the index, which never change.
        if self._log is None or self._log.thread_id != thread_id:
            self._log = ThreadLog(thread_id)
        return self._log

    def busy(self, thread_id: str) -> str:
        head = self._client.run(ThreadLog(thread_id).read())
        return head.active if head else ""

    def forget(self) -> None:
        self._lists.clear()
        self._log = None

    def write(self, thread_id: str, record: Record, *, whole: bool = False) -> None:
        values = record.checkpoint["channel_values"]
        shared = {
            name: self._shared(record.ns, name, value) if type(value) is list else value
            for name, value in values.items()
        }
        changed = replace(record, checkpoint={**record.checkpoint, "channel_values": shared})
        super().write(thread_id, changed, whole=whole)

    def _shared(self, ns: str, channel: str, value: list[Any]) -> list[Any]:
        """Return the list with items that were in its last version being the same objects, as the saver looks for."""
        key = (ns, channel)
        before = self._lists.pop(key, [])
        shared = [
            old if new is not old and _identical(new, old) else new for new, old in zip(value, before, strict=False)
        ]
        self._lists[key] = shared = shared + value[len(shared) :]
        while len(self._lists) > _LISTS:
            del self._lists[next(iter(self._lists))]
        return shared

    def settle(self) -> None:
        pending, self._pending = self._pending, []
        errors = [error for error in (future.exception() for future in pending) if error]
        if errors:
            raise errors[0]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _put(self, *arguments: Any) -> None:
        self._pending.append(asyncio.run_coroutine_threadsafe(self.saver.aput(*arguments), self._loop))

    def _put_writes(self, *arguments: Any) -> None:
        self._pending.append(asyncio.run_coroutine_threadsafe(self.saver.aput_writes(*arguments), self._loop))


def side_of(saver: BaseCheckpointSaver[Any]) -> Side:
    """Return what is known of a checkpointer."""
    if isinstance(saver, DaprSaver):
        return DaprSide(saver)
    for kind in type(saver).__mro__:
        match (kind.__module__, kind.__name__):
            case ("langgraph.checkpoint.sqlite", "SqliteSaver"):
                return SqliteSide(saver)
            case ("langgraph.checkpoint.postgres", "PostgresSaver"):
                return PostgresSide(saver)
            case ("langgraph.checkpoint.memory", "InMemorySaver"):
                return MemorySide(saver)
    return Side(saver)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are the same for all purposes of a saver; JSON may turn 1.0 into 1."""
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float) and one != one:
        return other != other
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    try:
        return bool(one == other)
    except Exception:
        # Values that have no single truth, such as arrays.
        return repr(one) == repr(other)


def _identical(new: Any, old: Any) -> bool:
    if type(new) is not type(old):
        return False
    try:
        return pack(new) == pack(old) if isinstance(new, dict | list) else bool(new == old)
    except Exception:
        return False


def _config(thread_id: str, ns: str | None = None, checkpoint_id: str | None = None) -> RunnableConfig:
    configurable = {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
    return {"configurable": {key: value for key, value in configurable.items() if value is not None}}


def _oldest_first(places: Iterable[Place]) -> list[Place]:
    return sorted(places, key=lambda place: (place[1], place[0]))


def _closed(place: Place, kind: str) -> MigrationError:
    return MigrationError(
        f"checkpoint {place[1]} is stored in a form that cannot be opened here ({kind or 'encrypted'}). For "
        "EncryptedSerializer set LANGGRAPH_AES_KEY and use --encrypted; for any other call "
        "outlast.migrate.migrate(source, target) in Python with savers that have your serializer"
    )


def _check_closed(place: Place, error: TypeError) -> None:
    """Tell what it means where a saver stumbles over a checkpoint that is not opened."""
    if "Foreign" in str(error):
        raise _closed(place, "") from error


def _placed(
    pending: Sequence[tuple[str, str, Any]], where: Sequence[tuple[str, str, int, str]] | None
) -> tuple[Write, ...]:
    """Return pending writes with their places."""
    if where is not None:
        ordered = sorted(where, key=lambda row: writes_sort_key(row[1], row[0], row[2]))
        if [(row[0], row[3]) for row in ordered] == [(task_id, channel) for task_id, channel, _ in pending]:
            return tuple(
                Write(task_id, path, position, channel, value)
                for (task_id, path, position, channel), (_, _, value) in zip(ordered, pending, strict=True)
            )
    # Only the order is known: keep it.
    tasks: dict[str, int] = {}
    found: list[Write] = []
    for task_id, channel, value in pending:
        position = WRITES_IDX_MAP.get(channel, tasks.get(task_id, 0))
        tasks[task_id] = tasks.get(task_id, 0) + 1
        found.append(Write(task_id, "", position, channel, value))
    keys = [writes_sort_key(write.path, write.task_id, write.position) for write in found]
    if keys != sorted(keys):
        ranks = {task_id: f"{rank:08}" for rank, task_id in enumerate(tasks)}
        found = [write._replace(path=ranks[write.task_id]) for write in found]
    return tuple(found)


def _calls(writes: Sequence[Write]) -> Iterator[tuple[str, str, list[tuple[str, Any]]]]:
    """Yield the calls of `put_writes` that leave each write at its place: task id, path, writes."""
    tasks: dict[tuple[str, str], list[Write]] = {}
    for write in writes:
        tasks.setdefault((write.task_id, write.path), []).append(write)
    for (task_id, path), found in tasks.items():
        special = [(write.channel, write.value) for write in found if write.position < 0]
        if special:
            yield task_id, path, special
        # An ordinary write has its position in the call it came in; special ones beside it took the places between.
        filler = next((pair for pair in special if pair[0] != ERROR), None)
        ordinary: list[tuple[str, Any]] = []
        for write in sorted((write for write in found if write.position >= 0), key=lambda write: write.position):
            while filler and len(ordinary) < write.position:
                ordinary.append(filler)
            ordinary.append((write.channel, write.value))
        if ordinary:
            yield task_id, path, ordinary


__all__ = ["DaprSide", "MigrationError", "Place", "Record", "Side", "Write", "same", "side_of"]
