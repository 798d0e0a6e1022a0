"""The agent whose runs are in flight while the runtime breaks: turns of one model call and two bookings at once.

The model's script goes by the conversation alone, so whatever is asked again gets the same answer.
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.request import Request, urlopen

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from outlast import Runtime, current_step, durable
from outlast.testing import ChatRequest, Reply, ToolCall

TURNS = 8
ITEMS = ("train", "hotel")
THINKING = 0.25
"""Seconds that the model takes for an answer."""


def script(request: ChatRequest, answered: int) -> Reply:
    """Book two things in each of the turns, then say so."""
    run, turn = of_request(request)
    if turn == TURNS:
        return Reply(f"{run} is booked.", delay=THINKING)
    calls = [ToolCall("book", {"run": run, "turn": turn, "item": item}, id=f"{turn}-{item}") for item in ITEMS]
    return Reply(tool_calls=calls, delay=THINKING)


def of_request(request: ChatRequest) -> tuple[str, int]:
    """Return the run that asks, and how many turns its model has had."""
    messages = request["messages"]
    return messages[0]["content"], sum(message["role"] == "assistant" for message in messages)


def conversation(run: str) -> list[str]:
    """Return the texts of the messages that a run ends with, however it got there."""
    said = [run]
    for turn in range(TURNS):
        said += ["", *(f"booked {item} {turn} of {run}" for item in ITEMS)]
    return [*said, f"{run} is booked."]


@tool
def book(run: str, turn: int, item: str) -> str:
    """Book something."""
    key = current_step().idempotency_key
    body = json.dumps({"run": run, "turn": turn, "item": item, "idempotency_key": key}).encode()
    request = Request(f"{os.environ['LEDGER_URL']}/bookings", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=20) as response:
        response.read()
    return f"booked {item} {turn} of {run}"


def make(runtime: Runtime | None = None) -> Any:
    """Return the durable agent; its model and ledger are those the environment names."""
    model = ChatOpenAI(model="scripted", max_retries=2, timeout=20)
    return durable(create_agent(model, [book]), name="trips", runtime=runtime)


def agent() -> Any:
    """The agent of `outlast worker`."""
    return make()
