"""Agents for trials: one that does as it should, and one with a tool that nothing keeps from booking twice."""

from __future__ import annotations

import json
import os
from typing import Any, TypedDict
from urllib.request import Request, urlopen

from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph

from outlast import Policies, RetryPolicy, StepPolicy, current_step, durable
from outlast.testing import Reply, ToolCall, by_turn

REPLIES = [
    Reply(tool_calls=[ToolCall("book", {"what": "train"}), ToolCall("book", {"what": "hotel"})]),
    Reply(tool_calls=[ToolCall("book", {"what": "museum"})]),
    Reply("All is booked."),
]
script = by_turn(REPLIES)


class State(TypedDict, total=False):
    said: str


def _post(booking: dict[str, str]) -> str:
    body = json.dumps(booking).encode()
    request = Request(f"{os.environ['LEDGER_URL']}/bookings", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=20) as response:
        said: str = json.load(response)["id"]
    return said


def careful() -> Any:
    """A LangChain agent that passes idempotency keys on, and has policies for what fails and hangs."""
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    @tool
    def book(what: str) -> str:
        """Book something."""
        _post({"what": what, "idempotency_key": current_step().idempotency_key})
        return f"booked {what}"

    again = RetryPolicy(attempts=5, backoff=0.1)
    return durable(
        create_agent(ChatOpenAI(model="scripted", max_retries=0), [book]),
        name="careful",
        policies=Policies(models=StepPolicy(retry=again), tools=StepPolicy(retry=again, timeout=3)),
    )


def careless() -> Any:
    """A graph of one node that calls one tool, which books without a key, and may take for ever."""

    @tool
    def buy(what: str) -> str:
        """Buy something."""
        _post({"what": what})
        return f"bought {what}"

    def node(state: State) -> State:
        return {"said": buy.invoke({"what": state["said"]})}

    builder = StateGraph(State)
    builder.add_node("node", node).add_edge(START, "node").add_edge("node", END)
    return durable(builder.compile(), name="careless")
