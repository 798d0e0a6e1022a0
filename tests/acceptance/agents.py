"""The agents that the acceptance tests run. Every node and tool has an effect that is counted outside the process."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import interrupt

from tests.acceptance.points import effect

NODE_OF = {"search": "tools", "price": "tools", "book": "tools"}
"""The node of the effects that are not named for theirs."""


class Trip(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    messages: Annotated[list[AnyMessage], add_messages]
    topic: str
    answer: str


class Notes(TypedDict, total=False):
    topic: str
    scratch: Annotated[list[str], operator.add]


@tool
def search(city: str) -> str:
    """Search a city."""
    effect("search")
    return f"sights of {city}"


@tool
def price(city: str) -> str:
    """Ask for a price."""
    effect("price")
    return f"{len(city) * 100} EUR"


@tool
def book(city: str) -> str:
    """Book a trip."""
    effect("book")
    return f"booked {city}"


def _either(function: Callable[[Any], Any], is_async: bool) -> Any:
    """The same node, sync or async."""
    if not is_async:
        return function

    async def node(state: Any) -> Any:
        return function(state)

    return node


def trip(is_async: bool = False) -> Any:
    """The reference agent: parallel nodes, a subgraph with a state of its own, an interrupt, three tools."""

    def plan(state: Trip) -> Any:
        effect("plan")
        return {"log": ["plan"], "topic": "Rome"}

    def left(state: Trip) -> Any:
        effect("left")
        return {"log": ["left"]}

    def right(state: Trip) -> Any:
        effect("right")
        return {"log": ["right"]}

    def inner_first(state: Notes) -> Any:
        effect("inner_first")
        return {"scratch": [state["topic"]]}

    def inner_second(state: Notes) -> Any:
        effect("inner_second")
        return {"topic": f"{state['scratch'][-1]} in May"}

    def ask(state: Trip) -> Any:
        answer = interrupt({"book": state["topic"]})
        effect("ask")
        return {"answer": answer, "log": ["ask"]}

    def model(state: Trip) -> Any:
        effect("model")
        calls = [{"name": name, "args": {"city": "Rome"}, "id": f"call-{name}"} for name in ("search", "price", "book")]
        return {"messages": [AIMessage("tools!", id="model", tool_calls=calls)], "log": ["model"]}

    def finish(state: Trip) -> Any:
        effect("finish")
        results = [message.content for message in state["messages"] if isinstance(message, ToolMessage)]
        return {"log": ["finish", *map(str, results)]}

    inner = StateGraph(Notes)
    inner.add_node("inner_first", _either(inner_first, is_async))
    inner.add_node("inner_second", _either(inner_second, is_async))
    inner.add_edge(START, "inner_first").add_edge("inner_first", "inner_second").add_edge("inner_second", END)

    builder = StateGraph(Trip)
    for function in (plan, left, right, ask, model, finish):
        builder.add_node(function.__name__, _either(function, is_async))
    builder.add_node("inner", inner.compile()).add_node("tools", ToolNode([search, price, book]))
    builder.add_edge(START, "plan").add_edge("plan", "left").add_edge("plan", "right")
    builder.add_edge(["left", "right"], "inner").add_edge("inner", "ask").add_edge("ask", "model")
    builder.add_edge("model", "tools").add_edge("tools", "finish").add_edge("finish", END)
    return builder.compile()


class Line(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


def line(names: list[str]) -> Any:
    """A graph of nodes in a line. Each node's effect is `<first entry of the log>:<name>`."""
    builder = StateGraph(Line)
    before = START
    for name in names:

        def node(state: Line, name: str = name) -> Any:
            effect(f"{state['log'][0]}:{name}")
            return {"log": [name]}

        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    builder.add_edge(before, END)
    return builder.compile()


def endless() -> Any:
    """A graph that never ends by itself. Each round has an effect of its own."""

    def again(state: Line) -> Any:
        effect(f"round-{len(state['log'])}")
        return {"log": ["again"]}

    builder = StateGraph(Line)
    builder.add_node("again", again).add_edge(START, "again").add_edge("again", "again")
    return builder.compile()


def questions(count: int) -> Any:
    """A graph that asks `count` questions, one superstep each."""

    def ask(state: Line) -> Any:
        answer = interrupt(len(state["log"]))
        effect(f"{state['log'][0]}:answer-{answer}")
        return {"log": [answer]}

    def again(state: Line) -> str:
        return "ask" if len(state["log"]) <= count else END

    builder = StateGraph(Line)
    builder.add_node("ask", ask).add_edge(START, "ask").add_conditional_edges("ask", again, ["ask", END])
    return builder.compile()
