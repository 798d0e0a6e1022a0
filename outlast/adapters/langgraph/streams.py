"""Streaming a durable run: chunks go from the attempt, wherever it is, to the caller that follows."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.pregel import Pregel

from outlast.recovery import runs
from outlast.recovery.handle import RunHandle
from outlast.recovery.runs import RunHead, Typed
from outlast.recovery.runtime import Runtime

if TYPE_CHECKING:
    from outlast.adapters.langgraph.drive import Drive, Stretch

_INTERRUPT: Final = "__interrupt__"
_POLL: Final = 0.05


def wanted(graph: Pregel[Any, Any, Any, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return which chunks a caller of `stream` wants, and in which form; goes into the run's record."""
    mode = kwargs.get("stream_mode")
    mode = graph.stream_mode if mode is None else mode
    several = not isinstance(mode, str)
    return {
        "modes": list(mode) if several else [mode],
        "several": several,
        "subgraphs": bool(kwargs.get("subgraphs")),
        "version": kwargs.get("version") or "v1",
    }


class Collector:
    """Publishes the chunks of one stretch and puts together what `invoke` would have returned.

    Args:
        drive: The attempt.
        call: The stretch.
        dumps: Serialises a chunk for a caller elsewhere.
    """

    def __init__(self, drive: Drive, call: Stretch, dumps: Callable[[Any], Typed]) -> None:
        self._call = call
        self._publish = drive.attempt.publish
        self._options = drive.options
        self._wanted = drive.submitted["stream"]
        self._dumps = dumps
        self._latest: Any = None
        self._interrupts: list[Any] = []
        self._repeats = call.repeats

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for the graph's `stream`: the caller's modes, and those the result is made of."""
        modes = dict.fromkeys([*self._wanted["modes"], "values", "updates"])
        return {
            **self._options,
            "stream_mode": list(modes),
            "subgraphs": self._wanted["subgraphs"],
            "version": self._wanted["version"],
            "durability": "sync",
            "control": self._call.control,
        }

    def add(self, chunk: Any) -> None:
        """Take a chunk from LangGraph."""
        namespace: tuple[str, ...] = ()
        if self._wanted["version"] == "v2":
            namespace, mode, data = tuple(chunk.get("ns", ())), chunk["type"], chunk["data"]
        elif self._wanted["subgraphs"]:
            namespace, mode, data = chunk
        else:
            mode, data = chunk
        if not namespace and mode == "values":
            self._latest = data
        if not namespace and mode == "updates" and isinstance(data, dict) and _INTERRUPT in data:
            self._interrupts.extend(data[_INTERRUPT])
        if not namespace and mode == "values" and self._repeats:
            self._repeats = False
        elif mode in self._wanted["modes"]:
            self._publish(self._shaped(chunk, namespace, mode, data), self._dumps)

    def _shaped(self, chunk: Any, namespace: tuple[str, ...], mode: str, data: Any) -> Any:
        if self._wanted["version"] == "v2" or self._wanted["several"]:
            return chunk
        return (namespace, data) if self._wanted["subgraphs"] else data

    def result(self) -> Any:
        """Return what `invoke` would have returned."""
        if self._interrupts:
            values = self._latest if isinstance(self._latest, dict) else {}
            return {**values, _INTERRUPT: self._interrupts}
        return self._latest


class _Follower:
    """Collects the chunks of a run from here and from the store, in order.

    Args:
        runtime: The store.
        run_id: The run.
        chunks: Where an attempt in this process puts its chunks.
    """

    def __init__(
        self, runtime: Runtime, run_id: str, chunks: queue.SimpleQueue[Any], serde: SerializerProtocol
    ) -> None:
        self._runtime = runtime
        self._run_id = run_id
        self._chunks = chunks
        self._serde = serde
        self._epoch = -1
        self._number = 0

    def poll(self) -> tuple[list[Any], bool]:
        """Return the next chunks, and whether the run has ended or waits, after which there are no more."""
        head: RunHead = self._runtime.client.run(runs.read(self._run_id))
        elsewhere: list[Any] = []
        if head.running and head.running.epoch != self._epoch:
            self._epoch, self._number = head.running.epoch, 0
        if self._epoch >= 0:
            stored = self._runtime.chunks(self._run_id, self._epoch, self._number)
            self._number += len(stored)
            elsewhere = [_as_given(self._serde.loads_typed(chunk)) for chunk in stored]
        over = head.ended or (head.status == "waiting" and not head.signals)
        return elsewhere, over and not elsewhere

    def local(self, timeout: float) -> list[Any]:
        """Return the chunks an attempt in this process has put there; waits up to `timeout` seconds for the first."""
        found: list[Any] = []
        try:
            found.append(self._chunks.get(timeout=timeout) if timeout else self._chunks.get_nowait())
            while True:
                found.append(self._chunks.get_nowait())
        except queue.Empty:
            return found


def _as_given(chunk: Any) -> Any:
    """Return a chunk of several parts as the tuple that it was before it was stored."""
    if not isinstance(chunk, list):
        return chunk
    return tuple(tuple(part) if isinstance(part, list) and place == 0 else part for place, part in enumerate(chunk))


def follow(
    runtime: Runtime,
    handle: RunHandle[Any],
    chunks: queue.SimpleQueue[Any],
    serde: SerializerProtocol,
) -> Iterator[Any]:
    """Yield the chunks of a run until it has ended or waits; raises what its own call would raise."""
    follower = _Follower(runtime, handle.run_id, chunks, serde)
    while True:
        found = follower.local(_POLL)
        yield from found
        if found:
            continue
        elsewhere, over = follower.poll()
        yield from elsewhere
        if over:
            yield from follower.local(0)
            handle.result()
            return


async def afollow(
    runtime: Runtime,
    handle: RunHandle[Any],
    chunks: queue.SimpleQueue[Any],
    serde: SerializerProtocol,
) -> AsyncIterator[Any]:
    """Yield the chunks of a run. Async face of `follow`."""
    follower = _Follower(runtime, handle.run_id, chunks, serde)
    idle = 0.0
    while True:
        found = follower.local(0)
        for chunk in found:
            yield chunk
        if found:
            idle = 0.0
            continue
        if idle < _POLL:
            idle += 0.005
            await asyncio.sleep(0.005)
            continue
        idle = 0.0
        elsewhere, over = await asyncio.to_thread(follower.poll)
        for chunk in elsewhere:
            yield chunk
        if over:
            for chunk in follower.local(0):
                yield chunk
            await handle.aresult()
            return
