"""Copying, pruning and deleting threads, also cut short at every request."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from typing_extensions import TypedDict

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import Create, Delete, Save, StateClient, Swap
from outlast.checkpointer.sidecar import Address
from outlast.embedded import EmbeddedSidecar

pytestmark = pytest.mark.timeout(120)


class State(TypedDict):
    messages: Annotated[list[BaseMessage], add_messages]
    note: str


@pytest.fixture
def client(tmp_path: Path) -> Iterator[StateClient]:
    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:
        client = StateClient("statestore", Address("127.0.0.1", sidecar.grpc_port))
        yield client
        client.close()


def talk(saver: DaprSaver, thread_id: str, turns: int, run_id: str = "") -> None:
    """Have a conversation of `turns` turns; its state has a list by segments and a value in a record of its own."""

    def reply(state: State) -> dict[str, Any]:
        count = len(state["messages"])
        return {"messages": [AIMessage(f"answer {count}")], "note": f"{count} " * 6000}

    builder = StateGraph(State)
    builder.add_node("reply", reply)
    builder.add_edge(START, "reply")
    builder.add_edge("reply", END)
    graph = builder.compile(checkpointer=saver)
    config: Any = {"configurable": {"thread_id": thread_id}, "metadata": {"run_id": run_id} if run_id else {}}
    for turn in range(turns):
        graph.invoke({"messages": [("user", f"question {turn}")]}, config)


def contents(saver: DaprSaver, thread_id: str) -> list[Any]:
    """Everything that can be seen of a thread."""
    return [
        (
            item.config["configurable"]["checkpoint_id"],
            item.metadata,
            repr(item.checkpoint),
            repr(item.pending_writes),
        )
        for item in saver.list({"configurable": {"thread_id": thread_id}})
    ]


class _CutShort(Exception):
    pass


def cut(client: StateClient, monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> None:
    """Let the store's `number`-th change from now on fail, before or after it is carried out."""
    perform, count = StateClient._perform, itertools.count()

    def failing(self: StateClient, operation: Any) -> Any:
        if not isinstance(operation, Save | Create | Swap | Delete) or next(count) != number:
            return perform(self, operation)
        if after:
            perform(self, operation)
        raise _CutShort

    monkeypatch.setattr(StateClient, "_perform", failing)


def keys_of(path: Path) -> set[str]:
    """The keys of all records of threads."""
    with sqlite3.connect(path) as database:
        return {row[0] for row in database.execute("SELECT key FROM state WHERE key LIKE 't-%'")}


@pytest.mark.parametrize("action", ["prune", "delete", "copy"])
def test_cut_short_at_every_request_calling_again_completes_it(
    client: StateClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    saver = DaprSaver(client=client)
    talk(saver, "other", 3)
    other = contents(saver, "other")

    def act(thread: str) -> None:
        if action == "prune":
            saver.prune([thread])
        elif action == "delete":
            saver.delete_thread(thread)
        else:
            saver.copy_thread(thread, f"copy of {thread}")

    for number, after in itertools.product(range(50), (False, True)):
        thread = f"{action}-{number}-{after}"
        talk(saver, thread, 12)
        before = contents(saver, thread)
        known = keys_of(tmp_path / "outlast.db")
        with monkeypatch.context() as patched:
            cut(client, patched, number, after)
            try:
                act(thread)
                ended = True
            except _CutShort:
                ended = False
        act(thread)
        if action == "copy":
            assert contents(saver, thread) == before
            assert contents(saver, f"copy of {thread}") == before
        elif action == "prune":
            assert contents(saver, thread) == before[:1]
        else:
            assert contents(saver, thread) == []
            left = keys_of(tmp_path / "outlast.db") - known
            assert not left, "a deletion leaves only the tombstone that was there as the head"
        assert contents(saver, "other") == other
        if ended:
            return
    pytest.fail("never reached the end")


def test_pruning_frees_what_is_not_reached_any_more(client: StateClient, tmp_path: Path) -> None:
    saver = DaprSaver(client=client)
    talk(saver, "fresh", 1)
    few = len(keys_of(tmp_path / "outlast.db"))
    saver.delete_thread("fresh")
    talk(saver, "t", 60)
    assert len(keys_of(tmp_path / "outlast.db")) > 100
    saver.prune(["t"])
    assert len(keys_of(tmp_path / "outlast.db")) <= few + 5


def test_a_pruned_thread_goes_on(client: StateClient) -> None:
    saver = DaprSaver(client=client)
    talk(saver, "t", 40)
    saver.prune(["t"])
    # The saver that remembers segments of before the pruning must not refer to them any more.
    talk(saver, "t", 3)
    state = DaprSaver(client=client).get_tuple({"configurable": {"thread_id": "t"}})
    assert state is not None
    assert len(state.checkpoint["channel_values"]["messages"]) == 86


def test_two_savers_one_prunes_while_the_other_writes(client: StateClient) -> None:
    writer, pruner = DaprSaver(client=client), DaprSaver(client=client)
    for _ in range(5):
        talk(writer, "t", 4)
        pruner.prune(["t"])
    state = DaprSaver(client=client).get_tuple({"configurable": {"thread_id": "t"}})
    assert state is not None
    assert len(state.checkpoint["channel_values"]["messages"]) == 40


def test_runs_are_forgotten_in_all_threads(client: StateClient) -> None:
    saver = DaprSaver(client=client)
    talk(saver, "a", 1, run_id="one")
    talk(saver, "a", 1, run_id="two")
    talk(saver, "b", 1, run_id="one")
    saver.delete_for_runs(["one"])
    assert {item.metadata["run_id"] for item in saver.list({"configurable": {"thread_id": "a"}})} == {"two"}
    assert contents(saver, "b") == []
    state = saver.get_tuple({"configurable": {"thread_id": "a"}})
    assert state is not None
    assert len(state.checkpoint["channel_values"]["messages"]) == 4
