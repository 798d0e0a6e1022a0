"""Puts checkpoints as LangGraph does: by channel versions, with live values that go on to change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import StateClient
from outlast.checkpointer.thread import Fence, ThreadLog


def own(client: StateClient, thread: str, epoch: int) -> Fence:
    """Take a thread over."""
    from dataclasses import replace

    client.run(ThreadLog(thread).change(lambda head: replace(head, epoch=epoch, owner=f"owner-{epoch}")))
    return Fence(epoch, f"owner-{epoch}")


class Writer:
    """A thread as one process writes it.

    Attributes:
        expected: A deep copy of the values of each checkpoint, by checkpoint id.
    """

    def __init__(self, saver: DaprSaver, thread: str, ns: str = "") -> None:
        self.saver = saver
        self.config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ns}}
        self.expected: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Any] = {}
        self._versions: dict[str, Any] = {}
        self._step = -1

    def put(self, changed: Mapping[str, Any]) -> str:
        """Put a checkpoint in which these channels have these values; returns its id."""
        new = {name: self.saver.get_next_version(self._versions.get(name), None) for name in changed}
        self._versions |= new
        self.values |= changed
        checkpoint: Checkpoint = {
            **empty_checkpoint(),
            "id": str(uuid6(clock_seq=self._step + 2)),
            "channel_values": dict(self.values),
            "channel_versions": dict(self._versions),
        }
        self.expected[checkpoint["id"]] = copy.deepcopy(self.values)
        self._step += 1
        self.config = self.saver.put(self.config, checkpoint, {"source": "loop", "step": self._step}, new)
        return checkpoint["id"]

    def writes(self, task: str, *writes: tuple[str, Any]) -> None:
        """Put pending writes of the newest checkpoint."""
        self.saver.put_writes(self.config, list(writes), task)

    def restart(self, saver: DaprSaver) -> None:
        """Go on as another process, with what is read from the store."""
        configurable = self.config["configurable"]
        latest = {key: value for key, value in configurable.items() if key != "checkpoint_id"}
        found = saver.get_tuple({"configurable": latest})
        assert found is not None
        self.saver, self.config = saver, found.config
        self.values = dict(found.checkpoint["channel_values"])

    def check(self, fresh: Callable[[], DaprSaver]) -> None:
        """Compare every version with what a new process reads, one by one and listed."""
        reader = fresh()
        configurable = self.config["configurable"]
        latest = {key: value for key, value in configurable.items() if key != "checkpoint_id"}
        listed = {found.checkpoint["id"]: found.checkpoint for found in reader.list({"configurable": latest})}
        assert list(listed) == list(reversed(self.expected))
        for checkpoint_id, values in self.expected.items():
            assert listed[checkpoint_id]["channel_values"] == values
        for checkpoint_id in list(self.expected)[:: max(1, len(self.expected) // 7)]:
            found = reader.get_tuple({"configurable": {**latest, "checkpoint_id": checkpoint_id}})
            assert found is not None
            assert found.checkpoint["channel_values"] == self.expected[checkpoint_id]
