"""LangGraph itself cannot tell: results, histories and pending writes as with LangGraph's own SQLite saver."""

from __future__ import annotations

import operator
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage
from langchain_core.tools import tool
from langgraph.channels import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import StateClient
from outlast.checkpointer.sidecar import Address
from outlast.embedded import EmbeddedSidecar
from tests.adapters.same import plain, tried

Saver = BaseCheckpointSaver[Any]
Story = Callable[[Saver, str], Any]


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    messages: Annotated[list[BaseMessage], add_messages]
    note: str


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateClient]:
    with EmbeddedSidecar(tmp_path_factory.mktemp("sidecar") / "outlast.db") as sidecar:
        made = StateClient("statestore", Address("127.0.0.1", sidecar.grpc_port))
        yield made
        made.close()


def _config(**more: Any) -> Any:
    return {"configurable": {"thread_id": "t", **more}}


def _line(*nodes: str) -> StateGraph[Any, Any, Any, Any]:
    """A graph of nodes that log their names, one after another."""
    builder = StateGraph(State)
    for before, name in zip((START, *nodes), nodes, strict=False):
        builder.add_node(name, lambda state, name=name: {"log": [name]})
        builder.add_edge(before, name)
    builder.add_edge(nodes[-1], END)
    return builder


def subgraphs(saver: Saver, durability: Any) -> Any:
    def ask(state: State) -> State:
        return {"log": [interrupt("inside?")]}

    inner = StateGraph(State)
    inner.add_node("first", lambda state: {"log": ["inner"], "note": "own"})
    inner.add_node("ask", ask)
    inner.add_edge(START, "first")
    inner.add_edge("first", "ask")
    kept = inner.compile(checkpointer=True)
    outer = StateGraph(State)
    outer.add_node("before", lambda state: {"log": ["outer"]})
    outer.add_node("plain", inner.compile())
    outer.add_node("kept", kept)
    for edge in ((START, "before"), ("before", "plain"), ("plain", "kept"), ("kept", END)):
        outer.add_edge(*edge)
    graph = outer.compile(checkpointer=saver)
    seen = [graph.invoke({"log": ["in"]}, _config(), durability=durability)]
    seen.append(graph.get_state(_config(), subgraphs=True))
    seen += [graph.invoke(Command(resume=answer), _config(), durability=durability) for answer in ("one", "two")]
    seen.append(graph.invoke({"log": ["again"]}, _config(), durability=durability))
    return graph, seen


def sends(saver: Saver, durability: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("fan", lambda state: {"log": ["fan"]})
    builder.add_node("part", lambda state: {"log": [f"part {state['note']}"]})
    builder.add_node("go", lambda state: Command(goto="last", update={"log": ["go"]}))
    builder.add_node("last", lambda state: {"note": "end"})
    builder.add_edge(START, "fan")
    builder.add_conditional_edges("fan", lambda state: [Send("part", {"note": str(n)}) for n in range(4)], ["part"])
    builder.add_edge("part", "go")
    graph = builder.compile(checkpointer=saver)
    return graph, [graph.invoke({"log": []}, _config(), durability=durability)]


def time_travel(saver: Saver, durability: Any) -> Any:
    graph = _line("a", "b", "c").compile(checkpointer=saver)
    seen: list[Any] = [graph.invoke({"log": ["in"]}, _config(), durability=durability)]
    past = [state for state in graph.get_state_history(_config()) if state.next == ("b",)]
    if past:
        seen.append(graph.invoke(None, past[0].config, durability=durability))
        fork = graph.update_state(past[0].config, {"log": ["forked"]}, as_node="a")
        seen.append(graph.invoke(None, fork, durability=durability))
    graph.update_state(_config(), {"log": ["by hand"]}, as_node="c")
    seen.append(graph.get_state(_config()))
    seen.append(graph.invoke({"log": ["once more"]}, _config(), durability=durability))
    return graph, seen


def interrupts(saver: Saver, durability: Any) -> Any:
    def twice(state: State) -> State:
        return {"log": [interrupt("one?"), interrupt("two?")]}

    builder = StateGraph(State)
    builder.add_node("twice", twice)
    builder.add_node("once", lambda state: {"log": [interrupt("three?")]})
    builder.add_node("quick", lambda state: {"log": ["quick"]})
    for name in ("twice", "once", "quick"):
        builder.add_edge(START, name)
    graph = builder.compile(checkpointer=saver)
    seen = [graph.invoke({"log": []}, _config(), durability=durability)]
    for answer in ("A", "B"):
        asked = {item.id: f"{answer} to {item.value}" for item in graph.get_state(_config()).interrupts}
        seen.append(graph.invoke(Command(resume=asked), _config(), durability=durability))
    for state in seen:
        # Parallel nodes ask in the order in which they happen to get there.
        state.get("__interrupt__", []).sort(key=lambda item: item.value)
    return graph, seen


def failures(saver: Saver, durability: Any) -> Any:
    calls: list[str] = []

    def shaky(state: State) -> State:
        calls.append("call")
        if len(calls) == 1:
            raise ValueError("first time")
        return {"log": ["steady"]}

    builder = _line("a")
    builder.add_node("shaky", shaky)
    builder.add_node("beside", lambda state: {"log": ["beside"]})
    builder.add_edge("a", "shaky")
    builder.add_edge("a", "beside")
    graph = builder.compile(checkpointer=saver)
    seen = [tried(lambda: graph.invoke({"log": []}, _config(), durability=durability)), graph.get_state(_config())]
    seen.append(tried(lambda: graph.invoke(None, _config(), durability=durability)))
    return graph, seen


def functional(saver: Saver, durability: Any) -> Any:
    @task
    def double(number: int) -> int:
        return number * 2

    @entrypoint(checkpointer=saver)
    def flow(number: int, *, previous: Any = None) -> Any:
        doubled = [future.result() for future in [double(number), double(number + 1)]]
        answer = interrupt("sure?")
        return entrypoint.final(value=[doubled, answer, previous], save=sum(doubled))

    seen = []
    for number in (1, 5):
        seen.append(flow.invoke(number, _config(), durability=durability))
        seen.append(flow.invoke(Command(resume="yes"), _config(), durability=durability))
    return flow, seen


def messages(saver: Saver, durability: Any) -> Any:
    def edit(state: State) -> Any:
        known = state["messages"]
        return {"messages": [RemoveMessage(id=known[0].id or ""), HumanMessage("edited", id=known[1].id)]}

    builder = StateGraph(State)
    builder.add_node("reply", lambda state: {"messages": [AIMessage(f"answer {len(state['messages'])}")]})
    builder.add_edge(START, "reply")
    editing = StateGraph(State)
    editing.add_node("edit", edit)
    editing.add_edge(START, "edit")
    graph = builder.compile(checkpointer=saver)
    seen = [
        graph.invoke({"messages": [("user", f"question {turn}")]}, _config(), durability=durability)
        for turn in range(25)
    ]
    seen.append(editing.compile(checkpointer=saver).invoke({"log": []}, _config(), durability=durability))
    seen.append(graph.invoke({"messages": [("user", "and then?")]}, _config(), durability=durability))
    return graph, seen


class Deltas(TypedDict, total=False):
    log: Annotated[list[str], DeltaChannel(lambda state, writes: state + [x for w in writes for x in w])]


def delta_channels(saver: Saver, durability: Any) -> Any:
    builder = StateGraph(Deltas)
    builder.add_node("a", lambda state: {"log": [f"a{len(state['log'])}"]})
    builder.add_node("b", lambda state: {"log": ["b"]})
    builder.add_node("c", lambda state: {"log": ["c"]})
    for edge in ((START, "a"), ("a", "b"), ("a", "c")):
        builder.add_edge(*edge)
    graph = builder.compile(checkpointer=saver)
    seen = [graph.invoke({"log": [f"in {turn}"]}, _config(), durability=durability) for turn in range(6)]
    return graph, seen


def prebuilt(saver: Saver, durability: Any) -> Any:
    from langchain.agents import create_agent

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sun in {city}"

    class Model(GenericFakeChatModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self

    calls = [{"name": "weather", "args": {"city": city}, "id": f"call-{city}"} for city in ("Rome", "Oslo")]
    model = Model(messages=iter([AIMessage("", tool_calls=calls), AIMessage("fine"), AIMessage("still fine")]))
    graph = create_agent(model, [weather], checkpointer=saver)
    seen = [
        graph.invoke({"messages": [("user", text)]}, _config(), durability=durability) for text in ("?", "and now?")
    ]
    return graph, seen


STORIES = [subgraphs, sends, time_travel, interrupts, failures, functional, messages, delta_channels, prebuilt]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_langgraph_cannot_tell(client: StateClient, tmp_path: Path, story: Story, durability: str) -> None:
    with sqlite3.connect(tmp_path / "reference.db", check_same_thread=False) as database:
        expected = _observed(SqliteSaver(database), story, durability)
    saver = DaprSaver(client=client)
    saver.delete_thread("t")
    assert _observed(saver, story, durability) == expected


def _observed(saver: Saver, story: Story, durability: str) -> Any:
    """All that a story shows: its results, the history of its thread, and what is stored of it in every namespace."""
    graph, seen = story(saver, durability)
    history = [_state(state) for state in graph.get_state_history(_config())]
    stored = sorted(_stored(item) for item in saver.list(_config()))
    return plain(seen), plain(history), stored


def _state(state: Any) -> Any:
    return plain(state), bool(state.parent_config), len(state.tasks)


def _stored(item: Any) -> str:
    """A checkpoint without its ids and versions, whose form is each saver's own."""
    writes = sorted(repr((channel, plain(value))) for _, channel, value in item.pending_writes or ())
    namespace = [part.split(":")[0] for part in item.config["configurable"]["checkpoint_ns"].split("|")]
    metadata = {key: value for key, value in item.metadata.items() if key in ("source", "step")}
    values = {key: plain(value) for key, value in sorted(item.checkpoint["channel_values"].items())}
    return repr((namespace, metadata, values, writes, bool(item.parent_config)))
