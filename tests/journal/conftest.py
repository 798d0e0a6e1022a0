"""Runs that fail once in the middle and are tried again: what was recorded must not be done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph

from outlast import RunHandle, durable
from outlast.recovery.runtime import Runtime
from tests.adapters import conftest as shared

runtime, name = shared.runtime, shared.name


class State(TypedDict, total=False):
    given: Any
    out: Any


class Broken(Exception):
    """What a node fails with after its work is done."""


Twice = Callable[..., Any]


def one_node(body: Callable[..., Any]) -> Any:
    return StateGraph(State).add_node("node", body).add_edge(START, "node").compile()


@pytest.fixture
def twice(runtime: Runtime, name: Callable[[], str]) -> Twice:
    """Runs a node's body, lets the node fail after it, and tries the run again: returns what both times came to."""

    def run(body: Callable[[Any], Any], given: Any = None, **options: Any) -> tuple[Any, Any, RunHandle[Any]]:
        seen: list[Any] = []

        def node(state: State) -> State:
            seen.append(body(state.get("given")))
            if len(seen) == 1:
                raise Broken
            return {"out": seen[-1]}

        handle = durable(one_node(node), name=name(), runtime=runtime, **options).start({"given": given})
        with pytest.raises(Broken):
            handle.result(20)
        handle.retry()
        handle.result(20)
        first, second = seen
        return first, second, handle

    return run


@pytest.fixture
def atwice(runtime: Runtime, name: Callable[[], str]) -> Twice:
    """The same with an async node."""

    async def run(body: Callable[[Any], Any], given: Any = None, **options: Any) -> tuple[Any, Any, RunHandle[Any]]:
        seen: list[Any] = []

        async def node(state: State) -> State:
            seen.append(await body(state.get("given")))
            if len(seen) == 1:
                raise Broken
            return {"out": seen[-1]}

        handle = await durable(one_node(node), name=name(), runtime=runtime, **options).astart({"given": given})
        with pytest.raises(Broken):
            await handle.aresult(20)
        handle.retry()
        await handle.aresult(20)
        first, second = seen
        return first, second, handle

    return run
