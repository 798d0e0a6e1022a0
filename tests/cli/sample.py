"""Agents for the commands to work with.

As a program it submits runs: `python sample.py AGENT/RUN_ID/INPUT … wait`, or `leave` not to wait for them.
"""

from __future__ import annotations

import operator
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from outlast import Budget, durable, step


@dataclass
class Note:
    text: str


class State(TypedDict, total=False):
    todo: str
    notes: Annotated[list[Note], operator.add]


def think(state: State) -> State:
    return {"notes": [Note("thought")]}


def act(state: State) -> State:
    if state["todo"] == "fail":
        raise ValueError("cannot [do] that")
    if state["todo"] == "ask":
        return {"notes": [Note(interrupt("May I?"))]}
    return {"notes": [Note("done")]}


plain = (
    StateGraph(State)
    .add_node("think", think)
    .add_node("act", act)
    .add_edge(START, "think")
    .add_edge("think", "act")
    .add_edge("act", END)
    .compile()
)
agent = durable(plain, name="sample")


def make_agent() -> Any:
    return agent


class Count(TypedDict):
    count: int


def slow(state: Count) -> Count:
    """Half a second, written down when it begins and when it ends."""
    with Path(os.environ["STEPS_LOG"]).open("a") as log:
        log.write(f"begin {state['count']}\n")
        log.flush()
        time.sleep(0.5)
        log.write(f"end {state['count']}\n")
    return {"count": state["count"] + 1}


@durable(name="slow")
def slow_agent() -> Any:
    builder = StateGraph(Count).add_node("slow", slow).add_edge(START, "slow")
    return builder.add_conditional_edges("slow", lambda state: "slow" if state["count"] < 6 else END).compile()


@step
def charge(amount: int) -> str:
    """Charge a customer; written down from outside."""
    _log(f"charge {amount}")
    return f"charged {amount}"


@tool
def look(what: str) -> str:
    """Look something up."""
    _log(f"look {what}")
    return what.upper()


def _log(line: str) -> None:
    with Path(os.environ["STEPS_LOG"]).open("a") as log:
        log.write(line + "\n")


def pay(state: State) -> State:
    said = charge(7)
    if not Path(os.environ["STEPS_LOG"]).with_name("open").exists():
        raise ConnectionError("the shop is closed")
    return {"notes": [Note(said), *(Note(look.invoke({"what": what})) for what in ("a", "b"))]}


paying = durable(
    StateGraph(State).add_node("pay", pay).add_edge(START, "pay").compile(),
    name="paying",
    budget=Budget(tool_calls=1, on_limit="ask"),
)

number = 42

if __name__ == "__main__":
    *submissions, then = sys.argv[1:]
    handles = []
    for submission in submissions:
        name, run_id, given = submission.split("/")
        chosen = {"sample": agent, "slow": slow_agent, "paying": paying}[name]
        first: Any = {"count": int(given)} if name == "slow" else {"todo": given}
        config = {"configurable": {"thread_id": f"thread-of-{run_id}"}}
        handles.append(chosen.start(first, config, run_id=run_id))
        time.sleep(0.002)  # so that they differ in age
    for handle in handles:
        try:
            if then == "wait":
                handle.result(timeout=30)
        except (ValueError, ConnectionError):
            pass
