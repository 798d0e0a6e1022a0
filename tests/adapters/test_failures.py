"""A run that fails in the caller's own process fails with the agent's own exception."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph

from outlast import durable
from outlast.recovery.runtime import Runtime


class Odd(Exception):
    """Not an exception that outlast knows."""


class State(TypedDict):
    count: int


def _failing() -> Any:
    def fail(state: State) -> State:
        raise Odd(state["count"])

    return StateGraph(State).add_node("fail", fail).add_edge(START, "fail").compile()


def test_also_a_caller_who_polls_gets_it(
    runtime: Runtime, name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Runtime.settled

    def late(self: Runtime, head: Any) -> None:
        time.sleep(0.5)
        told(self, head)

    # The caller sees the new status in the store before anybody tells it.
    monkeypatch.setattr(Runtime, "settled", late)
    agent = durable(_failing(), name=name(), runtime=runtime)
    with pytest.raises(Odd, match="7"):
        agent.start({"count": 7}, run_id=name()).result(timeout=30)
