"""DaprSaver: LangGraph's checkpointer on any Dapr state store that can compare-and-swap."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

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
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import ERROR
from langgraph.store.base import TTLConfig

from outlast.checkpointer import life, sweeper, upkeep
from outlast.checkpointer.client import Guarantee, StateClient, Steps
from outlast.checkpointer.head import Entry
from outlast.checkpointer.lane import Lanes
from outlast.checkpointer.names import Names
from outlast.checkpointer.reading import START, Reads, config_of, matching, thread_ids
from outlast.checkpointer.requests import Put, Writes, dumps
from outlast.checkpointer.sweeper import Sweeper
from outlast.checkpointer.thread import Fence, ThreadLog

_ERROR_SOURCE: Final = "__error_source_node__"


class DaprSaver(BaseCheckpointSaver[Any]):
    """A LangGraph checkpointer that keeps threads in a Dapr state store.

    Both faces, sync and async, may be used at once, from any thread and any event loop. Every method returns when what
    it wrote is durable. Without a configured Dapr sidecar (`DAPR_GRPC_PORT`, `DAPR_GRPC_ENDPOINT`) it starts the
    embedded one, which keeps a SQLite file in `.outlast/`.

    Args:
        store: Name of the state store component.
        serde: Serialises values; LangGraph's msgpack serialiser if not given. With `EncryptedSerializer`
            nothing of what is in the state is readable in the store, nor are metadata, names of channels and nodes;
            ids are (of threads, runs, checkpoints and tasks), and times.
        client: The store to use instead of the one named `store`.
        ttl: Time to live of threads: `default_ttl` in minutes (none: for ever), `refresh_on_read` (true if not given),
            `sweep_interval_minutes`. Every write begins it anew, and so does reading the state. `ttl` in a config's
            `configurable`, in minutes or None for ever, is for that thread alone, from the first write with it on. A
            thread past its time is not there any more, all of it at once, for whoever reads or writes; `sweep_ttl`
            and `start_ttl_sweeper` free its space. A thread that a durable run holds, or is queued for, does not
            expire. Times are those of the clocks of the machines.
        guarantee: `exactly-once` refuses a store without a sound compare-and-swap; `at-least-once` takes any, for
            threads that one process at a time writes to.

    Raises:
        SidecarUnavailableError: If the configured sidecar's address is not valid.
        StoreNotFoundError, UnsupportedStoreError: On first use, if the store is unknown or cannot compare-and-swap.
        ValueError: If the time to live is no positive number.
    """

    def __init__(
        self,
        store: str = "statestore",
        *,
        serde: SerializerProtocol | None = None,
        client: StateClient | None = None,
        guarantee: Guarantee = "exactly-once",
        ttl: TTLConfig | None = None,
    ) -> None:
        super().__init__(serde=serde)
        self._known_names: Names | None = None
        self.ttl_config = ttl
        self._wish = life.default(life.checked((ttl or {}).get("default_ttl"), "`default_ttl`"))
        # LangGraph clones savers with copy.copy: whatever changes is in these shared objects.
        self._lanes = Lanes(client or StateClient(store, guarantee=guarantee), wish=self._wish)
        self._sweeper = Sweeper(self.sweep_ttl, "outlast-saver-sweeper")

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
        saver = DaprSaver(serde=self.serde, client=self.client, ttl=self.ttl_config)
        saver._lanes = Lanes(self.client, fence, after_commit, self._wish)
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
        self._lanes.of(thread_id).enqueue(request, life.wish_of(config["configurable"])).result()
        return config_of(thread_id, request.ns, checkpoint["id"])

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Commit a checkpoint. Async face of `put`."""
        thread_id, request = self._put(config, checkpoint, metadata, new_versions)
        await asyncio.wrap_future(self._lanes.of(thread_id).enqueue(request, life.wish_of(config["configurable"])))
        return config_of(thread_id, request.ns, checkpoint["id"])

    def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> tuple[str, Put]:
        configurable = config["configurable"]
        request = Put(
            names=self._names,
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
        self._lanes.of(thread_id).enqueue(request, life.wish_of(config["configurable"])).result()

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Commit the pending writes of a task. Async face of `put_writes`."""
        thread_id, request = self._put_writes(config, writes, task_id, task_path)
        await asyncio.wrap_future(self._lanes.of(thread_id).enqueue(request, life.wish_of(config["configurable"])))

    def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> tuple[str, Writes]:
        configurable = config["configurable"]
        if any(channel == ERROR for channel, _ in writes) and all(channel != _ERROR_SOURCE for channel, _ in writes):
            # A router that raises leaves its node's output beside the error, and a resume would skip what is
            # downstream (langgraph issue 8834): keep only the error, so that the node runs again.
            writes = [write for write in writes if write[0] in WRITES_IDX_MAP]
        rows = [
            (channel, WRITES_IDX_MAP.get(channel, position), dumps(self.serde, value))
            for position, (channel, value) in enumerate(writes)
        ]
        request = Writes(
            names=self._names,
            ns=configurable.get("checkpoint_ns", ""),
            checkpoint_id=configurable["checkpoint_id"],
            task_id=task_id,
            task_path=task_path,
            writes=rows,
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
        return upkeep.copy_thread(str(source), str(target), self.serde.loads_typed, self._limit, self._wish)

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

    def _pruned(self, thread_id: str, strategy: str) -> Steps[Any]:
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

    def sweep_ttl(self) -> int:
        """Remove the threads of this store whose time to live is over. Returns how many there were.

        Reads the head of every thread; called again, completes what was cut short.
        """
        return self.client.run(upkeep.sweep_expired())

    async def asweep_ttl(self) -> int:
        """Remove the threads whose time to live is over. Async face of `sweep_ttl`."""
        return await self.client.arun(upkeep.sweep_expired())

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> Future[None]:
        """Call `sweep_ttl` regularly, on a thread. Cancelling the future that is returned stops that."""
        configured = (self.ttl_config or {}).get("sweep_interval_minutes")
        return self._sweeper.start(sweep_interval_minutes or configured or sweeper.MINUTES)

    def stop_ttl_sweeper(self, timeout: float | None = None) -> bool:
        """Stop the sweeper. Returns False if it has not ended within `timeout` seconds."""
        return self._sweeper.stop(timeout)

    # --- reading

    @property
    def _reads(self) -> Reads:
        refresh = self.ttl_config is not None and self.ttl_config.get("refresh_on_read", True)
        return Reads(self._names, self._lanes, refresh)

    @property
    def _names(self) -> Names:
        # LangGraph sets another serialiser on a clone.
        if self._known_names is None or self._known_names.serde is not self.serde:
            self._known_names = Names(self.serde)
        return self._known_names

    def namespaces_of(self, thread_id: str) -> dict[str, str]:
        """Return the namespaces of a thread by what stands for them in its index."""
        return self.client.run(self._reads.namespaces(thread_id))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return what the ancestors of a checkpoint contributed to delta channels, back to their last stored values.

        Reads the chain of parents in bulk, and of each only what these channels need.
        """
        return self.client.run(self._reads.delta_history(config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return what the ancestors contributed to delta channels. Async face of `get_delta_channel_history`."""
        return await self.client.arun(self._reads.delta_history(config, channels))

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the checkpoint that `config` addresses, or the latest of its thread and namespace, or None.

        Raises:
            CorruptRecordError, UnknownFormatError: If a record is damaged or of a newer format.
        """
        return self.client.run(self._reads.get_tuple(config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the addressed or latest checkpoint. Async face of `get_tuple`."""
        return await self.client.arun(self._reads.get_tuple(config))

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
        for thread_id in self.client.run(thread_ids(config)):
            log = ThreadLog(thread_id)
            after: tuple[str, str] | None = START
            while after and (left is None or left > 0):
                batch, after = self.client.run(self._reads.page(log, config, before, after))
                found = matching(batch, filter, left)
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
        for thread_id in await self.client.arun(thread_ids(config)):
            log = ThreadLog(thread_id)
            after: tuple[str, str] | None = START
            while after and (left is None or left > 0):
                batch, after = await self.client.arun(self._reads.page(log, config, before, after))
                found = matching(batch, filter, left)
                for item in found:
                    yield item
                left = None if left is None else left - len(found)

    def get_next_version(self, current: Any, channel: None) -> Any:
        """Return the version after `current`; goes on in the style of the saver a thread came from."""
        if isinstance(current, str):
            return f"{int(current.split('.')[0]) + 1:032}.{current.partition('.')[2] or '0'}"
        return 1 if current is None else int(current) + 1
