"""Every feature of LangGraph gives the same in a durable run as in the plain graph, because LangGraph itself runs."""

from __future__ import annotations

import asyncio
import operator
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.config import get_store, get_stream_writer
from langgraph.errors import GraphRecursionError
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime as GraphRuntime
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

from outlast import SerializationError, durable
from outlast.checkpointer import keys
from outlast.checkpointer.client import Get
from outlast.checkpointer.thread import ThreadLog
from outlast.recovery.runtime import Runtime
from tests.adapters.same import Failure, same, tried

Name = Callable[[], str]
Config = dict[str, Any]


class State(TypedDict, total=False):
    log: Annotated[list[Any], operator.add]
    value: Any


def add(entry: Any) -> Callable[[State], State]:
    return lambda _: {"log": [entry]}


def chain(**nodes: Any) -> StateGraph[Any, Any, Any, Any]:
    """A graph of nodes one after another."""
    builder = StateGraph(State)
    before = START
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    builder.add_edge(before, END)
    return builder


def history(agent: Any, config: Config) -> list[Any]:
    return list(agent.get_state_history(config))


# --- subgraphs


def inner(checkpointer: Any = None) -> Any:
    class Own(TypedDict, total=False):
        value: Any
        scratch: Annotated[list[int], operator.add]

    def first(state: Own) -> Own:
        return {"scratch": [len(state.get("scratch", []))]}

    def second(state: Own) -> Own:
        return {"value": [state.get("value"), state["scratch"]], "scratch": [-1]}

    builder = StateGraph(Own).add_node("first", first).add_node("second", second)
    builder.add_edge(START, "first").add_edge("first", "second").add_edge("second", END)
    return builder.compile(checkpointer=checkpointer)


@pytest.mark.parametrize("checkpointer", [None, True, False])
async def test_subgraphs(runtime: Runtime, name: Name, checkpointer: Any) -> None:
    def story(agent: Any, config: Config) -> Any:
        runs = [agent.invoke({"log": ["in"]}, config) for _ in range(2)]
        return runs, history(agent, config)

    got = await same(lambda: chain(a=add("a"), sub=inner(checkpointer), b=add("b")).compile(), story, runtime, name)
    assert got[0][0]["log"] == ["in", "a", "b"]


async def test_a_subgraph_called_in_a_node(runtime: Runtime, name: Name) -> None:
    sub = inner()

    def node(state: State) -> State:
        return {"value": sub.invoke({"value": "called"})["value"]}

    await same(lambda: chain(node=node).compile(), lambda agent, config: agent.invoke({}, config), runtime, name)


async def test_the_state_of_a_subgraph_that_waits(runtime: Runtime, name: Name) -> None:
    def ask(state: State) -> State:
        return {"value": interrupt("which?")}

    def story(agent: Any, config: Config) -> Any:
        first = agent.invoke({"log": ["in"]}, config)
        state = agent.get_state(config, subgraphs=True)
        within = state.tasks[0].state
        return first, state, within, agent.invoke(Command(resume="this"), config), history(agent, config)

    got = await same(lambda: chain(sub=chain(ask=ask).compile(), b=add("b")).compile(), story, runtime, name)
    assert got[2]["next"] == ["ask"]
    assert got[3]["value"] == "this"


# --- control flow


async def test_send_and_a_deferred_node(runtime: Runtime, name: Name) -> None:
    def make() -> Any:
        builder = StateGraph(State)
        builder.add_node("work", lambda item: {"log": [item["value"] * 10]})
        builder.add_node("gather", lambda state: {"value": sorted(state["log"])}, defer=True)
        builder.add_conditional_edges(START, lambda _: [Send("work", {"value": n}) for n in range(5)], ["work"])
        builder.add_edge("work", "gather").add_edge("gather", END)
        return builder.compile()

    got = await same(make, lambda agent, config: agent.invoke({"log": []}, config), runtime, name)
    assert got["value"] == [0, 10, 20, 30, 40]


async def test_goto_and_goto_of_the_parent(runtime: Runtime, name: Name) -> None:
    def hop(state: State) -> Command[Literal["far", "near"]]:
        return Command(update={"log": ["hop"]}, goto=["far", Send("near", {"value": "sent"})])

    def leap(state: State) -> Command[Any]:
        return Command(graph=Command.PARENT, update={"log": ["leap"]}, goto="last")

    def make() -> Any:
        builder = StateGraph(State)
        builder.add_node("hop", hop).add_node("near", lambda item: {"log": [item["value"]]})
        builder.add_node("far", chain(leap=leap).compile(), destinations=("last",)).add_node("last", add("last"))
        builder.add_edge(START, "hop")
        return builder.compile()

    got = await same(
        make, lambda agent, config: (agent.invoke({"log": []}, config), history(agent, config)), runtime, name
    )
    assert got[0]["log"].count("leap") == 1
    assert got[0]["log"][-1] == "last"


async def test_the_recursion_limit(runtime: Runtime, name: Name) -> None:
    def make() -> Any:
        builder = StateGraph(State).add_node("again", add(1)).add_edge(START, "again").add_edge("again", "again")
        return builder.compile()

    def story(agent: Any, config: Config) -> Any:
        failure = tried(lambda: agent.invoke({"log": []}, {**config, "recursion_limit": 7}))
        assert isinstance(failure, Failure)
        assert isinstance(failure.error, GraphRecursionError)
        return len(agent.get_state(config).values["log"]), agent.get_state(config)

    got = await same(make, story, runtime, name)
    assert got[0] == 7


# --- interrupts


async def test_one_interrupt(runtime: Runtime, name: Name) -> None:
    def ask(state: State) -> State:
        return {"log": [interrupt({"question": 1})]}

    def story(agent: Any, config: Config) -> Any:
        return (
            agent.invoke({"log": ["in"]}, config),
            agent.get_state(config),
            agent.invoke(Command(resume={"any": "answer"}), config),
            history(agent, config),
        )

    await same(lambda: chain(a=add("a"), ask=ask, b=add("b")).compile(), story, runtime, name)


async def test_parallel_interrupts_answered_by_id(runtime: Runtime, name: Name) -> None:
    def make() -> Any:
        builder = StateGraph(State)
        for each in ("x", "y", "z"):
            builder.add_node(each, lambda _, each=each: {"log": [f"{each}={interrupt(each)}"]})
            builder.add_edge(START, each).add_edge(each, END)
        return builder.compile()

    def story(agent: Any, config: Config) -> Any:
        out = agent.invoke({"log": []}, config)
        ids = {item.value: item.id for item in out["__interrupt__"]}
        some = agent.invoke(Command(resume={ids["x"]: 1, ids["z"]: 3}), config)
        last = agent.invoke(Command(resume={ids["y"]: 2}), config)
        return sorted(ids), some, last, len(history(agent, config))

    got = await same(make, story, runtime, name)
    assert got[2]["log"] == ["x=1", "y=2", "z=3"]


async def test_two_interrupts_in_one_node(runtime: Runtime, name: Name) -> None:
    calls: Counter[str] = Counter()

    def ask(state: State) -> State:
        calls["begun"] += 1
        one = interrupt("one")
        two = interrupt("two")
        return {"log": [one, two]}

    def story(agent: Any, config: Config) -> Any:
        calls.clear()
        outs = [agent.invoke({"log": []}, config)]
        outs += [agent.invoke(Command(resume=answer), config) for answer in ("first", "second")]
        return outs, calls["begun"]

    got = await same(lambda: chain(ask=ask).compile(), story, runtime, name)
    assert got[0][2]["log"] == ["first", "second"]


async def test_falsy_answers(runtime: Runtime, name: Name) -> None:
    def ask(state: State) -> State:
        return {"log": [interrupt("?")]}

    def story(agent: Any, config: Config) -> Any:
        outs = [agent.invoke({"log": []}, config)]
        return outs + [agent.invoke(Command(resume=answer), config) for answer in (False, 0, "", [])]

    await same(lambda: chain(a=ask, b=ask, c=ask, d=ask).compile(), story, runtime, name)


async def test_resume_with_update_and_goto(runtime: Runtime, name: Name) -> None:
    def ask(state: State) -> State:
        return {"log": [interrupt("?")]}

    def story(agent: Any, config: Config) -> Any:
        agent.invoke({"log": []}, config)
        return agent.invoke(Command(resume="yes", update={"value": 7}), config), history(agent, config)

    await same(lambda: chain(ask=ask, b=add("b")).compile(), story, runtime, name)


async def test_static_breakpoints(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        seen = [agent.invoke({"log": ["in"]}, config), agent.get_state(config)]
        for _ in range(2):
            seen += [agent.invoke(None, config), agent.get_state(config)]
        return seen, history(agent, config)

    def make() -> Any:
        return chain(a=add("a"), b=add("b"), c=add("c")).compile(interrupt_before=["b"], interrupt_after=["b"])

    got = await same(make, story, runtime, name)
    assert got[0][-2]["log"] == ["in", "a", "b", "c"]


async def test_breakpoints_given_to_the_call(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        return (
            agent.invoke({"log": []}, config, interrupt_before=["b"]),
            agent.get_state(config),
            agent.invoke(None, config, interrupt_after=["b"]),
            agent.get_state(config),
            agent.invoke(None, config),
        )

    await same(lambda: chain(a=add("a"), b=add("b"), c=add("c")).compile(), story, runtime, name)


# --- what nodes are given


@dataclass
class Context:
    user: str


async def test_context(runtime: Runtime, name: Name) -> None:
    def node(state: State, runtime: GraphRuntime[Context]) -> State:
        return {"log": [runtime.context.user]}

    def make() -> Any:
        builder = StateGraph(State, context_schema=Context).add_node("node", node).add_edge(START, "node")
        return builder.compile()

    got = await same(
        make, lambda agent, config: agent.invoke({"log": []}, config, context=Context("Ada")), runtime, name
    )
    assert got["log"] == ["Ada"]


async def test_configurable_and_metadata(runtime: Runtime, name: Name) -> None:
    def node(state: State, config: RunnableConfig) -> State:
        found = config["configurable"], config["metadata"]
        return {"log": [found[0]["color"], found[1]["team"], sorted(config["tags"])]}

    def story(agent: Any, config: Config) -> Any:
        config["configurable"]["color"] = "red"
        return agent.invoke({"log": []}, {**config, "metadata": {"team": "x"}, "tags": ["t"]})

    await same(lambda: chain(node=node).compile(), story, runtime, name)


async def test_store_and_cache(runtime: Runtime, name: Name) -> None:
    calls: Counter[str] = Counter()

    def remember(state: State) -> State:
        store = get_store()
        item = store.get(("seen",), "count")
        count = (item.value["n"] if item else 0) + 1
        store.put(("seen",), "count", {"n": count})
        return {"log": [count]}

    def costly(state: State) -> State:
        calls["costly"] += 1
        return {"value": "costly"}

    def make() -> Any:
        builder = StateGraph(State).add_node("remember", remember)
        builder.add_node("costly", costly, cache_policy=CachePolicy(key_func=lambda _: "key"))
        builder.add_edge(START, "remember").add_edge("remember", "costly")
        return builder.compile(store=InMemoryStore(), cache=InMemoryCache())

    def story(agent: Any, config: Config) -> Any:
        calls.clear()
        return [agent.invoke({"log": []}, config) for _ in range(3)], calls["costly"]

    got = await same(make, story, runtime, name)
    assert got[0][-1]["log"] == [1, 2, 3]
    assert got[1] == 1


async def test_retry_policy(runtime: Runtime, name: Name) -> None:
    calls: Counter[str] = Counter()

    def flaky(state: State) -> State:
        calls["flaky"] += 1
        if calls["flaky"] < 3:
            raise ConnectionError("not yet")
        return {"log": ["at last"]}

    def make() -> Any:
        policy = RetryPolicy(max_attempts=5, initial_interval=0.001, jitter=False)
        builder = StateGraph(State).add_node("flaky", flaky, retry_policy=policy).add_edge(START, "flaky")
        return builder.compile()

    def story(agent: Any, config: Config) -> Any:
        calls.clear()
        return agent.invoke({"log": []}, config), calls["flaky"]

    assert (await same(make, story, runtime, name))[1] == 3


async def test_error_handler(runtime: Runtime, name: Name) -> None:
    def broken(state: State) -> State:
        raise ValueError("broken")

    def handler(state: State) -> State:
        return {"log": ["handled"]}

    def make() -> Any:
        builder = StateGraph(State).add_node("broken", broken, error_handler=handler)
        builder.add_node("after", add("after")).add_edge(START, "broken").add_edge("broken", "after")
        return builder.compile()

    await same(make, lambda agent, config: tried(lambda: agent.invoke({"log": []}, config)), runtime, name)


class OwnError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_exception_of_a_node_is_raised_as_it_is(runtime: Runtime, name: Name, is_async: bool) -> None:
    def broken(state: State) -> State:
        raise OwnError(42)

    async def abroken(state: State) -> State:
        raise OwnError(42)

    agent = durable(chain(a=add("a"), broken=abroken if is_async else broken).compile(), name=name(), runtime=runtime)
    config = {"configurable": {"thread_id": name()}}
    with pytest.raises(OwnError) as caught:
        await (agent.ainvoke({"log": []}, config) if is_async else asyncio.to_thread(agent.invoke, {"log": []}, config))
    assert caught.value.code == 42


async def test_a_failed_node_can_be_tried_again_by_invoking_without_input(runtime: Runtime, name: Name) -> None:
    calls: Counter[str] = Counter()

    def flaky(state: State) -> State:
        calls["flaky"] += 1
        if calls["flaky"] == 1:
            raise ValueError("once")
        return {"log": ["flaky"]}

    def story(agent: Any, config: Config) -> Any:
        calls.clear()
        return (
            tried(lambda: agent.invoke({"log": []}, config)),
            agent.get_state(config).next,
            agent.invoke(None, config),
            calls["flaky"],
        )

    got = await same(lambda: chain(a=add("a"), flaky=flaky, b=add("b")).compile(), story, runtime, name)
    assert got[2]["log"] == ["a", "flaky", "b"]


async def test_a_failing_router_loses_nothing_on_resume(runtime: Runtime, name: Name) -> None:
    """LangGraph issue 8834: plain LangGraph returns normally from the resume, and the node downstream is lost."""
    calls: Counter[str] = Counter()

    def route(state: State) -> str:
        calls["route"] += 1
        if calls["route"] == 1:
            raise ValueError("router")
        return "down"

    builder = StateGraph(State).add_node("up", add("up")).add_node("down", add("down"))
    builder.add_edge(START, "up").add_conditional_edges("up", route, ["down"]).add_edge("down", END)
    agent = durable(builder.compile(), name=name(), runtime=runtime)
    config = {"configurable": {"thread_id": name()}}
    with pytest.raises(ValueError, match="router"):
        await asyncio.to_thread(agent.invoke, {"log": []}, config)
    assert await asyncio.to_thread(agent.invoke, None, config) == {"log": ["up", "down"]}


# --- functional API


async def test_entrypoint_task_and_previous(runtime: Runtime, name: Name) -> None:
    calls: Counter[str] = Counter()

    def make() -> Any:
        @task
        def double(number: int) -> int:
            calls["double"] += 1
            return number * 2

        @entrypoint()
        def flow(number: int, *, previous: Any = None) -> Any:
            doubled = [double(n).result() for n in range(number)]
            extra = interrupt("more?")
            return entrypoint.final(value=[doubled, extra, previous], save=sum(doubled))

        return flow

    def story(agent: Any, config: Config) -> Any:
        calls.clear()
        seen = []
        for number in (3, 4):
            seen += [agent.invoke(number, config), agent.invoke(Command(resume="x"), config)]
        return seen, calls["double"]

    got = await same(make, story, runtime, name)
    assert got[0][-1] == [[0, 2, 4, 6], "x", 6]
    assert got[1] == 7


async def test_an_async_entrypoint(runtime: Runtime, name: Name) -> None:
    def make() -> Any:
        @task
        async def double(number: int) -> int:
            return number * 2

        @entrypoint()
        async def flow(number: int) -> Any:
            return await asyncio.gather(*(double(n) for n in range(number)))

        return flow

    async def story(agent: Any, config: Config) -> Any:
        return await agent.ainvoke(4, config)

    assert await same(make, story, runtime, name) == [0, 2, 4, 6]


# --- agents


@tool
def weather(city: str) -> str:
    """The weather."""
    return f"sun in {city}"


@tool
def clock(city: str) -> str:
    """The time."""
    return f"noon in {city}"


class Model(BaseChatModel):
    """Calls both tools, then answers."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self

    def _generate(self, messages: list[Any], *_: Any, **__: Any) -> ChatResult:
        if messages[-1].type == "tool":
            answer = AIMessage("sunny")
        else:
            calls = [{"name": each, "args": {"city": "Rome"}, "id": f"call-{each}"} for each in ("weather", "clock")]
            answer = AIMessage("let me see", tool_calls=calls)
        return ChatResult(generations=[ChatGeneration(message=answer)])


def _create_agent() -> Any:
    from langchain.agents import create_agent

    return create_agent(Model(), [weather, clock])


async def test_create_agent(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        return agent.invoke({"messages": [HumanMessage("how is it?")]}, config), history(agent, config)

    got = await same(_create_agent, story, runtime, name)
    assert [message[0] for message in got[0]["messages"]] == ["human", "ai", "tool", "tool", "ai"]


# --- streams


def _talkative() -> Any:
    def a(state: State) -> State:
        get_stream_writer()({"from": "a"})
        return {"log": ["a"]}

    def within(state: State) -> State:
        get_stream_writer()("from within")
        return {"log": ["within"]}

    class Sub(TypedDict, total=False):
        value: Any

    sub = StateGraph(Sub).add_node("s", lambda _: {"value": "s"}).add_edge(START, "s").compile()
    return chain(a=a, within=within, sub=sub, b=add("b")).compile()


@pytest.mark.parametrize("subgraphs", [False, True])
@pytest.mark.parametrize(
    "mode", [None, "values", "updates", "custom", "tasks", "checkpoints", "debug", ["updates", "values", "custom"], []]
)
async def test_stream_modes(runtime: Runtime, name: Name, mode: Any, subgraphs: bool) -> None:
    def story(agent: Any, config: Config) -> Any:
        return list(agent.stream({"log": ["in"]}, config, stream_mode=mode, subgraphs=subgraphs))

    await same(_talkative, story, runtime, name)


def _tools_sorted(chunks: list[Any]) -> list[Any]:
    """What was streamed, but the answers of the two tools, which run in parallel, in a fixed order."""
    texts = ("sun in Rome", "noon in Rome")
    at = [number for number, chunk in enumerate(chunks) if sum(text in repr(chunk) for text in texts) == 1]
    inner = sorted((chunks[number] for number in at), key=lambda chunk: texts[0] in repr(chunk))
    for number, chunk in zip(at, inner, strict=True):
        chunks[number] = chunk
    return chunks


@pytest.mark.parametrize("mode", ["values", "updates", "messages", ["updates", "messages"]])
async def test_astream(runtime: Runtime, name: Name, mode: Any) -> None:
    async def story(agent: Any, config: Config) -> Any:
        stream = agent.astream({"messages": [HumanMessage("how is it?")]}, config, stream_mode=mode)
        return _tools_sorted([chunk async for chunk in stream])

    await same(_create_agent, story, runtime, name)


async def test_stream_of_messages(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        stream = agent.stream({"messages": [HumanMessage("how is it?")]}, config, stream_mode="messages")
        return _tools_sorted([(message, metadata["langgraph_node"]) for message, metadata in stream])

    await same(_create_agent, story, runtime, name)


async def test_a_stream_that_ends_in_an_interrupt_or_an_error(runtime: Runtime, name: Name) -> None:
    def ask(state: State) -> State:
        return {"log": [interrupt("?")]}

    def broken(state: State) -> State:
        raise ValueError("broken")

    def story(agent: Any, config: Config) -> Any:
        first = list(agent.stream({"log": []}, config, stream_mode="updates"))
        chunks = []
        failure = None
        try:
            for chunk in agent.stream(Command(resume="yes"), config, stream_mode="updates"):
                chunks.append(chunk)
        except ValueError as error:
            failure = str(error)
        return first, chunks, failure

    await same(lambda: chain(ask=ask, b=add("b"), broken=broken).compile(), story, runtime, name)


async def test_stream_events(runtime: Runtime, name: Name) -> None:
    async def story(agent: Any, config: Config) -> Any:
        found = []
        async for event in agent.astream_events({"log": ["in"]}, config, version="v2"):
            if event["event"] == "on_chain_end" and event["name"] in ("a", "b"):
                found.append((event["name"], event["data"]["output"]))
        return found

    await same(lambda: chain(a=add("a"), b=add("b")).compile(), story, runtime, name)


async def test_v2_results(runtime: Runtime, name: Name) -> None:
    def ask(state: State) -> State:
        return {"log": [interrupt("?")]}

    def story(agent: Any, config: Config) -> Any:
        out = agent.invoke({"log": []}, config, version="v2")
        chunks = list(agent.stream(Command(resume=1), config, version="v2", stream_mode=["updates", "values"]))
        return type(out).__name__, out.value, out.interrupts, chunks

    await same(lambda: chain(ask=ask, b=add("b")).compile(), story, runtime, name)


async def test_output_keys(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        return agent.invoke({"log": [], "value": 3}, config, output_keys=["value"])

    await same(lambda: chain(a=add("a")).compile(), story, runtime, name)


# --- batches and configs


async def test_batch_and_abatch(runtime: Runtime, name: Name) -> None:
    async def story(agent: Any, config: Config) -> Any:
        configs = [{"configurable": {"thread_id": name()}} for _ in range(4)]
        inputs = [{"log": [number]} for number in range(4)]
        return (
            await asyncio.to_thread(agent.batch, inputs, configs),
            await agent.abatch(inputs, configs),
        )

    got = await same(lambda: chain(a=add("a")).compile(), story, runtime, name)
    assert got[1][3]["log"] == [3, "a", 3, "a"]


async def test_with_config(runtime: Runtime, name: Name) -> None:
    def node(state: State, config: RunnableConfig) -> State:
        return {"log": [config["configurable"].get("color"), config["metadata"].get("team")]}

    def story(agent: Any, config: Config) -> Any:
        configured = agent.with_config({"configurable": {"color": "red"}, "metadata": {"team": "x"}})
        return configured.invoke({"log": []}, config), configured.get_state(config).values

    await same(lambda: chain(node=node).compile(), story, runtime, name)


async def test_a_durable_agent_in_a_runnable_sequence(runtime: Runtime, name: Name) -> None:
    from langchain_core.runnables import RunnableLambda

    def story(agent: Any, config: Config) -> Any:
        sequence = RunnableLambda(lambda text: {"log": [text]}) | agent | RunnableLambda(lambda out: out["log"])
        return sequence.invoke("in", config)

    assert await same(lambda: chain(a=add("a")).compile(), story, runtime, name) == ["in", "a"]


async def test_get_graph_and_schemas(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        return (
            agent.get_graph(xray=True).draw_mermaid(),
            agent.get_input_jsonschema(),
            agent.get_output_jsonschema(),
            agent.get_context_jsonschema(),
            list(agent.nodes),
            [name for name, _ in agent.get_subgraphs()],
        )

    await same(_talkative, story, runtime, name)


# --- state


async def test_update_state_and_go_on(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        agent.invoke({"log": ["in"]}, config)
        agent.update_state(config, {"log": ["edited"]}, as_node="a")
        seen = agent.get_state(config)
        return seen, agent.invoke(None, config), history(agent, config)

    await same(lambda: chain(a=add("a"), b=add("b")).compile(), story, runtime, name)


async def test_time_travel(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        agent.invoke({"log": ["in"]}, config)
        past = next(state for state in agent.get_state_history(config) if state.next == ("b",))
        again = agent.invoke(None, past.config)
        fork = agent.update_state(past.config, {"log": ["forked"]})
        return again, agent.invoke(None, fork), len(history(agent, config)), agent.get_state(config)

    got = await same(lambda: chain(a=add("a"), b=add("b"), c=add("c")).compile(), story, runtime, name)
    assert got[1]["log"] == ["in", "a", "forked", "b", "c"]


async def test_time_travel_to_an_interrupt(runtime: Runtime, name: Name) -> None:
    def ask(state: State) -> State:
        return {"log": [interrupt("?")]}

    def story(agent: Any, config: Config) -> Any:
        agent.invoke({"log": ["in"]}, config)
        first = agent.invoke(Command(resume="one"), config)
        past = next(state for state in agent.get_state_history(config) if state.next == ("ask",))
        again = agent.invoke(None, past.config)
        return first, again, agent.invoke(Command(resume="two"), config)

    await same(lambda: chain(ask=ask, b=add("b")).compile(), story, runtime, name)


async def test_several_runs_on_one_thread(runtime: Runtime, name: Name) -> None:
    def story(agent: Any, config: Config) -> Any:
        outs = [agent.invoke({"log": [number]}, config) for number in range(3)]
        return outs, history(agent, config), list(agent.get_state_history(config, limit=2))

    await same(lambda: chain(a=add("a"), b=add("b")).compile(), story, runtime, name)


async def test_async_state_methods(runtime: Runtime, name: Name) -> None:
    async def story(agent: Any, config: Config) -> Any:
        await agent.ainvoke({"log": ["in"]}, config)
        await agent.aupdate_state(config, {"value": 5})
        return await agent.aget_state(config), [state async for state in agent.aget_state_history(config)]

    await same(lambda: chain(a=add("a")).compile(), story, runtime, name)


# --- what is special to durable agents


async def test_input_that_cannot_be_stored_is_refused_and_nothing_is_written(runtime: Runtime, name: Name) -> None:
    agent = durable(chain(a=add("a")).compile(), name=name(), runtime=runtime)
    thread = name()
    run_id = name()
    with pytest.raises(SerializationError, match="input of this run cannot be stored"):
        await asyncio.to_thread(
            agent.start, {"value": threading.Lock()}, {"configurable": {"thread_id": thread}}, run_id=run_id
        )
    assert runtime.client.run(ThreadLog(thread).read()) is None
    assert run_id not in runtime.run_ids()
    assert not runtime.client.run(_read(keys.run_key(run_id))).data


def _read(key: str) -> Any:
    return (yield Get((key,)))[key]


async def test_state_that_cannot_be_stored_fails_the_run_and_names_the_mend(runtime: Runtime, name: Name) -> None:
    agent = durable(
        chain(a=add("a"), lock=lambda _: {"value": threading.Lock()}).compile(), name=name(), runtime=runtime
    )
    config = {"configurable": {"thread_id": name()}}
    with pytest.raises(SerializationError, match=r"lock.*Keep plain data"):
        await asyncio.to_thread(agent.invoke, {"log": []}, config)
    state = await asyncio.to_thread(agent.get_state, config)
    assert state.values == {"log": ["a"]}
    assert state.next == ("lock",)


async def test_the_users_graph_is_not_changed(runtime: Runtime, name: Name) -> None:
    graph = chain(a=add("a"), sub=inner(), b=add("b")).compile()

    def identity() -> Any:
        """Which objects the graph is made of. LangGraph itself replaces one channel in every run."""
        own = {key: id(value) for key, value in vars(graph).items()}
        channels = {key: id(channel) for key, channel in graph.channels.items() if key != "__pregel_tasks"}
        nodes = {key: (id(node), id(node.bound), node.triggers[:]) for key, node in graph.nodes.items()}
        return own, channels, nodes, dict(graph.config or {}), graph.checkpointer

    before = identity()
    agent = durable(graph, name=name(), runtime=runtime)
    config = {"configurable": {"thread_id": name()}}
    await asyncio.to_thread(agent.invoke, {"log": []}, config)
    await agent.ainvoke({"log": []}, config)
    list(await asyncio.to_thread(lambda: list(agent.stream({"log": []}, config))))
    assert identity() == before
    assert graph.checkpointer is None
    assert graph.invoke({"log": []})["log"] == ["a", "b"]


async def test_a_durable_agent_inside_a_node_of_another_graph(runtime: Runtime, name: Name) -> None:
    nested = durable(chain(x=add("x")).compile(), name=name(), runtime=runtime)

    def node(state: State) -> State:
        return {"value": nested.invoke({"log": ["nested"]})["log"]}

    before = set(runtime.run_ids())
    agent = durable(chain(node=node).compile(), name=name(), runtime=runtime)
    out = await asyncio.to_thread(agent.invoke, {"log": []}, {"configurable": {"thread_id": name()}})
    assert out == {"log": [], "value": ["nested", "x"]}
    assert len(set(runtime.run_ids()) - before) == 1  # one durable run, the outer one
    plain = chain(node=node).compile()
    assert (await asyncio.to_thread(plain.invoke, {"log": []}))["value"] == ["nested", "x"]


async def test_async_nodes_run_on_the_callers_loop(runtime: Runtime, name: Name) -> None:
    """A node may use what is bound to the loop of its caller: a client, a lock, a queue."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    loops = []

    async def node(state: State) -> State:
        loops.append(asyncio.get_running_loop())
        return {"log": [await queue.get()]}

    agent = durable(chain(node=node).compile(), name=name(), runtime=runtime)
    running = asyncio.create_task(agent.ainvoke({"log": []}, {"configurable": {"thread_id": name()}}))
    await queue.put("from the caller")
    assert await running == {"log": ["from the caller"]}
    assert loops == [asyncio.get_running_loop()]


async def test_callbacks_of_the_caller_are_called(runtime: Runtime, name: Name) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    def story(agent: Any, config: Config) -> Any:
        seen = []

        class Handler(BaseCallbackHandler):
            def on_tool_start(self, serialized: Any, input_str: str, **_: Any) -> None:
                seen.append(serialized["name"])

        agent.invoke({"messages": [HumanMessage("how is it?")]}, {**config, "callbacks": [Handler()]})
        return sorted(seen)

    assert await same(_create_agent, story, runtime, name) == ["clock", "weather"]


async def test_context_variables_of_the_caller_are_seen(runtime: Runtime, name: Name) -> None:
    import contextvars

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    def story(agent: Any, config: Config) -> Any:
        variable.set("set")
        return agent.invoke({"log": []}, config)

    got = await same(lambda: chain(node=lambda _: {"log": [variable.get()]}).compile(), story, runtime, name)
    assert got["log"] == ["set"]


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


async def test_messages_keep_their_types_over_turns(runtime: Runtime, name: Name) -> None:
    def make() -> Any:
        def answer(state: Chat) -> Any:
            return {"messages": [AIMessage(f"answer {len(state['messages'])}")]}

        return StateGraph(Chat).add_node("answer", answer).add_edge(START, "answer").compile()

    def story(agent: Any, config: Config) -> Any:
        outs = [agent.invoke({"messages": [HumanMessage(f"turn {n}")]}, config) for n in range(5)]
        return outs, [type(message).__name__ for message in agent.get_state(config).values["messages"]]

    got = await same(make, story, runtime, name)
    assert len(got[1]) == 10
