"""Comparing a durable agent with the plain graph that it was made of."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import inspect
import pprint
import re
from collections.abc import Callable
from typing import Any

from langchain_core.messages import BaseMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Interrupt, StateSnapshot

from outlast import durable
from outlast.recovery.runtime import Runtime

Story = Callable[[Any, dict[str, Any]], Any]


def plain(value: Any) -> Any:
    """A value without what LangGraph draws anew in every run: ids, times."""
    if isinstance(value, BaseMessage):
        return [value.type, value.content, getattr(value, "tool_calls", None), getattr(value, "tool_call_id", None)]
    if isinstance(value, Interrupt):
        return ["interrupt", plain(value.value)]
    if isinstance(value, StateSnapshot):
        metadata = value.metadata or {}
        return {
            "values": plain(value.values),
            "next": sorted(value.next),
            "source": metadata.get("source"),
            "step": metadata.get("step"),
            "interrupts": plain(value.interrupts),
            "tasks": [(task.name, task.error and str(task.error), plain(task.interrupts)) for task in value.tasks],
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in _DRAWN}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, plain(dataclasses.asdict(value))]
    if isinstance(value, str):
        return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<id>", value)
    return value


_DRAWN = {
    "id", "run_id", "ts", "timestamp", "checkpoint_id", "thread_id", "checkpoint_ns", "langgraph_checkpoint_ns",
    "parents", "config", "parent_config", "ls_integration", "checkpoint_map", "metadata",
}  # fmt: skip


class Failure:
    """An exception that a story ended with, compared by type and message."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Failure) and repr(self) == repr(other)

    def __repr__(self) -> str:
        return f"{type(self.error).__qualname__}({self.error})"

    __hash__ = None  # type: ignore[assignment]


def tried(call: Callable[[], Any]) -> Any:
    """What a call returns, or how it fails."""
    try:
        return call()
    except Exception as error:
        return Failure(error)


async def atried(awaitable: Any) -> Any:
    """What an awaitable gives, or how it fails."""
    try:
        return await awaitable
    except Exception as error:
        return Failure(error)


def _difference(expected: Any, got: Any) -> str:
    lines = [pprint.pformat(value, width=110).split("\n") for value in (expected, got)]
    return "\n".join(difflib.unified_diff(*lines, "plain", "durable", lineterm="", n=2))


async def same(make: Callable[[], Any], story: Story, runtime: Runtime, name: Callable[[], str], **options: Any) -> Any:
    """Play a story with the plain graph and with the durable agent; they must observe the same. Returns that.

    Args:
        make: Makes the graph; called twice.
        story: Is given a graph and a config with a new thread; returns what it has seen. May be async.
    """
    graph = make()
    outcomes = []
    for agent in (
        graph.copy({"checkpointer": InMemorySaver()}),
        durable(make(), name=name(), runtime=runtime, **options),
    ):
        config = {"configurable": {"thread_id": name()}}
        if inspect.iscoroutinefunction(story):
            outcome = await story(agent, config)
        else:
            outcome = await asyncio.to_thread(story, agent, config)
        outcomes.append(plain(outcome))
    expected, got = outcomes
    assert got == expected, _difference(expected, got)
    return got
