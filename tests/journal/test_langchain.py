"""Chat models and tools inside a durable run: each call is made once, and its replay is what it was."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableParallel
from langchain_core.tools import InjectedToolCallId, StructuredTool, ToolException, tool
from langgraph.prebuilt import InjectedState, ToolNode
from langgraph.types import Command
from pydantic import BaseModel, Field

from outlast import current_step
from outlast.adapters.langchain import REPLAYED
from tests.journal.conftest import Twice


class Model(BaseChatModel):
    """Says the last message backwards; counts its calls. `fails` counts down."""

    counts: dict[str, int] = Field(default_factory=dict)
    fails: int = 0
    model: str = "backwards-1"

    @property
    def _llm_type(self) -> str:
        return "backwards"

    def _answer(self, messages: list[BaseMessage], how: str) -> AIMessage:
        self.counts[how] = self.counts.get(how, 0) + 1
        if self.fails:
            self.fails -= 1
            raise ConnectionError(f"the model is down ({self.counts[how]})")
        return AIMessage(
            str(messages[-1].content)[::-1],
            usage_metadata={"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
            response_metadata={"how": how, "model_name": "backwards-1-2026"},
        )

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(
            generations=[ChatGeneration(message=self._answer(messages, "invoke"), generation_info={"logprobs": [0.5]})],
            llm_output={"token_usage": {"total": 5}},
        )


class Streaming(Model):
    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for letter in str(self._answer(messages, "stream").content):
            yield ChatGenerationChunk(message=AIMessageChunk(content=letter))

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for letter in str(self._answer(messages, "stream").content):
            yield ChatGenerationChunk(message=AIMessageChunk(content=letter))


class Watching(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.replayed: list[Any] = []
        self.outputs: list[Any] = []

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("model start")

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.seen.append("model end")
        self.outputs.append(response.llm_output)

    def on_tool_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("tool start")

    def on_tool_end(self, output: Any, **kwargs: Any) -> None:
        self.seen.append("tool end")

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        if name == REPLAYED:
            self.replayed.append(kwargs["run_id"])


def test_invoke(twice: Twice) -> None:
    model, watching = Model(), Watching()
    first, second, handle = twice(lambda _: model.invoke("abc", config={"callbacks": [watching]}))

    assert model.counts == {"invoke": 1}
    assert first == second
    assert first.content == "cba"
    assert (first.id, first.usage_metadata, first.response_metadata) == (
        second.id,
        second.usage_metadata,
        second.response_metadata,
    )
    assert watching.seen == ["model start", "model end"] * 2
    assert len(watching.replayed) == 1
    assert "outlast" not in watching.outputs[0]
    assert watching.outputs[1]["outlast"] == {"replayed": True}
    (record,) = [record for record in handle.steps() if record.kind == "result"]
    assert (record.type, record.name, record.attempt) == ("model", "backwards-1", 1)
    assert (record.usage.input, record.usage.output) == (3, 2)
    assert "abc" in record.request


async def test_ainvoke(atwice: Twice) -> None:
    model = Model()
    first, second, _ = await atwice(lambda _: model.ainvoke("abc"))
    assert (first, model.counts) == (second, {"invoke": 1})


def test_equal_calls_of_one_node_are_told_apart_by_their_order(twice: Twice) -> None:
    class Rolling(Model):
        def _answer(self, messages: list[BaseMessage], how: str) -> AIMessage:
            answer = super()._answer(messages, how)
            return answer.model_copy(update={"content": str(self.counts[how])})

    model = Rolling()
    first, second, _ = twice(lambda _: [model.invoke("roll").content for _ in range(3)])
    assert first == second == ["1", "2", "3"]


def test_batch_and_parallel(twice: Twice) -> None:
    model = Model()

    def body(_: Any) -> Any:
        both = RunnableParallel(a=model.bind(stop=["x"]), b=model).invoke("equal")
        return [message.content for message in model.batch(["ab", "cd", "ef"])], both["a"].content, both["b"].content

    first, second, _ = twice(body)
    assert first == second == (["ba", "dc", "fe"], "lauqe", "lauqe")
    assert model.counts == {"invoke": 5}


def test_stream(twice: Twice) -> None:
    model, watching = Streaming(), Watching()

    def body(_: Any) -> list[str]:
        return [str(chunk.content) for chunk in model.stream("abc", config={"callbacks": [watching]}) if chunk.content]

    first, second, _ = twice(body)
    assert first == ["c", "b", "a"]
    assert second == ["cba"]
    assert model.counts == {"stream": 1}
    assert watching.seen == ["model start", "model end"] * 2
    assert len(watching.replayed) == 1


async def test_astream(atwice: Twice) -> None:
    model = Streaming()

    async def body(_: Any) -> str:
        return "".join([str(chunk.content) async for chunk in model.astream("abc")])

    first, second, _ = await atwice(body)
    assert (first, second, model.counts) == ("cba", "cba", {"stream": 1})


def test_a_stream_of_a_model_that_has_none(twice: Twice) -> None:
    model = Model()
    first, second, _ = twice(lambda _: [chunk.content for chunk in model.stream("abc")])
    assert (first, second, model.counts) == (["cba"], ["cba"], {"invoke": 1})


def test_a_stream_that_is_not_read_to_its_end_is_not_recorded(twice: Twice) -> None:
    model = Streaming()
    first, second, _ = twice(lambda _: next(iter(model.stream("abc"))).content)
    assert (first, second, model.counts) == ("c", "c", {"stream": 2})


def test_fallbacks_and_retries(twice: Twice) -> None:
    broken, sound, shaky = Model(fails=9, model="broken"), Model(), Model(fails=2, model="shaky")

    def body(_: Any) -> Any:
        fallen = broken.with_fallbacks([sound]).invoke("abc").content
        return fallen, shaky.with_retry(stop_after_attempt=3, wait_exponential_jitter=False).invoke("xyz").content

    first, second, _ = twice(body)
    assert first == second == ("cba", "zyx")
    # Errors count as what was tried: after the run was tried again, the broken one is asked again, the others are not.
    assert (broken.counts, sound.counts, shaky.counts) == ({"invoke": 2}, {"invoke": 1}, {"invoke": 3})


def test_structured_output(twice: Twice) -> None:
    class Answer(BaseModel):
        text: str

    class Calling(Model):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self.bind(tools=[str(each) for each in tools])

        def _answer(self, messages: list[BaseMessage], how: str) -> AIMessage:
            super()._answer(messages, how)
            return AIMessage("", tool_calls=[{"name": "Answer", "args": {"text": "yes"}, "id": "1"}])

    model = Calling()
    first, second, _ = twice(lambda _: model.with_structured_output(Answer).invoke("well?"))
    assert first == second == Answer(text="yes")
    assert model.counts == {"invoke": 1}


# --- tools


class Counting:
    def __init__(self) -> None:
        self.calls: list[Any] = []


def test_tools(twice: Twice) -> None:
    counting = Counting()

    @tool
    def plain(what: str) -> dict[str, str]:
        """Plain."""
        counting.calls.append(("plain", what, current_step().idempotency_key))
        return {"is": what}

    @tool(response_format="content_and_artifact")
    def pair(what: str) -> tuple[str, Any]:
        """Pair."""
        counting.calls.append("pair")
        return f"saw {what}", {"raw": [1, 2, what]}

    watching = Watching()

    def body(_: Any) -> Any:
        call = {"name": "pair", "args": {"what": "y"}, "id": "call-1", "type": "tool_call"}
        return plain.invoke({"what": "x"}, config={"callbacks": [watching]}), pair.invoke(call)

    first, second, handle = twice(body)
    assert first == second
    assert first[0] == {"is": "x"}
    assert (first[1].content, first[1].artifact) == ("saw y", {"raw": [1, 2, "y"]})
    assert len(counting.calls) == 2
    assert watching.seen == ["tool start", "tool end"] * 2
    assert len(watching.replayed) == 1
    assert [record.request for record in handle.steps()] == ['plain({"what":"x"})', 'pair({"what":"y"})']


async def test_async_tools_at_once(atwice: Twice) -> None:
    calls: list[int] = []

    async def slow(n: int) -> int:
        calls.append(n)
        await asyncio.sleep(0.05 * (3 - n))
        return n * 10

    made = StructuredTool.from_function(coroutine=slow, name="slow", description="slow")

    async def body(_: Any) -> list[int]:
        return list(await asyncio.gather(*(made.ainvoke({"n": n}) for n in (0, 1, 2))))

    first, second, _ = await atwice(body)
    assert (first, second, sorted(calls)) == ([0, 10, 20], [0, 10, 20], [0, 1, 2])


def test_tool_errors_are_replayed_as_what_they_were(twice: Twice) -> None:
    calls: list[str] = []

    @tool
    def picky(what: str) -> str:
        """Picky."""
        calls.append(what)
        raise ToolException(f"not {what}")

    picky.handle_tool_error = True
    call = {"name": "picky", "args": {"what": "x"}, "id": "1", "type": "tool_call"}
    first, second, handle = twice(lambda _: picky.invoke(call))
    assert (first.content, first.status) == (second.content, second.status) == ("not x", "error")
    assert [record.kind for record in handle.steps()] == ["error", "error"]
    # The run was tried again after it had failed, and then errors are tried again, too.
    assert len(calls) == 2


class Frame:
    """Something that no serialiser knows."""

    def __str__(self) -> str:
        return "a frame of 3 rows"


def test_what_cannot_be_stored_is_stored_as_the_text_that_the_model_sees(twice: Twice) -> None:
    @tool
    def framed() -> Any:
        """Framed."""
        return Frame()

    call = {"name": "framed", "args": {}, "id": "1", "type": "tool_call"}
    first, second, _ = twice(lambda _: framed.invoke(call).content)
    assert first == second == "a frame of 3 rows"


def test_tool_node_with_injected_state_and_commands(twice: Twice) -> None:
    calls: list[Any] = []

    @tool
    def inject(
        what: str, state: Annotated[Any, InjectedState], tool_call_id: Annotated[str, InjectedToolCallId]
    ) -> Command[Any]:
        """Inject."""
        calls.append((what, state["given"]))
        return Command(update={"out": what, "messages": [ToolMessage("ok", tool_call_id=tool_call_id)]})

    node = ToolNode([inject])
    asked = AIMessage("", tool_calls=[{"name": "inject", "args": {"what": "w"}, "id": "c1"}])

    def body(given: Any) -> Any:
        return node.invoke({"messages": [asked], "given": given})

    first, second, _ = twice(body, "state")
    assert first[0].update == second[0].update
    assert first[0].update["out"] == "w"
    assert calls == [("w", "state")]


class Planned(Model):
    """An agent's model: asks for two tools at once, then ends."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _answer(self, messages: list[BaseMessage], how: str) -> AIMessage:
        super()._answer(messages, how)
        if isinstance(messages[-1], HumanMessage):
            calls = [{"name": "double", "args": {"n": n}, "id": f"c{n}"} for n in (1, 2)]
            return AIMessage("", tool_calls=calls)
        return AIMessage("done")


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_agent_called_inside_a_node(twice: Twice, atwice: Twice, is_async: bool) -> None:
    """A graph without a checkpointer inside of a node has new task ids each time; its steps are known all the same."""
    calls: list[int] = []

    @tool
    def double(n: int) -> int:
        """Double."""
        calls.append(n)
        return 2 * n

    model = Planned()
    agent = create_agent(model, [double], checkpointer=False)
    given: Any = {"messages": [("user", "go")]}
    if is_async:
        first, second, _ = await atwice(lambda _: agent.ainvoke(given))
    else:
        first, second, _ = twice(lambda _: agent.invoke(given))
    assert [message.content for message in first["messages"]] == ["go", "", "2", "4", "done"]
    assert [message.content for message in second["messages"]] == [message.content for message in first["messages"]]
    assert sorted(calls) == [1, 2]
    assert model.counts == {"invoke": 2}


# --- outside


def test_outside_of_a_durable_run_nothing_changes() -> None:
    model = Model()
    assert [model.invoke("abc").content, model.invoke("abc").content] == ["cba", "cba"]
    assert model.counts == {"invoke": 2}
    with pytest.raises(LookupError, match="outside of a step"):
        current_step()
    assert current_step(None) is None


def test_importing_the_adapter_changes_nothing() -> None:
    code = (
        "from langchain_core.language_models import BaseChatModel as M\n"
        "from langchain_core.tools import BaseTool as T\n"
        "names = [(M, n) for n in ('_generate_with_cache', '_agenerate_with_cache', 'stream', 'astream')]\n"
        "names += [(T, 'run'), (T, 'arun')]\n"
        "before = [getattr(o, n) for o, n in names]\n"
        "import outlast.adapters.langchain as a, outlast\n"
        "assert before == [getattr(o, n) for o, n in names]\n"
        "a.activate(); a.activate()\n"
        "assert all(getattr(o, n).__outlast_hook__ is b for (o, n), b in zip(names, before))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
