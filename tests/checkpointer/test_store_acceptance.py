"""DaprStore from many processes, some of them killed, and inside of graphs; on the embedded sidecar and on daprd."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime as GraphRuntime
from langgraph.store.base import BaseStore, GetOp, ListNamespacesOp, MatchCondition, PutOp, SearchItem, SearchOp

import outlast
from outlast.checkpointer import DaprSaver, DaprStore
from outlast.checkpointer.client import StateClient
from tests.checkpointer.store_writer import NAMESPACE
from tests.harness.procs import Child, wait_for

pytestmark = [pytest.mark.acceptance, pytest.mark.usefixtures("sidecar_env")]


def test_the_whole_surface() -> None:
    store = DaprStore("statestore", index={"dims": 4, "embed": embed, "fields": ["text"]}, ttl={"default_ttl": 60})
    store.batch([PutOp(("docs", "a"), f"k{n}", {"text": f"text {n}", "n": n}) for n in range(130)])
    store.put(("docs", "b"), "large", {"bytes": random.Random(1).randbytes(2_500_000)}, index=False)
    results = DaprStore("statestore").batch(
        [
            GetOp(("docs", "a"), "k7"),
            SearchOp(("docs",), filter={"n": {"$gte": 127}}),
            ListNamespacesOp((MatchCondition("suffix", ("b",)),)),
        ]
    )
    assert results[0].value == {"text": "text 7", "n": 7}
    assert [item.key for item in results[1]] == ["k127", "k128", "k129"]
    assert results[2] == [("docs", "b")]
    assert len(store.get(("docs", "b"), "large").value["bytes"]) == 2_500_000
    best = store.search(("docs", "a"), query="text 77", limit=1)[0]
    assert (best.key, best.score) == ("k77", pytest.approx(1))
    store.delete(("docs", "b"), "large")
    store.put(("docs", "b"), "large", {"n": 1})
    store.delete(("docs", "b"), "large")
    assert store.list_namespaces() == [("docs", "a")]
    store.put(("docs", "a"), "short", {"n": 1}, ttl=0.2 / 60)
    time.sleep(0.3)
    assert store.get(("docs", "a"), "short") is None
    assert store.sweep_ttl() == 1


async def test_the_whole_surface_async() -> None:
    store = DaprStore("statestore", index={"dims": 4, "embed": embed, "fields": ["text"]})
    await store.abatch([PutOp(("docs",), f"k{n}", {"text": f"text {n}", "n": n}) for n in range(20)])
    assert (await store.aget(("docs",), "k7")).value["n"] == 7
    assert [item.key for item in await store.asearch(("docs",), limit=3, offset=2)] == ["k2", "k3", "k4"]
    assert (await store.asearch((), query="text 11", limit=1))[0].key == "k11"
    await store.adelete(("docs",), "k3")
    assert [item.key for item in await store.asearch(("docs",), limit=3, offset=2)] == ["k2", "k4", "k5"]
    assert await store.alist_namespaces(max_depth=1) == [("docs",)]


def embed(texts: list[str]) -> list[list[float]]:
    return [[float(byte) for byte in hashlib.sha256(text.encode()).digest()[:4]] for text in texts]


def test_threads() -> None:
    shared, spaces = DaprStore("statestore"), [("t", "0"), ("t", "1")]

    def work(number: int) -> None:
        store = shared if number % 2 else DaprStore("statestore")
        for turn in range(30):
            store.put(spaces[turn % 2], f"own-{number}-{turn}", {"n": turn})
            store.put(spaces[turn % 2], f"shared-{turn % 3}", {"by": number})
            if turn % 5 == 4:
                store.delete(spaces[turn % 2], f"shared-{turn % 3}")
                store.delete(spaces[turn % 2], f"own-{number}-{turn}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    found = DaprStore("statestore").search(("t",), limit=1000)
    own = {item.key for item in found if item.key.startswith("own")}
    assert own == {f"own-{number}-{turn}" for number in range(8) for turn in range(30) if turn % 5 != 4}
    assert_consistent(found, {(space, f"shared-{n}") for space in spaces for n in range(3)})


def assert_consistent(found: list[SearchItem], refs: set[tuple[tuple[str, ...], str]]) -> None:
    """What can be got is found, and the other way round, each once."""
    store = DaprStore("statestore")
    listed = [(item.namespace, item.key) for item in found]
    assert len(listed) == len(set(listed))
    items = store.batch([GetOp(*ref) for ref in refs])
    assert {ref for ref, item in zip(refs, items, strict=True) if item} == set(listed) & refs


@pytest.mark.kill
def test_writers_in_several_processes_some_of_them_killed(sidecar_env: dict[str, str], tmp_path: Path) -> None:
    chance, log = random.Random(5), tmp_path / "log"

    def writer(name: str, count: int) -> Child:
        arguments = ("tests.checkpointer.store_writer", name, log, str(count))
        return Child.python("-m", *arguments, log=tmp_path / name, env=sidecar_env)

    def lines() -> list[list[str]]:
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def progress(name: str) -> int:
        return sum(1 for word, key in lines() if word == "put" and key.startswith(f"{name}-"))

    lasting = [writer(f"lasting{number}", 40) for number in range(3)]
    for number in range(5):
        with writer(f"victim{number}", 0) as victim:
            name, least = f"victim{number}", chance.randrange(1, 12)
            wait_for(lambda name=name, least=least: progress(name) >= least, 60, lambda: victim.tail())
            time.sleep(chance.random() * 0.02)
            victim.kill()
    for child in lasting:
        child.check(90)
    told: dict[str, set[str]] = {}
    for word, key in lines():
        told.setdefault(word, set()).add(key)
    found = DaprStore("statestore").search(NAMESPACE, limit=10_000)
    keys = {item.key for item in found if item.namespace == NAMESPACE}
    assert keys >= told["put"] - told["doom"], "an acknowledged put is lost"
    assert not keys & told["gone"], "an acknowledged delete is lost"
    assert {f"shared-{number}" for number in range(7)} <= keys
    refs = {(NAMESPACE, key) for key in told["try"]}
    refs |= {((*NAMESPACE, f"room-{int(key.split('-')[1]) % 5}"), key) for key in told["try"]}
    assert_consistent(found, refs)
    assert all(item.value["n"] == int(item.key.split("-")[1]) for item in found if not item.key.startswith("shared"))
    spaces = DaprStore("statestore").list_namespaces(prefix=NAMESPACE)
    assert spaces == [NAMESPACE, *((*NAMESPACE, f"room-{number}") for number in range(5))]


# --- in graphs


class State(TypedDict, total=False):
    heard: str
    known: list[str]


def remember(state: State, config: RunnableConfig, *, store: BaseStore) -> State:
    space = ("memories", config["configurable"]["user"])
    store.put(space, hashlib.sha256(state["heard"].encode()).hexdigest(), {"text": state["heard"]})
    return {}


def recall(state: State, runtime: GraphRuntime, config: RunnableConfig) -> State:
    assert runtime.store is not None
    return {"known": [i.value["text"] for i in runtime.store.search(("memories", config["configurable"]["user"]))]}


async def arecall(state: State, runtime: GraphRuntime, config: RunnableConfig) -> State:
    assert runtime.store is not None
    items = await runtime.store.asearch(("memories", config["configurable"]["user"]))
    return {"known": [item.value["text"] for item in items]}


def build(recaller: Callable[..., Any]) -> StateGraph:
    builder = StateGraph(State)
    builder.add_node("remember", remember)
    builder.add_node("recall", recaller)
    builder.add_edge(START, "remember")
    builder.add_edge("remember", "recall")
    builder.add_edge("recall", END)
    return builder


def config(thread: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread, "user": "u1"}}


def test_in_a_graph() -> None:
    for number, word in enumerate(("one", "two")):
        graph = build(recall).compile(checkpointer=DaprSaver("statestore"), store=DaprStore("statestore"))
        known = graph.invoke({"heard": word}, config(f"t{number}"))["known"]
    assert known == ["one", "two"]


async def test_in_an_async_graph() -> None:
    graph = build(arecall).compile(checkpointer=DaprSaver("statestore"), store=DaprStore("statestore"))
    await graph.ainvoke({"heard": "one"}, config("t1"))
    assert (await graph.ainvoke({"heard": "two"}, config("t2")))["known"] == ["one", "two"]


def test_in_a_durable_graph() -> None:
    runtime = outlast.Runtime("statestore")
    try:
        graph = build(recall).compile(store=DaprStore(client=StateClient("statestore")))
        agent = outlast.durable(graph, name="remembers", runtime=runtime)
        agent.invoke({"heard": "one"}, config("t1"))
        assert agent.invoke({"heard": "two"}, config("t2"))["known"] == ["one", "two"]
    finally:
        runtime.stop()


async def test_in_an_async_durable_graph() -> None:
    runtime = outlast.Runtime("statestore")
    try:
        agent = outlast.durable(
            build(arecall).compile(store=DaprStore("statestore")), name="remembers", runtime=runtime
        )
        await agent.ainvoke({"heard": "one"}, config("t1"))
        assert (await agent.ainvoke({"heard": "two"}, config("t2")))["known"] == ["one", "two"]
    finally:
        runtime.stop()
