"""What the SDK's documentation describes works the same through our Runner; and what outlast adds works here, too."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelSettings,
    OutputGuardrailTripwireTriggered,
    RunConfig,
    RunContextWrapper,
    SQLiteSession,
    StopAtTools,
    function_tool,
    input_guardrail,
    output_guardrail,
    set_tracing_disabled,
)
from agents import Runner as PlainRunner
from agents.testing import ScriptedModel, assistant_message, function_call
from pydantic import BaseModel

import outlast
from outlast import Budget, Policies, RunConflictError, RunFailedError, RunStateError, SerializationError, StepPolicy
from outlast.adapters.openai_agents import (
    ContextCodec,
    DaprSession,
    DurableAgent,
    Runner,
    RunWaitsError,
    seams,
)
from outlast.recovery.runtime import Runtime

set_tracing_disabled(True)


class Report(BaseModel):
    city: str
    sunny: bool


@dataclasses.dataclass
class Basket:
    items: list[str] = dataclasses.field(default_factory=list)


@function_tool
def weather(city: str) -> str:
    """Ask for the weather."""
    return f"sunny in {city}"


@function_tool
def put(context: RunContextWrapper[Basket], item: str) -> str:
    """Put something into the basket."""
    context.context.items.append(item)
    return f"{len(context.context.items)} items"


@function_tool(needs_approval=True)
def delete(name: str) -> str:
    """Delete something."""
    return f"deleted {name}"


def scripted(*steps: Any) -> ScriptedModel:
    return ScriptedModel(list(steps))


def _call(tool: str, call_id: str | None = None, /, **arguments: Any) -> Any:
    return function_call(tool, json.dumps(arguments), call_id=call_id or f"call-{tool}-{sorted(arguments.items())}")


@pytest.fixture
def make(runtime: Runtime, name: Callable[[], str]) -> Callable[..., DurableAgent]:
    """Makes durable agents of names that nothing else has."""

    def made(*steps: Any, durable: dict[str, Any] | None = None, **kwargs: Any) -> DurableAgent:
        agent: Agent[Any] = Agent(name=name(), model=scripted(*steps), **kwargs)
        return outlast.durable(agent, runtime=runtime, **(durable or {}))  # type: ignore[no-any-return]

    return made


async def test_a_run_returns_what_the_sdk_returns(make: Callable[..., DurableAgent]) -> None:
    script = [_call("weather", city="Rome"), assistant_message("It is sunny.")]
    agent = make(script[:1], script[1:], tools=[weather])
    found = await Runner.run(agent, "How is Rome?")
    plain = await PlainRunner.run(agent.agent.clone(model=scripted(script[:1], script[1:])), "How is Rome?")
    assert type(found) is type(plain)
    assert found.final_output == plain.final_output == "It is sunny."
    assert found.to_input_list() == plain.to_input_list()
    assert [item.type for item in found.new_items] == [item.type for item in plain.new_items]
    assert found.context_wrapper.usage == plain.context_wrapper.usage
    assert found.last_agent is agent.agent


async def test_the_same_run_id_is_the_same_run(make: Callable[..., DurableAgent]) -> None:
    agent = make([_call("weather", city="Rome")], [assistant_message("sunny")], tools=[weather])
    first = await Runner.run(agent, "Rome?", run_id=f"{agent.name}-1")
    again = await Runner.run(agent, "Rome?", run_id=f"{agent.name}-1")
    assert again.final_output == "sunny"
    assert again.to_input_list() == first.to_input_list()
    assert again.context_wrapper.usage == first.context_wrapper.usage
    with pytest.raises(RunConflictError, match="another agent, thread or input"):
        await Runner.run(agent, "Paris?", run_id=f"{agent.name}-1")


def test_run_sync(make: Callable[..., DurableAgent]) -> None:
    agent = make([assistant_message("hello")])
    assert Runner.run_sync(agent, "hi").final_output == "hello"


async def test_the_agent_and_plain_runs_of_it_are_left_alone(make: Callable[..., DurableAgent]) -> None:
    agent = make([assistant_message("one")], [assistant_message("two")])
    before = {field.name: getattr(agent.agent, field.name) for field in dataclasses.fields(agent.agent)}
    await Runner.run(agent, "hi")
    assert {field.name: getattr(agent.agent, field.name) for field in dataclasses.fields(agent.agent)} == before
    assert (await PlainRunner.run(agent.agent, "hi")).final_output == "two"


async def test_structured_output_and_context(make: Callable[..., DurableAgent]) -> None:
    answer = assistant_message(Report(city="Rome", sunny=True).model_dump_json())
    agent = make([_call("put", item="hat")], [answer], tools=[put], output_type=Report)
    basket = Basket()
    found = await Runner.run(agent, "go", context=basket, run_id=f"{agent.name}-1")
    assert found.final_output == Report(city="Rome", sunny=True)
    assert basket.items == ["hat"]
    assert found.context_wrapper.context is basket
    other = Basket()
    again = await Runner.run(agent, "go", context=other, run_id=f"{agent.name}-1")
    assert again.final_output == Report(city="Rome", sunny=True)
    assert other.items == ["hat"]


class Live:
    """A context that cannot be stored as it is."""

    def __init__(self) -> None:
        self.client = object()
        self.count = 0


async def test_a_context_that_cannot_be_stored_is_an_error_that_says_how(make: Callable[..., DurableAgent]) -> None:
    agent = make([assistant_message("hello")])
    with pytest.raises(SerializationError, match="context_codec=ContextCodec"):
        await Runner.run(agent, "hi", context=Live())


async def test_a_context_codec(make: Callable[..., DurableAgent]) -> None:
    @function_tool
    def count(context: RunContextWrapper[Live]) -> str:
        assert context.context.client is not None
        context.context.count += 1
        return "counted"

    def loads(stored: int) -> Live:
        live = Live()
        live.count = stored
        return live

    def update(live: Live, stored: int) -> None:
        live.count = stored

    codec = ContextCodec(dumps=lambda live: live.count, loads=loads, update=update)
    agent = make([_call("count")], [assistant_message("done")], tools=[count], durable={"context_codec": codec})
    live = Live()
    await Runner.run(agent, "hi", context=live, run_id=f"{agent.name}-1")
    assert live.count == 1
    assert agent.get_run(f"{agent.name}-1").result().context_wrapper.context.count == 1


async def test_sessions(make: Callable[..., DurableAgent], runtime: Runtime) -> None:
    agent = make([assistant_message("one")], [assistant_message("two")], [assistant_message("three")])
    session = SQLiteSession("s")
    await Runner.run(agent, "first", session=session)
    await Runner.run(agent, "second", session=session)
    assert [item.get("content") for item in await session.get_items() if item.get("role") == "user"] == [
        "first", "second",
    ]  # fmt: skip
    kept = DaprSession(agent.name, client=runtime.client)
    await Runner.run(agent, "third", session=kept)
    assert len(await kept.get_items()) == 2


async def test_guardrails_trip_as_in_the_sdk(make: Callable[..., DurableAgent]) -> None:
    @input_guardrail
    def refuse(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info="rude", tripwire_triggered=True)

    @output_guardrail
    def doubt(context: Any, agent: Any, output: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info="odd", tripwire_triggered=True)

    with pytest.raises(InputGuardrailTripwireTriggered) as tripped:
        await Runner.run(make([assistant_message("x")], input_guardrails=[refuse]), "hi")
    assert tripped.value.guardrail_result.output.output_info == "rude"
    with pytest.raises(OutputGuardrailTripwireTriggered):
        await Runner.run(make([assistant_message("x")], output_guardrails=[doubt]), "hi")
    streamed = Runner.run_streamed(make([assistant_message("x")], input_guardrails=[refuse]), "hi")
    with pytest.raises(InputGuardrailTripwireTriggered):
        async for _ in streamed.stream_events():
            pass


async def test_max_turns_and_its_handler(make: Callable[..., DurableAgent]) -> None:
    def calls() -> list[Any]:
        return [[_call("weather", f"c{n}", city="Rome")] for n in range(3)]

    with pytest.raises(MaxTurnsExceeded):
        await Runner.run(make(*calls(), tools=[weather]), "go", max_turns=2)

    def handle(data: Any) -> str:
        return f"gave up after {len(data.run_data.raw_responses)} turns"

    found = await Runner.run(make(*calls(), tools=[weather]), "go", max_turns=2, error_handlers={"max_turns": handle})
    assert found.final_output == "gave up after 2 turns"


async def test_a_tool_may_end_the_run(make: Callable[..., DurableAgent]) -> None:
    @function_tool
    def report() -> Report:
        """Report."""
        return Report(city="Rome", sunny=True)

    stop = StopAtTools(stop_at_tool_names=["report"])
    agent = make([_call("report")], tools=[report], tool_use_behavior=stop, output_type=Report)
    found = await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    assert found.final_output == Report(city="Rome", sunny=True)
    assert agent.get_run(f"{agent.name}-1").result().final_output == Report(city="Rome", sunny=True)


async def test_a_handoff_next_to_a_tool_and_a_circle(make: Callable[..., DurableAgent], name: Any) -> None:
    second: Agent[Any] = Agent(name=name(), model=scripted([_call("transfer_to_first")]))
    agent = make([_call("weather", city="Rome"), _call("over")], [assistant_message("home again")], tools=[weather])
    from agents import handoff

    agent.agent.handoffs = [handoff(second, tool_name_override="over")]
    second.handoffs = [handoff(agent.agent, tool_name_override="transfer_to_first")]
    found = await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    assert found.final_output == "home again"
    assert [item.type for item in found.new_items].count("handoff_output_item") == 2
    again = await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    assert again.last_agent is agent.agent
    assert [item.type for item in again.new_items] == [item.type for item in found.new_items]


async def test_approvals_as_in_the_sdk(make: Callable[..., DurableAgent]) -> None:
    agent = make(
        [_call("delete", "a", name="a"), _call("delete", "b", name="b"), _call("weather", city="Rome")],
        [assistant_message("done")],
        tools=[delete, weather],
    )
    found = await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    assert [item.call_id for item in found.interruptions] == ["a", "b"]
    state = found.to_state()
    state.approve(found.interruptions[0])
    state.reject(found.interruptions[1], rejection_message="never")
    ended = await Runner.run(agent, state)
    outputs = [item.output for item in ended.new_items if item.type == "tool_call_output_item"]
    assert sorted(outputs) == ["deleted a", "never", "sunny in Rome"]
    assert ended.final_output == "done"
    assert agent.get_run(f"{agent.name}-1").status() == "done"


async def test_approvals_by_a_handle(make: Callable[..., DurableAgent]) -> None:
    agent = make(
        [_call("delete", "a", name="a"), _call("delete", "b", name="b")], [assistant_message("done")], tools=[delete]
    )
    handle = await agent.astart("go", run_id=f"{agent.name}-1")
    assert (await handle.aresult()).interruptions
    asked = handle.approvals()
    assert [(item.id, item.tool, item.arguments) for item in asked] == [
        ("a", "delete", '{"name": "a"}'), ("b", "delete", '{"name": "b"}'),
    ]  # fmt: skip
    with pytest.raises(RunStateError, match="does not wait for an approval of c"):
        handle.approve("c")
    await asyncio.to_thread(handle.reject, "a", message="keep it")
    await asyncio.to_thread(handle.approve, asked[1])
    async with asyncio.timeout(20):
        while (await handle.aresult()).interruptions:  # noqa: ASYNC110  as a caller would
            await asyncio.sleep(0.05)
    outputs = [item.output for item in (await handle.aresult()).new_items if item.type == "tool_call_output_item"]
    assert sorted(outputs) == ["deleted b", "keep it"]
    with pytest.raises(RunStateError, match="waits for no approval"):
        handle.approve()


async def test_an_approval_inside_of_an_agent_as_a_tool(make: Callable[..., DurableAgent], name: Any) -> None:
    inner: Agent[Any] = Agent(
        name=name(),
        model=scripted([_call("delete", "inner", name="x")], [assistant_message("inner done")]),
        tools=[delete],
    )
    agent = make(
        [_call("ask", input="delete x")], [assistant_message("outer done")], tools=[inner.as_tool("ask", "Ask")]
    )
    found = await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    assert [item.call_id for item in found.interruptions] == ["inner"]
    handle = agent.get_run(f"{agent.name}-1")
    await asyncio.to_thread(handle.resume, {"inner": True})
    async with asyncio.timeout(20):
        while (await handle.aresult()).interruptions:  # noqa: ASYNC110  as a caller would
            await asyncio.sleep(0.05)
    assert (await handle.aresult()).final_output == "outer done"


async def test_a_streamed_run(make: Callable[..., DurableAgent]) -> None:
    script = [_call("weather", city="Rome")], [assistant_message("It is sunny.")]
    agent = make(*script, tools=[weather])

    async def read(result: Any) -> list[str]:
        return [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]

    result = Runner.run_streamed(agent, "Rome?", run_id=f"{agent.name}-1")
    told = await read(result)
    plain = PlainRunner.run_streamed(agent.agent.clone(model=scripted(*script)), "Rome?")
    assert told == await read(plain) == ["tool_called", "tool_output", "message_output_created"]
    assert result.is_complete
    assert result.final_output == plain.final_output
    assert result.to_input_list() == plain.to_input_list()
    assert result.current_turn == plain.current_turn
    again = Runner.run_streamed(agent, "Rome?", run_id=f"{agent.name}-1")
    assert await read(again) == told
    assert again.to_input_list() == result.to_input_list()


async def test_two_readers_of_one_run_get_each_item_once(make: Callable[..., DurableAgent]) -> None:
    going = asyncio.Event()

    @function_tool
    async def wait() -> str:
        await going.wait()
        return "waited"

    agent = make([_call("wait")], [assistant_message("done")], tools=[wait])

    async def read(result: Any) -> list[str]:
        return [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]

    first = asyncio.create_task(read(Runner.run_streamed(agent, "go", run_id=f"{agent.name}-1")))
    await asyncio.sleep(0.5)
    second = asyncio.create_task(read(Runner.run_streamed(agent, "go", run_id=f"{agent.name}-1")))
    await asyncio.sleep(0.5)
    going.set()
    names = ["tool_called", "tool_output", "message_output_created"]
    assert await first == names
    assert sorted(await second) == sorted(names)


async def test_a_reader_that_goes_away_does_not_end_the_run(make: Callable[..., DurableAgent]) -> None:
    going = asyncio.Event()

    @function_tool
    async def wait() -> str:
        await going.wait()
        return "waited"

    agent = make([_call("wait")], [assistant_message("done")], tools=[wait])

    async def read() -> None:
        async for _ in Runner.run_streamed(agent, "go", run_id=f"{agent.name}-1").stream_events():
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.5)
    reader.cancel()
    going.set()
    assert (await Runner.run(agent, "go", run_id=f"{agent.name}-1")).final_output == "done"


async def test_cancel_ends_the_run(make: Callable[..., DurableAgent]) -> None:
    @function_tool
    async def wait() -> str:
        await asyncio.sleep(60)
        return "waited"

    agent = make([_call("wait")], [assistant_message("done")], tools=[wait])
    result = Runner.run_streamed(agent, "go", run_id=f"{agent.name}-1")
    async for event in result.stream_events():
        if event.type == "run_item_stream_event":
            result.cancel()
    async with asyncio.timeout(20):
        while agent.get_run(f"{agent.name}-1").status() != "cancelled":  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_failures_and_policies(make: Callable[..., DurableAgent]) -> None:
    agent = make(ModelBehaviorError("odd"), [assistant_message("done")])
    with pytest.raises(ModelBehaviorError, match="odd"):
        await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    with pytest.raises((RunFailedError, ModelBehaviorError), match="odd"):
        await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    handle = agent.get_run(f"{agent.name}-1")
    await asyncio.to_thread(handle.retry)
    assert (await handle.aresult()).final_output == "done"

    @function_tool(failure_error_function=None)
    def flaky() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("lost")
        return "there"

    tries: list[int] = []
    retry = StepPolicy(retry=outlast.RetryPolicy(attempts=3, backoff=0))
    agent = make(
        [_call("flaky")], [assistant_message("done")], tools=[flaky], durable={"policies": Policies(tools=retry)}
    )
    assert (await Runner.run(agent, "go")).final_output == "done"
    assert len(tries) == 3


async def test_a_budget_asks(make: Callable[..., DurableAgent]) -> None:
    budget = Budget(model_calls=1, on_limit="ask")
    agent = make(
        [_call("weather", city="Rome")], [assistant_message("done")], tools=[weather], durable={"budget": budget}
    )
    with pytest.raises(RunWaitsError, match="model_calls"):
        await Runner.run(agent, "go", run_id=f"{agent.name}-1")
    handle = agent.get_run(f"{agent.name}-1")
    await asyncio.to_thread(handle.answer, outlast.allow(model_calls=1))
    async with asyncio.timeout(20):
        while handle.status() != "done":  # noqa: ASYNC110  as a caller would
            await asyncio.sleep(0.05)
    assert (await handle.aresult()).final_output == "done"


async def test_run_configs_are_stored(make: Callable[..., DurableAgent]) -> None:
    agent = make([assistant_message("done")])
    settings = ModelSettings(temperature=0.5)
    await Runner.run(agent, "go", run_config=RunConfig(model_settings=settings), run_id=f"{agent.name}-1")
    from outlast.adapters.openai_agents import payload
    from outlast.recovery import runs

    head = agent.runtime.client.run(runs.read(f"{agent.name}-1"))
    submitted = payload.decode(agent.runtime.client.run(runs.read_input(head)).payload)
    assert payload.options_of(submitted, {}, {}, "x")["run_config"].model_settings == settings
    assert submitted["live"] == []


async def test_eight_runs_at_once_do_not_mix(make: Callable[..., DurableAgent], runtime: Runtime) -> None:
    class Echo(ScriptedModel):
        async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            self.enqueue(self._next(input))
            return await super().get_response(system_instructions, input, *args, **kwargs)

        def _next(self, input: Any) -> list[Any]:
            who = next(item["content"] for item in input if item.get("role") == "user" and item["content"] != "old")
            outputs = [item["output"] for item in input if item.get("type") == "function_call_output"]
            if len(outputs) < 3:
                return [_call("put", f"{who}-{len(outputs)}", item=f"{who}-{len(outputs)}")]
            return [assistant_message(f"{who}: {' '.join(outputs)}")]

    agent = make(tools=[put])
    agent.agent.model = Echo([])
    baskets = [Basket() for _ in range(8)]
    sessions = [DaprSession(f"{agent.name}-s{n}", client=runtime.client) for n in range(8)]
    found = await asyncio.gather(
        *(
            Runner.run(agent, f"user{n}", context=baskets[n], session=sessions[n], run_id=f"{agent.name}-{n}")
            for n in range(8)
        )
    )
    for n, result in enumerate(found):
        assert result.final_output == f"user{n}: 1 items 2 items 3 items"
        assert baskets[n].items == [f"user{n}-{k}" for k in range(3)]
        assert len(await sessions[n].get_items()) == 8
        assert all(f"user{n}" in json.dumps(item) for item in (await sessions[n].get_items())[:2])


def test_a_release_without_a_seam_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from agents.run_internal import run_loop

    for owner, name, _ in seams._SEAMS:
        assert name in vars(owner), f"openai-agents has no {owner.__name__}.{name} any more"
    monkeypatch.delattr(run_loop, "get_model")
    with pytest.raises(seams.UnsupportedSDKError, match="get_model"):
        seams.activate()


def test_durable_takes_functions_and_refuses_what_is_no_agent(runtime: Runtime, name: Callable[[], str]) -> None:
    own = name()

    @outlast.durable(runtime=runtime, name=own)
    def build() -> Agent[Any]:
        return Agent(name="inner", model=scripted([assistant_message("made")]))

    assert isinstance(build, DurableAgent)
    assert build.name == own
    assert build.run_sync("hi").final_output == "made"
    with pytest.raises(TypeError, match="OpenAI agent"):
        outlast.durable(object())
    with pytest.raises(TypeError, match="unexpected argument 'colour'"):
        build.start("hi", colour="red")


def test_a_sandbox_is_refused_when_the_agent_is_made_durable(runtime: Runtime, name: Callable[[], str]) -> None:
    from agents.sandbox import SandboxAgent

    sandboxed = SandboxAgent(name=name(), model=scripted())
    with pytest.raises(TypeError, match="sandbox"):
        outlast.durable(Agent(name=name(), handoffs=[sandboxed]), runtime=runtime)


async def test_replayed_steps_are_marked_in_one_trace(make: Callable[..., DurableAgent]) -> None:
    from agents import add_trace_processor, set_trace_processors
    from agents.tracing import TracingProcessor

    class Kept(TracingProcessor):
        def __init__(self) -> None:
            self.traces: list[Any] = []
            self.spans: list[Any] = []

        def on_trace_start(self, trace: Any) -> None:
            self.traces.append(trace)

        def on_trace_end(self, trace: Any) -> None: ...
        def on_span_start(self, span: Any) -> None: ...

        def on_span_end(self, span: Any) -> None:
            self.spans.append(span)

        def shutdown(self) -> None: ...
        def force_flush(self) -> None: ...

    @function_tool(failure_error_function=None)
    def once() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("not yet")
        return "now"

    tries: list[int] = []
    kept = Kept()
    set_trace_processors([])
    add_trace_processor(kept)
    set_tracing_disabled(False)
    try:
        agent = make([_call("once")], [assistant_message("done")], tools=[once])
        run_id = f"{agent.name}-1"
        with pytest.raises(Exception, match="not yet"):
            await Runner.run(agent, "go", run_id=run_id)
        await asyncio.to_thread(agent.get_run(run_id).retry)
        assert (await agent.get_run(run_id).aresult()).final_output == "done"
    finally:
        set_tracing_disabled(True)
    assert len({trace.trace_id for trace in kept.traces}) == 1
    assert all(trace.metadata["outlast_run_id"] == run_id for trace in kept.traces)
    marks = [span.span_data for span in kept.spans if span.span_data.type == "custom"]
    assert [mark.data["type"] for mark in marks if mark.name == "outlast.replayed"] == ["model"]
