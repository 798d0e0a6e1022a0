"""What a saver reads: checkpoints with their values and pending writes, listings, histories of delta channels."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    Checkpoint,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_id,
    writes_sort_key,
)

from outlast.checkpointer.blobs import PackReader
from outlast.checkpointer.client import Steps
from outlast.checkpointer.head import Entry, Head
from outlast.checkpointer.lane import Lanes
from outlast.checkpointer.lists import state_of
from outlast.checkpointer.names import Names
from outlast.checkpointer.registry import THREADS
from outlast.checkpointer.requests import HIDDEN_NS, dumps
from outlast.checkpointer.thread import ThreadLog
from outlast.checkpointer.upkeep import Row, row_of, writes_of
from outlast.errors import CorruptRecordError

_BATCH: Final = 20
_Place = tuple[str, str]
START: Final[_Place] = ("\U0010ffff", "")
"""Before the first checkpoint of a listing."""


class Reads:
    """The reading rules of a saver.

    Args:
        names: Reads names, and with its serialiser values.
        lanes: Where the next commit looks for what was read.
        refresh: Whether reading the state of a thread begins its time to live anew.
    """

    def __init__(self, names: Names, lanes: Lanes, refresh: bool) -> None:
        self._names = names
        self._serde = names.serde
        self._lanes = lanes
        self._refresh = refresh

    def get_tuple(self, config: RunnableConfig) -> Steps[CheckpointTuple | None]:
        configurable = config["configurable"]
        thread_id, ns = str(configurable["thread_id"]), configurable.get("checkpoint_ns", "")
        wanted = get_checkpoint_id(config)
        log = ThreadLog(thread_id)
        head = yield from log.read()
        while head is not None:
            try:
                entry = yield from self._addressed(log, head, ns, wanted)
                if entry is None:
                    return None
                found = (yield from self._tuples(log, [entry], head.generation))[0]
            except CorruptRecordError as error:
                head = yield from log.reread(head, error)
            else:
                if self._refresh:
                    yield from log.touch()
                return found
        return None

    def page(
        self, log: ThreadLog, config: RunnableConfig | None, before: RunnableConfig | None, after: _Place
    ) -> Steps[tuple[list[CheckpointTuple], _Place | None]]:
        """Return the next checkpoints of a listing, and the place to go on from; None at the end."""
        head = yield from log.read()
        while head is not None:
            try:
                entries = yield from log.index.entries(head)
                start = bisect.bisect_left(range(len(entries)), True, key=lambda at: _place(entries[at]) < after)
                asked = (entry for entry in entries[start:] if self._asked_for(entry, config, before))
                batch = list(itertools.islice(asked, _BATCH))
                last = _place(batch[-1]) if next(asked, None) else None
                return (yield from self._tuples(log, batch)), last
            except CorruptRecordError as error:
                head = yield from log.reread(head, error)
        return [], None

    def delta_history(
        self, config: RunnableConfig, channels: Sequence[str]
    ) -> Steps[Mapping[str, DeltaChannelHistory]]:
        configurable = config["configurable"]
        log, ns = ThreadLog(str(configurable["thread_id"])), configurable.get("checkpoint_ns", "")
        place_of_ns = self._names.place(ns)
        head = yield from log.read()
        entry = (yield from self._addressed(log, head, ns, get_checkpoint_id(config))) if head else None
        reader = PackReader(log.key, self._serde.loads_typed)
        writes: dict[str, list[tuple[str, str, Any]]] = {channel: [] for channel in channels}
        seeds: dict[str, Any] = {}
        if head is not None and entry is not None:
            row = self._row(log.key, (yield from reader.packs([entry.pack])), entry)
            chain = [item for item in (yield from log.index.entries(head)) if item.ns == place_of_ns and item.pack]
            places = {item.checkpoint_id: place for place, item in enumerate(chain)}
            while writes.keys() - seeds.keys() and row.parent_id in places:
                place = places[row.parent_id]
                # Parents mostly follow one another in the index: read some ahead.
                ahead = chain[place : place + _BATCH]
                packs = yield from reader.packs(name for item in ahead for name in (item.pack, *item.writes))
                row = self._row(log.key, packs, chain[place])
                for write in reversed(self._pending(packs, chain[place])):
                    if write[1] in writes and write[1] not in seeds:
                        writes[write[1]].append(write)
                seeds |= {name: row.channels[name] for name in writes if name in row.channels and name not in seeds}
        yield from reader.fetch([*seeds.values(), *(write[2] for found in writes.values() for write in found)])
        history: dict[str, DeltaChannelHistory] = {}
        for channel, found in writes.items():
            values = [(task_id, name, reader.value(locator)) for task_id, name, locator in reversed(found)]
            history[channel] = {"writes": values}
            if channel in seeds:
                history[channel]["seed"] = reader.value(seeds[channel])
        return history

    def _addressed(self, log: ThreadLog, head: Head, ns: str, checkpoint_id: str | None) -> Steps[Entry | None]:
        """Return the entry of a checkpoint, or of the latest one, if that is there."""
        if checkpoint_id:
            entry = yield from log.index.find(head, self._names.place(ns), checkpoint_id)
        else:
            entry = yield from log.index.latest(head, self._names.place(ns))
        return entry if entry is not None and entry.pack else None

    def _asked_for(self, entry: Entry, config: RunnableConfig | None, before: RunnableConfig | None) -> bool:
        configurable = (config or {}).get("configurable", {})
        ns, wanted = configurable.get("checkpoint_ns"), configurable.get("checkpoint_id")
        bound = get_checkpoint_id(before) if before else None
        return (
            bool(entry.pack)
            and (ns is None or entry.ns == self._names.place(ns))
            and (not wanted or entry.checkpoint_id == wanted)
            and (not bound or entry.checkpoint_id < bound)
        )

    def namespaces(self, thread_id: str) -> Steps[dict[str, str]]:
        """Return the namespaces of a thread by what stands for them in its index."""
        log = ThreadLog(thread_id)
        head = yield from log.read()
        newest = {entry.ns: entry for entry in (yield from log.index.entries(head)) if entry.pack} if head else {}
        hidden = [entry for place, entry in newest.items() if place and self._names.hides]
        tuples = yield from self._tuples(log, hidden)
        shown = [found.config["configurable"]["checkpoint_ns"] for found in tuples]
        return {**{place: place for place in newest}, **dict(zip((entry.ns for entry in hidden), shown, strict=True))}

    def _tuples(
        self, log: ThreadLog, entries: Sequence[Entry], generation: int | None = None
    ) -> Steps[list[CheckpointTuple]]:
        reader = PackReader(log.key, self._serde.loads_typed)
        packs = yield from reader.packs(name for entry in entries for name in (entry.pack, *entry.writes))
        rows = [self._row(log.key, packs, entry) for entry in entries]
        writes = [self._pending(packs, entry) for entry in entries]
        wanted = [locator for row in rows for locator in row.locators]
        wanted += [locator for pending in writes for _, _, locator in pending]
        yield from reader.fetch(wanted)
        return [self._tuple(log, reader, row, pending, generation) for row, pending in zip(rows, writes, strict=True)]

    def _pending(self, packs: dict[str, Any], entry: Entry) -> Sequence[tuple[str, str, Any]]:
        """Return the pending writes of a checkpoint in LangGraph's order: task id, channel, locator."""
        kept: dict[tuple[str, int], tuple[str, str, Any]] = {}
        for row in writes_of(packs, entry):
            if row.replaces or (row.task_id, row.position) not in kept:
                kept[(row.task_id, row.position)] = (
                    self._names.show(row.task_path),
                    self._names.show(row.channel),
                    row.value,
                )
        order = sorted(kept, key=lambda place: writes_sort_key(kept[place][0], *place))
        return [(place[0], kept[place][1], kept[place][2]) for place in order]

    def _row(self, key: str, packs: dict[str, Any], entry: Entry) -> Row:
        """Return the checkpoint of an entry, its channels by name."""
        row = row_of(key, packs, entry)
        return row._replace(channels={self._names.show(name): locator for name, locator in row.channels.items()})

    def _tuple(
        self,
        log: ThreadLog,
        reader: PackReader,
        row: Row,
        pending: Sequence[tuple[str, str, Any]],
        generation: int | None,
    ) -> CheckpointTuple:
        stored = reader.value(row.checkpoint)
        row = row._replace(ns=stored.pop(HIDDEN_NS, row.ns))
        checkpoint = cast(Checkpoint, stored)
        values = {name: reader.value(locator) for name, locator in row.channels.items()}
        if generation is not None:
            self._remember(log, reader, row, checkpoint, values, generation)
        parent = config_of(log.thread_id, row.ns, row.parent_id) if row.parent_id else None
        return CheckpointTuple(
            config=config_of(log.thread_id, row.ns, row.checkpoint_id),
            checkpoint=cast(Checkpoint, {**checkpoint, "channel_values": values}),
            metadata=reader.value(row.metadata),
            parent_config=parent,
            pending_writes=[(task_id, channel, reader.value(locator)) for task_id, channel, locator in pending],
        )

    def _remember(
        self,
        log: ThreadLog,
        reader: PackReader,
        row: Row,
        checkpoint: Checkpoint,
        values: dict[str, Any],
        generation: int,
    ) -> None:
        """Let the next checkpoint share the segments and values of the one that a graph now goes on from."""
        lane = self._lanes.of(log.thread_id)
        versions = checkpoint["channel_versions"]
        channels = {name: (versions.get(name), locator) for name, locator in row.channels.items()}
        lane.remember(row.ns, row.checkpoint_id, channels, generation)
        for name, locator in row.channels.items():
            if isinstance(locator, dict):
                state = state_of(reader, locator, values[name], lambda value: dumps(self._serde, value))
                lane.remember_list(row.ns, name, state, generation)


def _place(entry: Entry) -> _Place:
    return entry.checkpoint_id, entry.ns


def config_of(thread_id: str, ns: str, checkpoint_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}}


def thread_ids(config: RunnableConfig | None) -> Steps[Sequence[str]]:
    if config and "thread_id" in config["configurable"]:
        return [str(config["configurable"]["thread_id"])]
    return (yield from THREADS.names())


def matching(
    batch: Sequence[CheckpointTuple], filter: dict[str, Any] | None, limit: int | None
) -> Sequence[CheckpointTuple]:
    found = [
        item for item in batch if not filter or all(item.metadata.get(key) == value for key, value in filter.items())
    ]
    return found if limit is None else found[: max(limit, 0)]
