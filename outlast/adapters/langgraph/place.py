"""Where in a LangGraph run code is: a name for it that is the same in every attempt; and the saver of an attempt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata, CheckpointTuple

from outlast.checkpointer.head import Entry
from outlast.checkpointer.lane import Lanes
from outlast.checkpointer.saver import DaprSaver
from outlast.recovery.attempt import Attempt

_RUNTIME: Final = "__pregel_runtime"
_SEPARATOR: Final = "|"


class RunSaver(DaprSaver):
    """The saver of one attempt: commits while the attempt owns the thread and is not to end in the middle.

    Args:
        base: The agent's saver.
        attempt: The attempt.
        after_commit: Called after each commit, with the changes of the index it made.

    Attributes:
        begun: Namespaces of the graphs that keep their state in this saver, as far as they have begun in this attempt.
    """

    def __init__(self, base: DaprSaver, attempt: Attempt, after_commit: Callable[[list[Entry]], None]) -> None:
        super().__init__(serde=base.serde, client=base.client, ttl=base.ttl_config)
        self._lanes = Lanes(base.client, attempt.fence, after_commit, self._wish)
        self._attempt = attempt
        self.begun: set[str] = {""}

    def _entered(self, config: RunnableConfig) -> None:
        # Every graph that has a saver asks it for its state before anything runs in it.
        self.begun.add(config["configurable"].get("checkpoint_ns", ""))

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        self._entered(config)
        return super().get_tuple(config)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        self._entered(config)
        return await super().aget_tuple(config)

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        self._attempt.refuse_if_stopped()
        return super().put(config, checkpoint, metadata, new_versions)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        self._attempt.refuse_if_stopped()
        return await super().aput(config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        self._attempt.refuse_if_stopped()
        super().put_writes(config, writes, task_id, task_path)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        self._attempt.refuse_if_stopped()
        await super().aput_writes(config, writes, task_id, task_path)

    def locate(self) -> tuple[str, int]:
        """Return the place of the code that calls, and how often LangGraph has tried the node there.

        Ids of tasks are the same in every attempt where their graph keeps its state. A graph that does not begins anew
        with its task, so there names, steps and paths are the same.
        """
        config = var_child_runnable_config.get() or {}
        metadata = config.get("metadata") or {}
        namespace = metadata.get("langgraph_checkpoint_ns")
        if not isinstance(namespace, str):
            return "", 1
        segments = namespace.split(_SEPARATOR)
        kept = max((at for at in range(len(segments)) if _SEPARATOR.join(segments[:at]) in self.begun), default=0)
        names = [*segments[: kept + 1], *(segment.partition(":")[0] for segment in segments[kept + 1 :])]
        if kept + 1 < len(segments):
            names.append(f"{metadata.get('langgraph_step')}{metadata.get('langgraph_path')}")
        runtime = config.get("configurable", {}).get(_RUNTIME)
        info = getattr(runtime, "execution_info", None)
        return _SEPARATOR.join(names), getattr(info, "node_attempt", 1)
