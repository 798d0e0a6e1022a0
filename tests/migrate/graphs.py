"""Threads with everything LangGraph leaves in a checkpointer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict


class Ticket(BaseModel):
    """A class that a migration elsewhere cannot import."""

    title: str
    urgent: bool = False


@dataclass
class Spot:
    x: int


class Sub(TypedDict, total=False):
    word: str
    answer: str


class State(TypedDict, total=False):
    messages: Annotated[list[BaseMessage], add_messages]
    words: Annotated[list[str], operator.add]
    ticket: Ticket
    spot: Spot
    blob: bytes
    odd: dict[Any, Any]
    answer: str


def append(state: list[str], writes: Sequence[list[str]]) -> list[str]:
    return [*state, *(item for write in writes for item in write)]


class Deltas(TypedDict):
    items: Annotated[list[str], DeltaChannel(append, snapshot_frequency=3)]


def graph(saver: BaseCheckpointSaver[Any]) -> Any:
    """A graph with a subgraph that asks, parallel nodes, Sends, and one node that fails while the other is done."""

    def ask(state: Sub) -> Sub:
        return {"answer": interrupt(f"what is {state.get('word', '?')}?")}

    sub = StateGraph(Sub)
    sub.add_node("prepare", lambda state: {"word": "tea"})
    sub.add_node("ask", ask)
    sub.add_edge(START, "prepare")
    sub.add_edge("prepare", "ask")

    def reply(state: State) -> State:
        count = len(state["messages"])
        return {
            "messages": [AIMessage(f"answer {count}" + " and more" * 50)],
            "ticket": Ticket(title=f"n. {count}", urgent=count > 2),
            "spot": Spot(count),
            "blob": bytes(range(256)),
            "odd": {1: "one", "größe": {2, 3}, "none": None, "float": 1.5, "deep": [Spot(1), {"t": Ticket(title="x")}]},
        }

    def route(state: State) -> list[Send]:
        return [Send("word", {"word": f"w{number}"}) for number in range(3)]

    def word(state: Any) -> State:
        return {"words": [state["word"]]}

    def fragile(state: State) -> State:
        if str(state["messages"][-2].content if len(state["messages"]) > 1 else "") == "fail":
            raise ValueError("as asked")
        return {"words": ["sturdy"]}

    def choose(state: State) -> str:
        return "sub" if str(state["messages"][-2].content) == "ask" else END

    builder = StateGraph(State)
    builder.add_node("reply", reply)
    builder.add_node("word", word)
    builder.add_node("fragile", fragile)
    builder.add_node("choose", lambda state: {})
    builder.add_node("sub", sub.compile())
    builder.add_edge(START, "reply")
    builder.add_conditional_edges("reply", route, ["word"])
    builder.add_edge("reply", "fragile")
    builder.add_edge("word", "choose")
    builder.add_conditional_edges("choose", choose, ["sub", END])
    return builder.compile(checkpointer=saver)


def deltas(saver: BaseCheckpointSaver[Any]) -> Any:
    """A graph with a delta channel: its values are in the writes, with a snapshot every few steps."""
    builder = StateGraph(Deltas)
    builder.add_node("one", lambda state: {"items": [f"one {len(state['items'])}"]})
    builder.add_node("two", lambda state: {"items": [f"two {len(state['items'])}"]})
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    return builder.compile(checkpointer=saver)


def config(thread_id: str, **more: Any) -> Any:
    return {"configurable": {"thread_id": thread_id}, **more}


def fill(saver: BaseCheckpointSaver[Any]) -> list[str]:
    """Make threads of every sort and return their ids."""
    talk = graph(saver)
    for turn in range(4):
        talk.invoke({"messages": [HumanMessage(f"question {turn}")]}, config("plain", metadata={"run_id": "r1"}))
    talk.invoke({"messages": [HumanMessage("ask")]}, config("asking"))
    talk.invoke({"messages": [HumanMessage("ask")]}, config("answered ❄ /:|"))
    talk.invoke(Command(resume="a drink"), config("answered ❄ /:|"))
    try:
        talk.invoke({"messages": [HumanMessage("fail")]}, config("failed"))
    except ValueError:
        pass
    for turn in range(2):
        talk.invoke({"messages": [HumanMessage(f"question {turn}")]}, config("forked"))
    early = list(talk.get_state_history(config("forked")))[4]
    talk.invoke({"messages": [HumanMessage("another way")]}, early.config)
    edited = talk.update_state(early.config, {"messages": [HumanMessage("edited")]}, as_node="choose")
    talk.invoke({"messages": [HumanMessage("a third way")]}, edited)
    counting = deltas(saver)
    for turn in range(5):
        counting.invoke({"items": [f"turn {turn}"]}, config("deltas"))
    return ["plain", "asking", "answered ❄ /:|", "failed", "forked", "deltas"]


def seen(saver: BaseCheckpointSaver[Any], thread_id: str) -> list[Any]:
    """What LangGraph sees of a thread: its whole history, subgraphs included, and what it would do next."""
    made = deltas(saver) if thread_id == "deltas" else graph(saver)
    history = [
        (
            repr(state.values),
            state.next,
            state.metadata,
            state.created_at,
            state.config["configurable"]["checkpoint_id"],
            state.parent_config["configurable"]["checkpoint_id"] if state.parent_config else None,
            [(task.id, task.name, repr(task.error), repr(task.interrupts), repr(task.result)) for task in state.tasks],
        )
        for state in made.get_state_history(config(thread_id))
    ]
    deep = made.get_state(config(thread_id), subgraphs=True)
    inner = [repr(getattr(task.state, "values", None)) for task in deep.tasks]
    raw = [
        (
            item.config["configurable"].get("checkpoint_ns"),
            item.config["configurable"]["checkpoint_id"],
            [(task_id, channel, repr(value)) for task_id, channel, value in item.pending_writes or ()],
        )
        for item in saver.list(config(thread_id))
    ]
    return [history, inner, sorted(raw)]


def go_on(saver: BaseCheckpointSaver[Any], thread_id: str) -> Any:
    """Let a thread go on and return the state it ends with, without what is random."""
    if thread_id == "deltas":
        return deltas(saver).invoke({"items": ["more"]}, config(thread_id))
    talk = graph(saver)
    if thread_id == "asking":
        result = talk.invoke(Command(resume="a drink"), config(thread_id))
    elif thread_id == "failed":
        talk.update_state(config(thread_id), {"messages": [HumanMessage("sorry")]}, as_node="fragile")
        result = talk.invoke(None, config(thread_id))
    else:
        result = talk.invoke({"messages": [HumanMessage("and now?")]}, config(thread_id))
    return {**result, "messages": [(message.type, message.content) for message in result["messages"]]}
