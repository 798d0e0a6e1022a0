"""DaprSaver: LangGraph's checkpointer on any Dapr state store that can compare-and-swap."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_id,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import ERROR

from outlast.checkpointer import upkeep
from outlast.checkpointer.blobs import ListState, PackReader, PackWriter, Typed, store_list
from outlast.checkpointer.client import Guarantee, StateClient, Steps
from outlast.checkpointer.head import Entry, Head
from outlast.checkpointer.lane import Lane, Lanes
from outlast.checkpointer.registry import THREADS
from outlast.checkpointer.thread import Fence, ThreadLog
from outlast.checkpointer.upkeep import Row, WriteRow, row_of, writes_of
from outlast.errors import CorruptRecordError, OutlastError, SerializationError

_BATCH: Final = 20
_Place = tuple[str, str]
_START: Final[_Place] = ("\U0010ffff", "")
_ERROR_SOURCE: Final = "__error_source_node__"


@dataclass
class _Put:
    """A checkpoint to commit."""

    serde: SerializerProtocol
    ns: str
    parent_id: str
    checkpoint: Checkpoint
    metadata: CheckpointMetadata
    new_versions: ChannelVersions
    completes: bool = True

    def prepare(self, lane: Lane, pack: PackWriter) -> Steps[Entry]:
        values = self.checkpoint["channel_values"]
        versions = self.checkpoint["channel_versions"]
        known = yield from self._parent_channels(lane)
        stored: dict[str, tuple[Any, Any]] = {}
        lists: list[tuple[str, ListState]] = []
        for name, value in values.items():
            version = versions.get(name)
            if name not in self.new_versions and name in known and known[name][0] == version:
                stored[name] = known[name]
            elif type(value) is list:
                state = store_list(value, lane.lists.get((self.ns, name)), pack, self._dumps)
                lists.append((name, state))
                stored[name] = (version, state.locator)
            else:
                stored[name] = (version, pack.add(self._dumps(value)))
        bare = {key: value for key, value in self.checkpoint.items() if key != "channel_values"}
        row = Row(
            ns=self.ns,
            checkpoint_id=self.checkpoint["id"],
            parent_id=self.parent_id,
            checkpoint=pack.add(self._dumps(bare)),
            metadata=pack.add(self._dumps(self.metadata)),
            channels={name: locator for name, (_, locator) in stored.items()},
        )
        pack.checkpoints.append(list(row))
        lane.remember(self.ns, self.checkpoint["id"], stored)
        for name, state in lists:
            lane.remember_list(self.ns, name, state)
        return Entry(self.ns, self.checkpoint["id"], pack=pack.name)

    def _dumps(self, value: Any) -> Typed:
        return _dumps(self.serde, value)

    def _parent_channels(self, lane: Lane) -> Steps[dict[str, tuple[Any, Any]]]:
        """Return where the parent's values are, so that those that did not change are not written again."""
        if not self.parent_id or not (self.checkpoint["channel_values"].keys() - self.new_versions.keys()):
            return {}
        known = lane.channels.get((self.ns, self.parent_id))
        if known is not None:
            return known
        head = yield from lane.log.read()
        entry = (yield from lane.log.index.find(head, self.ns, self.parent_id)) if head else None
        if entry is None or not entry.pack:
            return {}
        reader = PackReader(lane.log.key, self.serde.loads_typed)
        row = row_of(lane.log.key, (yield from reader.packs([entry.pack])), entry)
        yield from reader.fetch([row.checkpoint])
        versions = reader.value(row.checkpoint)["channel_versions"]
        return {name: (versions.get(name), locator) for name, locator in row.channels.items()}


@dataclass
class _Writes:
    """Pending writes of one task to commit, serialised already."""

    ns: str
    checkpoint_id: str
    task_id: str
    task_path: str
    writes: list[tuple[str, int, Typed]]
    completes: bool = False

    def prepare(self, lane: Lane, pack: PackWriter) -> Steps[Entry]:
        yield from ()
        replaces = all(channel in WRITES_IDX_MAP for channel, _, _ in self.writes)
        for channel, position, value in self.writes:
            place = (self.ns, self.checkpoint_id, self.task_id, self.task_path, position)
            pack.writes.append(list(WriteRow(*place, channel, pack.add(value), replaces)))
        return Entry(self.ns, self.checkpoint_id, writes=(pack.name,))


class DaprSaver(BaseCheckpointSaver[Any]):
    """A LangGraph checkpointer that keeps threads in a Dapr state store.

    Both faces, sync and async, may be used at once, from any thread and any event loop. Every method returns when what
    it wrote is durable. Without a configured Dapr sidecar (`DAPR_GRPC_PORT`, `DAPR_GRPC_ENDPOINT`) it starts the
    embedded one, which keeps a SQLite file in `.outlast/`.

    Args:
        store: Name of the state store component.
        serde: Serialises values; LangGraph's msgpack serialiser if not given. `EncryptedSerializer` works.
        client: The store to use instead of the one named `store`.
        guarantee: `exactly-once` refuses a store without a sound compare-and-swap; `at-least-once` takes any, for
            threads that one process at a time writes to.

    Raises:
        SidecarUnavailableError: If the configured sidecar's address is not valid.
        StoreNotFoundError, UnsupportedStoreError: On first use, if the store is unknown or cannot compare-and-swap.
    """

    def __init__(
        self,
        store: str = "statestore",
        *,
        serde: SerializerProtocol | None = None,
        client: StateClient | None = None,
        guarantee: Guarantee = "exactly-once",
    ) -> None:
        super().__init__(serde=serde)
        # LangGraph clones savers with copy.copy: whatever changes is in this one shared object.
        self._lanes = Lanes(client or StateClient(store, guarantee=guarantee))

    @property
    def client(self) -> StateClient:
        """The state store behind this saver."""
        return self._lanes.client

    def fenced(self, fence: Fence, after_commit: Callable[[builtins.list[Entry]], None] | None = None) -> DaprSaver:
        """Return a saver that commits only while `fence` holds; for one thread, by one attempt.

        Args:
            fence: The epoch and owner that the thread's head must show.
            after_commit: Called after each commit, with the changes of the index it made.
        """
        saver = DaprSaver(serde=self.serde, client=self.client)
        saver._lanes = Lanes(self.client, fence, after_commit)
        return saver

    # --- writing

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Commit a checkpoint. Returns the config that addresses it.

        Raises:
            SerializationError: If a value cannot be serialised; nothing is written then.
            FencedError: If this saver's attempt has been overtaken.
        """
        thread_id, request = self._put(config, checkpoint, metadata, new_versions)
        self._lanes.of(thread_id).enqueue(request).result()
        return _config(thread_id, request.ns, checkpoint["id"])

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Commit a checkpoint. Async face of `put`."""
        thread_id, request = self._put(config, checkpoint, metadata, new_versions)
        await asyncio.wrap_future(self._lanes.of(thread_id).enqueue(request))
        return _config(thread_id, request.ns, checkpoint["id"])

    def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> tuple[str, _Put]:
        configurable = config["configurable"]
        request = _Put(
            serde=self.serde,
            ns=configurable.get("checkpoint_ns", ""),
            parent_id=get_checkpoint_id(config) or "",
            checkpoint=checkpoint,
            metadata=get_checkpoint_metadata(config, metadata),
            new_versions=new_versions,
        )
        return str(configurable["thread_id"]), request

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Commit the pending writes of a task.

        Raises:
            SerializationError: If a value cannot be serialised; nothing is written then.
            FencedError: If this saver's attempt has been overtaken.
        """
        thread_id, request = self._put_writes(config, writes, task_id, task_path)
        self._lanes.of(thread_id).enqueue(request).result()

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Commit the pending writes of a task. Async face of `put_writes`."""
        thread_id, request = self._put_writes(config, writes, task_id, task_path)
        await asyncio.wrap_future(self._lanes.of(thread_id).enqueue(request))

    def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> tuple[str, _Writes]:
        configurable = config["configurable"]
        if any(channel == ERROR for channel, _ in writes) and all(channel != _ERROR_SOURCE for channel, _ in writes):
            # A router that raises leaves its node's output beside the error, and a resume would skip what is
            # downstream (langgraph issue 8834): keep only the error, so that the node runs again.
            writes = [write for write in writes if write[0] in WRITES_IDX_MAP]
        rows = [
            (channel, WRITES_IDX_MAP.get(channel, position), _dumps(self.serde, value))
            for position, (channel, value) in enumerate(writes)
        ]
        request = _Writes(
            configurable.get("checkpoint_ns", ""), configurable["checkpoint_id"], task_id, task_path, rows
        )
        return str(configurable["thread_id"]), request

    def delete_thread(self, thread_id: str) -> None:
        """Remove all checkpoints and writes of a thread; called again, completes a deletion that was cut short."""
        self.client.run(ThreadLog(str(thread_id)).delete())
        self._lanes.drop(str(thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        """Remove all checkpoints and writes of a thread. Async face of `delete_thread`."""
        await self.client.arun(ThreadLog(str(thread_id)).delete())
        self._lanes.drop(str(thread_id))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints and writes of a thread to another; called again, completes what was cut short."""
        self.client.run(self._copy(source_thread_id, target_thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread. Async face of `copy_thread`."""
        await self.client.arun(self._copy(source_thread_id, target_thread_id))

    def _copy(self, source: str, target: str) -> Steps[None]:
        return upkeep.copy_thread(str(source), str(target), self.serde.loads_typed, self._limit)

    @property
    def _limit(self) -> int:
        return self.client.capabilities.quirks.max_value

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Remove checkpoints of threads; called again, completes what was cut short.

        Args:
            thread_ids: The threads.
            strategy: `keep_latest` keeps the newest checkpoint of each namespace, its writes, and what its delta
                channels need; `delete` removes everything.

        Raises:
            ValueError: If there is no such strategy.
        """
        for thread_id in thread_ids:
            self.client.run(self._pruned(str(thread_id), strategy))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Remove checkpoints of threads. Async face of `prune`."""
        for thread_id in thread_ids:
            await self.client.arun(self._pruned(str(thread_id), strategy))

    def _pruned(self, thread_id: str, strategy: str) -> Steps[None]:
        if strategy == "delete":
            return ThreadLog(thread_id).delete()
        if strategy == "keep_latest":
            return upkeep.keep_latest(thread_id, self.serde.loads_typed, self._limit)
        raise ValueError(f"unknown strategy {strategy!r}: use 'keep_latest' or 'delete'")

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Remove the checkpoints that these runs made, in all threads; looks through every thread of the store."""
        self.client.run(upkeep.delete_for_runs(run_ids, self.serde.loads_typed, self._limit))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Remove the checkpoints that these runs made. Async face of `delete_for_runs`."""
        await self.client.arun(upkeep.delete_for_runs(run_ids, self.serde.loads_typed, self._limit))

    # --- reading

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return what the ancestors of a checkpoint contributed to delta channels, back to their last stored values.

        Reads the chain of parents in bulk, and of each only what these channels need.
        """
        return self.client.run(self._delta_history(config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return what the ancestors contributed to delta channels. Async face of `get_delta_channel_history`."""
        return await self.client.arun(self._delta_history(config, channels))

    def _delta_history(
        self, config: RunnableConfig, channels: Sequence[str]
    ) -> Steps[Mapping[str, DeltaChannelHistory]]:
        configurable = config["configurable"]
        log, ns = ThreadLog(str(configurable["thread_id"])), configurable.get("checkpoint_ns", "")
        head = yield from log.read()
        entry = (yield from self._addressed(log, head, ns, get_checkpoint_id(config))) if head else None
        reader = PackReader(log.key, self.serde.loads_typed)
        writes: dict[str, builtins.list[tuple[str, str, Any]]] = {channel: [] for channel in channels}
        seeds: dict[str, Any] = {}
        if head is not None and entry is not None:
            row = row_of(log.key, (yield from reader.packs([entry.pack])), entry)
            chain = [item for item in (yield from log.index.entries(head)) if item.ns == ns and item.pack]
            places = {item.checkpoint_id: place for place, item in enumerate(chain)}
            while writes.keys() - seeds.keys() and row.parent_id in places:
                place = places[row.parent_id]
                # Parents mostly follow one another in the index: read some ahead.
                ahead = chain[place : place + _BATCH]
                packs = yield from reader.packs(name for item in ahead for name in (item.pack, *item.writes))
                row = row_of(log.key, packs, chain[place])
                for write in reversed(_pending(packs, chain[place])):
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
            entry = yield from log.index.find(head, ns, checkpoint_id)
        else:
            entry = yield from log.index.latest(head, ns)
        return entry if entry is not None and entry.pack else None

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the checkpoint that `config` addresses, or the latest of its thread and namespace, or None.

        Raises:
            CorruptRecordError, UnknownFormatError: If a record is damaged or of a newer format.
        """
        return self.client.run(self._get_tuple(config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the addressed or latest checkpoint. Async face of `get_tuple`."""
        return await self.client.arun(self._get_tuple(config))

    def _get_tuple(self, config: RunnableConfig) -> Steps[CheckpointTuple | None]:
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
                return (yield from self._tuples(log, [entry], remember=True))[0]
            except CorruptRecordError as error:
                head = yield from log.reread(head, error)
        return None

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Yield checkpoints, newest first, of one thread or (`config=None`) of all threads one after another.

        Args:
            config: The thread, and optionally the namespace and the checkpoint.
            filter: Metadata that must be equal.
            before: Only checkpoints older than this one.
            limit: At most so many.
        """
        left = limit
        for thread_id in self.client.run(_thread_ids(config)):
            log = ThreadLog(thread_id)
            after: _Place | None = _START
            while after and (left is None or left > 0):
                batch, after = self.client.run(self._page(log, config, before, after))
                found = _matching(batch, filter, left)
                yield from found
                left = None if left is None else left - len(found)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """Yield checkpoints, newest first. Async face of `list`."""
        left = limit
        for thread_id in await self.client.arun(_thread_ids(config)):
            log = ThreadLog(thread_id)
            after: _Place | None = _START
            while after and (left is None or left > 0):
                batch, after = await self.client.arun(self._page(log, config, before, after))
                found = _matching(batch, filter, left)
                for item in found:
                    yield item
                left = None if left is None else left - len(found)

    def _page(
        self, log: ThreadLog, config: RunnableConfig | None, before: RunnableConfig | None, after: _Place
    ) -> Steps[tuple[builtins.list[CheckpointTuple], _Place | None]]:
        """Return the next checkpoints of a listing, and the place to go on from; None at the end."""
        head = yield from log.read()
        while head is not None:
            try:
                entries = [
                    entry
                    for entry in (yield from log.index.entries(head))
                    if (entry.checkpoint_id, entry.ns) < after and _asked_for(entry, config, before)
                ]
                batch = entries[:_BATCH]
                last = (batch[-1].checkpoint_id, batch[-1].ns) if len(entries) > len(batch) else None
                return (yield from self._tuples(log, batch)), last
            except CorruptRecordError as error:
                head = yield from log.reread(head, error)
        return [], None

    def _tuples(
        self, log: ThreadLog, entries: Sequence[Entry], remember: bool = False
    ) -> Steps[builtins.list[CheckpointTuple]]:
        reader = PackReader(log.key, self.serde.loads_typed)
        packs = yield from reader.packs(name for entry in entries for name in (entry.pack, *entry.writes))
        rows = [row_of(log.key, packs, entry) for entry in entries]
        writes = [_pending(packs, entry) for entry in entries]
        wanted = [locator for row in rows for locator in row.locators]
        wanted += [locator for pending in writes for _, _, locator in pending]
        yield from reader.fetch(wanted)
        return [self._tuple(log, reader, row, pending, remember) for row, pending in zip(rows, writes, strict=True)]

    def _tuple(
        self,
        log: ThreadLog,
        reader: PackReader,
        row: Row,
        pending: Sequence[tuple[str, str, Any]],
        remember: bool,
    ) -> CheckpointTuple:
        checkpoint = cast(Checkpoint, reader.value(row.checkpoint))
        values = {name: reader.value(locator) for name, locator in row.channels.items()}
        if remember:
            self._remember(log, reader, row, checkpoint, values)
        parent = _config(log.thread_id, row.ns, row.parent_id) if row.parent_id else None
        return CheckpointTuple(
            config=_config(log.thread_id, row.ns, row.checkpoint_id),
            checkpoint=cast(Checkpoint, {**checkpoint, "channel_values": values}),
            metadata=reader.value(row.metadata),
            parent_config=parent,
            pending_writes=[(task_id, channel, reader.value(locator)) for task_id, channel, locator in pending],
        )

    def _remember(
        self, log: ThreadLog, reader: PackReader, row: Row, checkpoint: Checkpoint, values: dict[str, Any]
    ) -> None:
        """Let the next checkpoint share the segments and values of the one that a graph now goes on from."""
        lane = self._lanes.of(log.thread_id)
        versions = checkpoint["channel_versions"]
        lane.remember(
            row.ns, row.checkpoint_id, {name: (versions.get(name), loc) for name, loc in row.channels.items()}
        )
        for name, locator in row.channels.items():
            if isinstance(locator, dict):
                state = reader.list_state(locator, values[name], lambda value: _dumps(self.serde, value))
                lane.remember_list(row.ns, name, state)

    def get_next_version(self, current: Any, channel: None) -> Any:
        """Return the version after `current`; goes on in the style of the saver a thread came from."""
        if isinstance(current, str):
            return f"{int(current.split('.')[0]) + 1:032}.{current.partition('.')[2] or '0'}"
        return 1 if current is None else int(current) + 1


def _dumps(serde: SerializerProtocol, value: Any) -> Typed:
    try:
        return serde.dumps_typed(value)
    except OutlastError:
        raise
    except Exception as error:
        raise SerializationError(
            f"cannot serialise a value of type {type(value).__qualname__}: {error}. Keep plain data, messages, "
            "pydantic models or dataclasses in the state, or give the checkpointer a `serde` that knows this type"
        ) from error


def _config(thread_id: str, ns: str, checkpoint_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}}


def _pending(packs: dict[str, Any], entry: Entry) -> Sequence[tuple[str, str, Any]]:
    """Return the pending writes of a checkpoint in LangGraph's order: task id, channel, locator."""
    kept: dict[tuple[str, int], tuple[str, str, Any]] = {}
    for row in writes_of(packs, entry):
        if row.replaces or (row.task_id, row.position) not in kept:
            kept[(row.task_id, row.position)] = (row.task_path, row.channel, row.value)
    order = sorted(kept, key=lambda place: writes_sort_key(kept[place][0], *place))
    return [(place[0], kept[place][1], kept[place][2]) for place in order]


def _thread_ids(config: RunnableConfig | None) -> Steps[Sequence[str]]:
    if config and "thread_id" in config["configurable"]:
        return [str(config["configurable"]["thread_id"])]
    return (yield from THREADS.names())


def _asked_for(entry: Entry, config: RunnableConfig | None, before: RunnableConfig | None) -> bool:
    configurable = (config or {}).get("configurable", {})
    ns, wanted = configurable.get("checkpoint_ns"), configurable.get("checkpoint_id")
    bound = get_checkpoint_id(before) if before else None
    return (
        bool(entry.pack)
        and (ns is None or entry.ns == ns)
        and (not wanted or entry.checkpoint_id == wanted)
        and (not bound or entry.checkpoint_id < bound)
    )


def _matching(
    batch: Sequence[CheckpointTuple], filter: dict[str, Any] | None, limit: int | None
) -> Sequence[CheckpointTuple]:
    found = [
        item for item in batch if not filter or all(item.metadata.get(key) == value for key, value in filter.items())
    ]
    return found if limit is None else found[: max(limit, 0)]
