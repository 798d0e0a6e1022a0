"""Steps are found again wherever in a graph they are: in subgraphs, sent tasks, functional entrypoints, loops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

from outlast import RunHandle, durable, step
from outlast.recovery.runtime import Runtime
from tests.journal.conftest import Broken

Names = Callable[[], str]


class State(TypedDict, total=False):
    n: int
    out: Annotated[list[str], operator.add]


class Calls:
    """Steps that are written down, and a node that fails the first time it comes to its end."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.failed: set[str] = set()

    def do(self, what: str) -> str:
        @step(name="do")
        def do(what: str) -> str:
            self.made.append(what)
            return f"{what}#{len(self.made)}"

        return do(what)

    def break_once(self, where: str) -> None:
        if where not in self.failed:
            self.failed.add(where)
            raise Broken(where)


def finish(handle: RunHandle[Any], failures: int) -> Any:
    for _ in range(failures):
        with pytest.raises(Broken):
            handle.result(20)
        handle.retry()
    return handle.result(20)


@pytest.mark.parametrize("keeps", [None, False, True])
def test_a_looping_subgraph_with_and_without_state_of_its_own(
    runtime: Runtime, name: Names, keeps: bool | None
) -> None:
    calls = Calls()

    def inner(state: State) -> State:
        said = calls.do("same")
        calls.break_once(f"inner {state['n']}")
        return {"n": state["n"] + 1, "out": [said]}

    subgraph = StateGraph(State).add_node("inner", inner).add_edge(START, "inner")
    subgraph.add_conditional_edges("inner", lambda state: "inner" if state["n"] % 3 else END)
    compiled = subgraph.compile(checkpointer=keeps)

    def outer(state: State) -> State:
        return {"n": state["n"] + 10, "out": compiled.invoke({"n": state["n"], "out": []})["out"]}

    builder = StateGraph(State).add_node("outer", outer).add_edge(START, "outer")
    builder.add_conditional_edges("outer", lambda state: "outer" if state["n"] < 20 else END)
    handle = durable(builder.compile(), name=name(), runtime=runtime).start({"n": 0, "out": []})
    result = finish(handle, 5)
    # Each round of the inner loop is another step, although they ask for the same.
    assert calls.made == ["same"] * len(calls.made)
    assert len(set(result["out"])) == len(calls.made) == 5
    # With checkpointer=True the second call of the subgraph begins with what the first had said.
    assert list(dict.fromkeys(result["out"])) == [f"same#{number}" for number in range(1, 6)]


def test_sent_tasks(runtime: Runtime, name: Names) -> None:
    calls = Calls()

    def each(state: State) -> State:
        said = calls.do("equal")
        if state["n"] == 1:
            calls.break_once("sent")
        return {"out": [f"{state['n']} {said}"]}

    builder = StateGraph(State).add_node("each", each)
    builder.add_conditional_edges(START, lambda state: [Send("each", {"n": n}) for n in range(3)], ["each"])
    handle = durable(builder.compile(), name=name(), runtime=runtime).start({"n": 0})
    out = finish(handle, 1)["out"]
    assert len(calls.made) == 3
    assert sorted(line.partition(" ")[0] for line in out) == ["0", "1", "2"]


def test_an_entrypoint_and_its_tasks(runtime: Runtime, name: Names) -> None:
    calls = Calls()

    @task
    def work(n: int) -> str:
        said = calls.do(f"in task {n % 2}")
        calls.break_once(f"task {n}")
        return said

    @entrypoint()
    def flow(n: int) -> list[str]:
        first = calls.do("in body")
        found = [work(number).result() for number in range(n)]
        last = calls.do("in body")
        calls.break_once("body")
        return [first, *found, last]

    handle = durable(flow, name=name(), runtime=runtime).start(3)
    assert finish(handle, 4) == ["in body#1", "in task 0#2", "in task 1#3", "in task 0#4", "in body#5"]
    assert len(calls.made) == 5


def test_an_interrupt_between_two_steps(runtime: Runtime, name: Names) -> None:
    calls = Calls()

    def node(state: State) -> State:
        first = calls.do("before")
        answer = interrupt("go on?")
        return {"out": [first, answer, calls.do("after")]}

    graph = StateGraph(State).add_node("node", node).add_edge(START, "node").compile()
    handle = durable(graph, name=name(), runtime=runtime).start({"n": 0})
    assert handle.result(20)["__interrupt__"][0].value == "go on?"
    handle.resume("yes")
    assert handle.result(20)["out"] == ["before#1", "yes", "after#2"]
    assert calls.made == ["before", "after"]


def test_a_loop_in_a_node_and_the_next_superstep(runtime: Runtime, name: Names) -> None:
    calls = Calls()

    def node(state: State) -> Command[str]:
        said = [calls.do("again") for _ in range(2)]
        calls.break_once(str(state["n"]))
        return Command(update={"n": state["n"] + 1, "out": said}, goto="node" if state["n"] < 1 else END)

    graph = StateGraph(State).add_node("node", node).add_edge(START, "node").compile()
    handle = durable(graph, name=name(), runtime=runtime).start({"n": 0})
    assert finish(handle, 2)["out"] == [f"again#{number}" for number in range(1, 5)]
