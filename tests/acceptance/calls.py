"""Agents of model calls and tool calls: a real ChatOpenAI and real HTTP, counted by the servers of `world`."""

from __future__ import annotations

import asyncio
import json
import operator
import os
from typing import Annotated, Any, TypedDict

import httpx
from langchain.agents import create_agent
from langchain_core.messages import AnyMessage
from langchain_core.runnables import RunnableParallel
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

from outlast import Budget, Policies, RetryPolicy, StepPolicy, current_step, durable
from outlast.checkpointer import keys
from tests.acceptance import points
from tests.acceptance.world import LEDGER_URL, MODEL_URL, asked

TRIP: Any = {"messages": [("user", "trip")]}
EMPTY: Any = {"log": []}


def input_of(agent: str) -> Any:
    """What an agent is submitted with."""
    return TRIP if agent.startswith(("trio", "careful", "hasty")) else EMPTY


# --- the model


def model(**options: Any) -> ChatOpenAI:
    """The scripted model, behind OpenAI's own client. Before a request and after its answer there is a point."""

    def before(request: Any) -> None:
        points.reached(f"model {asked(json.loads(request.content))} before")

    def after(response: Any) -> None:
        response.read()
        points.reached(f"model {asked(json.loads(response.request.content))} after")

    async def abefore(request: Any) -> None:
        before(request)

    async def aafter(response: Any) -> None:
        await response.aread()
        points.reached(f"model {asked(json.loads(response.request.content))} after")

    # A connection each: event loops come and go, and a pooled connection belongs to one of them. No certificates: they
    # take longer to load than a run takes.
    alone: dict[str, Any] = {"headers": {"Connection": "close"}, "verify": False}
    return ChatOpenAI(
        model="scripted",
        base_url=os.environ[MODEL_URL],
        api_key="none",
        max_retries=0,
        http_client=DefaultHttpxClient(event_hooks={"request": [before], "response": [after]}, **alone),
        http_async_client=DefaultAsyncHttpxClient(event_hooks={"request": [abefore], "response": [aafter]}, **alone),
        **options,
    )


# --- the tools


def _booking(name: str, city: str) -> dict[str, Any]:
    points.reached(f"tool {name} before")
    body = {"tool": name, "city": city, "idempotency_key": current_step().idempotency_key}
    return {"url": f"{os.environ[LEDGER_URL]}/bookings", "json": body}


def _booked(name: str, city: str, answer: httpx.Response) -> str:
    answer.raise_for_status()
    points.reached(f"tool {name} after")
    return f"{name} of {city}"


def book(name: str, city: str) -> str:
    """Enter something into the ledger, with the key of the step."""
    return _booked(name, city, httpx.post(**_booking(name, city), timeout=60, verify=False))


async def abook(name: str, city: str) -> str:
    """Async face of `book`."""
    async with httpx.AsyncClient(timeout=60, verify=False) as client:
        return _booked(name, city, await client.post(**_booking(name, city)))


def tool(name: str, artifact: bool = False) -> StructuredTool:
    """A tool that books under its name."""

    def run(city: str) -> Any:
        said = book(name, city)
        return (said, {"city": city}) if artifact else said

    async def arun(city: str) -> Any:
        said = await abook(name, city)
        return (said, {"city": city}) if artifact else said

    how = {"response_format": "content_and_artifact"} if artifact else {}
    return StructuredTool.from_function(run, arun, name=name, description=f"To {name}.", **how)


# --- the agents


def trio() -> Any:
    """LangChain's own agent: the model wants three tools at once, then ends."""
    return create_agent(model(), [tool("search"), tool("price", artifact=True), tool("book")])


class Plan(TypedDict, total=False):
    name: str
    log: Annotated[list[str], operator.add]
    messages: Annotated[list[AnyMessage], operator.add]


def fan(is_async: bool, prefix: str = "") -> Any:
    """One node with two model calls at once, then four tool calls at once (two of them equal), then a model call."""
    chat = model()
    city = {"city": "Rome"}
    tools = {"search": tool("search"), "price": tool("price", artifact=True), "book": tool("book")}
    first, last = [f"{prefix}outline", f"{prefix}check"], f"{prefix}polish"

    def work(state: Plan) -> Any:
        said = chat.batch(first)
        used = RunnableParallel(**tools, again=tools["book"]).invoke(city)
        return {"log": [used[name] for name in sorted(used)], "messages": [*said, chat.invoke(last)]}

    async def awork(state: Plan) -> Any:
        said = await asyncio.gather(*map(chat.ainvoke, first))
        used = await asyncio.gather(*(tools[name].ainvoke(city) for name in ("book", "book", "price", "search")))
        return {"log": used, "messages": [*said, await chat.ainvoke(last)]}

    def end(state: Plan) -> Any:
        return {"log": ["end"]}

    builder = StateGraph(Plan).add_node("work", awork if is_async else work).add_node("end", end)
    return builder.add_edge(START, "work").add_edge("work", "end")


def nest(is_async: bool) -> Any:
    """`fan` as a node, which keeps its state, and `fan` called in a node, which keeps none and begins anew."""
    inner, called = fan(is_async, "in ").compile(), fan(is_async, "out ").compile(checkpointer=False)

    def call(state: Plan) -> Any:
        return called.invoke({"log": []})

    async def acall(state: Plan) -> Any:
        return await called.ainvoke({"log": []})

    builder = StateGraph(Plan).add_node("inner", inner).add_node("call", acall if is_async else call)
    return builder.add_edge(START, "inner").add_edge("inner", "call").compile()


def parts(count: int) -> Any:
    """One node with so many model calls, one after another."""
    chat = model()

    def work(state: Plan) -> Any:
        return {"log": [str(chat.invoke(f"part {number}").content) for number in range(count)]}

    return StateGraph(Plan).add_node("work", work).add_edge(START, "work").compile()


def loop(count: int) -> Any:
    """So many supersteps, each with one model call."""
    chat = model()

    def work(state: Plan) -> Any:
        return {"log": [str(chat.invoke(f"part {len(state['log'])}").content)]}

    def again(state: Plan) -> str:
        return "work" if len(state["log"]) < count else END

    builder = StateGraph(Plan).add_node("work", work).add_edge(START, "work")
    return builder.add_conditional_edges("work", again, ["work", END]).compile().with_config(recursion_limit=count + 1)


ROUNDS = 3
TOOLS = ("again", "book", "price", "search")


def rounds(is_async: bool) -> Any:
    """Three supersteps of two model calls at once, four tool calls at once, and a model call; named for their run."""
    chat = model()
    tools = {name: tool("book" if name == "again" else name) for name in TOOLS}

    def wanted(state: Plan) -> tuple[list[str], dict[str, str], str]:
        name, number = state["name"], len(state["log"])
        return [f"{name} outline {number}", f"{name} check {number}"], {"city": name}, f"{name} polish {number}"

    def work(state: Plan) -> Any:
        first, city, last = wanted(state)
        said = chat.batch(first)
        used = RunnableParallel(**tools).invoke(city)
        return summed([*said, *(used[name] for name in TOOLS), chat.invoke(last)])

    async def awork(state: Plan) -> Any:
        first, city, last = wanted(state)
        said = await asyncio.gather(*map(chat.ainvoke, first))
        used = await asyncio.gather(*(tools[name].ainvoke(city) for name in TOOLS))
        return summed([*said, *used, await chat.ainvoke(last)])

    def summed(said: list[Any]) -> Any:
        return {"log": ["; ".join(str(getattr(each, "content", each)) for each in said)]}

    def again(state: Plan) -> str:
        return "work" if len(state["log"]) < ROUNDS else END

    builder = StateGraph(Plan).add_node("work", awork if is_async else work).add_edge(START, "work")
    return builder.add_conditional_edges("work", again, ["work", END]).compile()


def undo(result: Any, *, city: str) -> None:
    """Take back what a tool has booked. Its own step has a key of its own."""
    book(f"undo-{str(result).partition(' ')[0]}", city)


def journey() -> Any:
    """Three bookings in a node, and a node that fails."""
    tools = [tool(name) for name in ("train", "hotel", "guide")]

    def reserve(state: Plan) -> Any:
        return {"log": [each.invoke({"city": "Rome"}) for each in tools]}

    def pay(state: Plan) -> Any:
        raise ValueError("no money")

    builder = StateGraph(Plan).add_node("reserve", reserve).add_node("pay", pay)
    return builder.add_edge(START, "reserve").add_edge("reserve", "pay").compile()


def make(name: str, is_async: bool = False) -> Any:
    """An agent by name, durable."""
    kind, _, how = name.partition("-")
    match kind:
        case "trio":
            return durable(trio(), name=name)
        case "fan":
            return durable(fan(is_async).compile(), name=name)
        case "nest":
            return durable(nest(is_async), name=name)
        case "rounds":
            return durable(rounds(how == "async"), name=name)
        case "parts":
            return durable(parts(int(how)), name=name)
        case "loop":
            return durable(loop(int(how)), name=name)
        case "careful":
            doubt: Any = how
            return durable(trio(), name=name, policies=Policies(named={"book": StepPolicy(on_in_doubt=doubt)}))
        case "thrifty":
            return durable(parts(6), name=name, budget=Budget(model_calls=int(how), on_limit="ask"))
        case "patient":
            retry = RetryPolicy(hold=0)
            return durable(parts(3), name=name, policies=Policies(models=StepPolicy(retry=retry)))
        case "hasty":
            return durable(trio(), name=name, policies=_hasty(how))
        case "journey":
            return durable(journey(), name=name, policies=Policies(tools=StepPolicy(compensate=undo)))
    raise ValueError(name)


def _hasty(how: str) -> Policies:
    """Tools have a second; then the call, or the run, is tried again."""
    again = RetryPolicy(attempts=2, backoff=0)
    if how == "call":
        return Policies(tools=StepPolicy(timeout=1, retry=again))
    return Policies(tools=StepPolicy(timeout=1), run=again)


def named(run_id: str, record: Any) -> str:
    """What a record is of: a model's answer tells what it was asked, a tool call has its idempotency key."""
    if record.type != "model":
        return keys.digest(run_id, record.key, str(record.slot))
    return str(record.value["generations"][0][0].content).removesuffix("!")
