"""The committed supersteps of a thread, as read from its checkpoints. Needs langgraph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from outlast.checkpointer.client import StateClient
from outlast.checkpointer.saver import DaprSaver

_SENDS: Final = "__pregel_tasks"
_BRANCH: Final = "branch:to:"
_INTERRUPT: Final = "__interrupt__"


@dataclass(frozen=True)
class Superstep:
    """One checkpoint and the superstep that it committed.

    Attributes:
        checkpoint_id: LangGraph's id.
        namespace: Empty for the root graph, else that of a subgraph.
        step: LangGraph's number of the superstep; -1 is the input.
        source: `input`, `loop`, `update` or `fork`.
        ran: Names of the nodes that ran, once for each time.
        next: Names of the nodes that run next, as far as the checkpoint tells without the graph.
        time: ISO 8601.
        run_id: The run that committed it, if any.
    """

    checkpoint_id: str
    namespace: str
    step: int
    source: str
    ran: tuple[str, ...]
    next: tuple[str, ...]
    time: str
    run_id: str | None


def reader(client: StateClient) -> DaprSaver:
    """Return a saver that reads everybody's checkpoints without importing their types: it shows the fields instead."""
    return DaprSaver(serde=strict(), client=client)


def strict() -> JsonPlusSerializer:
    """Return a serialiser that imports no types but LangGraph's and LangChain's own."""
    return JsonPlusSerializer(allowed_msgpack_modules=None)


def supersteps(
    saver: DaprSaver, thread_id: str, run_id: str | None = None, limit: int | None = None
) -> list[Superstep]:
    """Return the newest `limit` supersteps of a thread, or of one run on it, oldest first."""
    found = list(
        saver.list(
            {"configurable": {"thread_id": thread_id}},
            filter={"run_id": run_id} if run_id is not None else None,
            limit=limit,
        )
    )
    known = {(_namespace(saved), saved.checkpoint["id"]): saved for saved in found}
    return [_superstep(saved, _parent(saver, saved, known)) for saved in reversed(found)]


def interrupts(saved: CheckpointTuple | None) -> list[Any]:
    """Return what the thread waits for: the interrupts whose superstep is not committed yet."""
    writes = (saved.pending_writes or ()) if saved else ()
    return [item for _, channel, value in writes if channel == _INTERRUPT for item in value]


def _parent(
    saver: DaprSaver, saved: CheckpointTuple, known: dict[tuple[str, str], CheckpointTuple]
) -> CheckpointTuple | None:
    if saved.parent_config is None:
        return None
    parent = known.get((_namespace(saved), saved.parent_config["configurable"]["checkpoint_id"]))
    return parent or saver.get_tuple(saved.parent_config)


def _superstep(saved: CheckpointTuple, parent: CheckpointTuple | None) -> Superstep:
    return Superstep(
        checkpoint_id=saved.checkpoint["id"],
        namespace=_namespace(saved),
        step=int(saved.metadata.get("step", -1)),
        source=str(saved.metadata.get("source", "")),
        ran=_ran(saved, parent),
        next=_next(saved),
        time=saved.checkpoint["ts"],
        run_id=saved.metadata.get("run_id"),
    )


def _namespace(saved: CheckpointTuple) -> str:
    namespace: str = saved.config["configurable"]["checkpoint_ns"]
    return namespace


def _ran(saved: CheckpointTuple, parent: CheckpointTuple | None) -> tuple[str, ...]:
    """Return the nodes between a checkpoint and its parent: those that saw new versions, and those sent to."""
    if saved.metadata.get("source") == "input":
        return ()
    seen = saved.checkpoint["versions_seen"]
    before = parent.checkpoint["versions_seen"] if parent else {}
    triggered = [
        name for name, versions in seen.items() if versions and versions != before.get(name) and not _is_internal(name)
    ]
    return (*sorted(triggered), *(_sent(parent) if parent else ()))


def _next(saved: CheckpointTuple) -> tuple[str, ...]:
    values = saved.checkpoint["channel_values"]
    branches = [name.removeprefix(_BRANCH) for name in values if name.startswith(_BRANCH)]
    return (*sorted(branches), *_sent(saved))


def _sent(saved: CheckpointTuple) -> Iterable[str]:
    return (send.node for send in saved.checkpoint["channel_values"].get(_SENDS, ()))


def _is_internal(name: str) -> bool:
    return name.startswith("__")


def names(nodes: Iterable[str]) -> str:
    """Return node names as a person reads them: `tools ×2`."""
    return ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in Counter(nodes).items())
