"""The scripted model, asked by the clients people use."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageFunctionToolCall, ChatCompletionMessageParam
from pydantic import SecretStr

from outlast.testing import ChatRequest, Fault, Reply, ScriptedModelServer, ToolCall, Usage, by_turn
from tests.harness.procs import Child

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
TWO_CITIES = Reply(
    "Let me look.",
    tool_calls=[ToolCall("weather", {"city": "Paris"}), ToolCall("weather", {"city": "Lisbon"}, id="mine")],
    usage=Usage(11, 7),
)


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture
def server() -> Iterator[ScriptedModelServer]:
    with ScriptedModelServer([Reply("Hello there, you!"), TWO_CITIES, Reply("third")]) as server:
        yield server


def client(server: ScriptedModelServer, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="none", **{"max_retries": 0, **options})


def chat_model(server: ScriptedModelServer, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="scripted", base_url=server.base_url, api_key=SecretStr("none"), **{"max_retries": 0, **options}
    )


class TestOpenAIClient:
    def test_it_answers_in_the_order_of_the_script(self, server: ScriptedModelServer) -> None:
        with client(server) as openai_client:
            answer = openai_client.chat.completions.create(model="scripted", messages=HI)
            assert answer.choices[0].message.content == "Hello there, you!"
            assert answer.choices[0].finish_reason == "stop"
            assert answer.model == "scripted"
            assert answer.usage is not None
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0

            answer = openai_client.chat.completions.create(model="scripted", messages=HI)
            calls = answer.choices[0].message.tool_calls
            assert calls is not None
            assert answer.choices[0].finish_reason == "tool_calls"
            assert [call.id for call in calls] == ["call_1_0", "mine"]
            assert isinstance(calls[0], ChatCompletionMessageFunctionToolCall)
            assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 7)

    def test_it_streams(self, server: ScriptedModelServer) -> None:
        with client(server) as openai_client:
            stream = openai_client.chat.completions.create(
                model="scripted", messages=HI, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
        words = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
        assert words == ["Hello", " there,", " you!"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert all(chunk.usage is None for chunk in chunks[:-1])

    def test_it_streams_without_usage_unless_asked(self, server: ScriptedModelServer) -> None:
        with client(server) as openai_client:
            stream = openai_client.chat.completions.create(model="scripted", messages=HI, stream=True)
            assert all(chunk.usage is None and chunk.choices for chunk in stream)

    async def test_it_serves_many_at_once(self) -> None:
        def script(request: ChatRequest, _answered: int) -> Reply:
            return Reply(request["messages"][-1]["content"], delay=0.2)

        with ScriptedModelServer(script) as server:
            started = time.monotonic()
            async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none") as openai_client:
                answers = await asyncio.gather(
                    *(
                        openai_client.chat.completions.create(
                            model="scripted", messages=[{"role": "user", "content": str(number)}]
                        )
                        for number in range(20)
                    )
                )
            assert [answer.choices[0].message.content for answer in answers] == [str(number) for number in range(20)]
            assert time.monotonic() - started < 20 * 0.2
            assert sorted(record["call"] for record in server.requests()) == list(range(20))

    def test_it_lists_its_model(self, server: ScriptedModelServer) -> None:
        with client(server) as openai_client:
            assert [model.id for model in openai_client.models.list()] == ["scripted"]

    def test_a_script_that_is_used_up_is_an_error_that_says_so(self) -> None:
        with (
            ScriptedModelServer([]) as server,
            client(server) as openai_client,
            pytest.raises(openai.BadRequestError, match="the script has 0 replies, all used"),
        ):
            openai_client.chat.completions.create(model="scripted", messages=HI)

    def test_what_is_no_chat_request_is_refused(self, server: ScriptedModelServer) -> None:
        url = f"{server.base_url}/chat/completions"
        assert httpx.post(url, content=b"{").status_code == 400
        assert httpx.post(url, json=[]).status_code == 400
        assert httpx.get(f"{server.url}/nowhere").status_code == 404
        assert server.requests() == []


class TestChatOpenAI:
    def test_invoke(self, server: ScriptedModelServer) -> None:
        model = chat_model(server)
        assert model.invoke("Hi").content == "Hello there, you!"
        answer = model.bind_tools([weather]).invoke("Where is it sunny?")
        assert [call["args"] for call in answer.tool_calls] == [{"city": "Paris"}, {"city": "Lisbon"}]
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_tokens"] == 11
        assert server.requests()[1]["request"]["tools"][0]["function"]["name"] == "weather"

    async def test_ainvoke(self, server: ScriptedModelServer) -> None:
        assert (await chat_model(server).ainvoke("Hi")).content == "Hello there, you!"

    def test_stream(self, server: ScriptedModelServer) -> None:
        model = chat_model(server, stream_usage=True)
        assert len([chunk for chunk in model.stream("Hi") if chunk.content]) == 3
        chunks = list(model.stream("Hi"))
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole = whole + chunk
        assert isinstance(whole, AIMessage)
        assert whole.content == "Let me look."
        assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
            ("weather", {"city": "Paris"}),
            ("weather", {"city": "Lisbon"}),
        ]
        assert whole.usage_metadata is not None
        assert whole.usage_metadata["output_tokens"] == 7

    async def test_astream(self, server: ScriptedModelServer) -> None:
        assert "".join([str(chunk.content) async for chunk in chat_model(server).astream("Hi")]) == "Hello there, you!"

    def test_a_script_by_turn_goes_by_the_conversation_alone(self) -> None:
        with ScriptedModelServer(by_turn([TWO_CITIES, Reply("Both.")])) as server:
            model = chat_model(server)
            first = model.invoke("Where?")
            conversation = [
                HumanMessage("Where?"),
                first,
                *(ToolMessage("sunny", tool_call_id=call["id"]) for call in first.tool_calls),
            ]
            for _again in range(2):
                assert model.invoke("Where?").tool_calls == first.tool_calls
                assert model.invoke(conversation).content == "Both."
            with pytest.raises(openai.BadRequestError, match="2 replies to a user's message; number 3 is asked for"):
                model.invoke([*conversation, AIMessage("Both.")])


class TestFaults:
    def test_a_rate_limit_is_obeyed_by_the_client_and_the_script_goes_on(self, server: ScriptedModelServer) -> None:
        server.fail(Fault(status=429, retry_after=0.3))
        started = time.monotonic()
        assert chat_model(server, max_retries=2).invoke("Hi").content == "Hello there, you!"
        assert time.monotonic() - started >= 0.3
        assert [record["fault"] for record in server.requests()] == ["status", None]

    def test_a_rate_limit_without_retries(self, server: ScriptedModelServer) -> None:
        server.fail(Fault(status=429, retry_after=7))
        with client(server) as openai_client, pytest.raises(openai.RateLimitError) as caught:
            openai_client.chat.completions.create(model="scripted", messages=HI)
        assert caught.value.response.headers["retry-after"] == "7"

    def test_server_errors(self, server: ScriptedModelServer) -> None:
        server.fail(Fault(status=500, times=2))
        model = chat_model(server)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                model.invoke("Hi")
        assert model.invoke("Hi").content == "Hello there, you!"

    def test_the_fault_befalls_the_call_it_is_meant_for(self, server: ScriptedModelServer) -> None:
        server.fail(Fault(status=503, at_call=1))
        model = chat_model(server)
        assert model.invoke("Hi").content == "Hello there, you!"
        with pytest.raises(openai.InternalServerError):
            model.invoke("Hi")
        assert model.invoke("Hi").tool_calls

    def test_a_connection_that_breaks_in_the_middle_of_the_answer(self, server: ScriptedModelServer) -> None:
        server.fail(Fault("drop"))
        with pytest.raises(openai.APIConnectionError):
            chat_model(server).invoke("Hi")

    def test_a_connection_that_breaks_in_the_middle_of_a_stream(self, server: ScriptedModelServer) -> None:
        server.fail(Fault("drop"))
        received: list[AIMessageChunk] = []
        stream = chat_model(server).stream("Hi")
        with pytest.raises(openai.APIConnectionError):
            received.extend(stream)
        assert "Hello" in "".join(str(chunk.content) for chunk in received)

    def test_a_hanging_model(self, server: ScriptedModelServer) -> None:
        server.fail(Fault("hang"))
        with pytest.raises(openai.APITimeoutError):
            chat_model(server, timeout=0.3).invoke("Hi")

    def test_a_hanging_model_does_not_keep_the_server_from_stopping(self) -> None:
        with ScriptedModelServer([]) as server:
            server.fail(Fault("hang"))
            with pytest.raises(openai.APITimeoutError):
                chat_model(server, timeout=0.1).invoke("Hi")
            started = time.monotonic()
        assert time.monotonic() - started < 2

    def test_a_malformed_answer(self, server: ScriptedModelServer) -> None:
        server.fail(Fault("malformed"))
        with pytest.raises(Exception, match=r"Expecting"):
            chat_model(server).invoke("Hi")

    def test_another_process_plans_and_forgets_them(self, server: ScriptedModelServer) -> None:
        control = f"{server.url}/_control"
        assert httpx.post(f"{control}/faults", json={"status": 500, "times": 9}).json() == {"planned": 1}
        assert httpx.delete(f"{control}/faults").json() == {"planned": 0}
        assert httpx.post(f"{control}/faults", json=[{"kind": "status", "status": 418}]).status_code == 201
        with pytest.raises(openai.APIStatusError, match="418"):
            chat_model(server).invoke("Hi")
        assert [record["fault"] for record in httpx.get(f"{control}/requests").json()] == ["status"]

    def test_what_is_no_fault_is_refused(self, server: ScriptedModelServer) -> None:
        answer = httpx.post(f"{server.url}/_control/faults", json={"kind": "earthquake"})
        assert answer.status_code == 400
        assert "not a fault" in answer.json()["error"]["message"]


def test_a_call_is_told_before_it_is_answered() -> None:
    told: list[Any] = []
    with ScriptedModelServer([Reply("Hello!", delay=0.1)], on_call=told.append) as server:
        chat_model(server).invoke("Hi")
        assert told == server.requests()


class TestProcess:
    def test_it_counts_on_after_a_restart(self, tmp_path: Path) -> None:
        calls = tmp_path / "calls.jsonl"
        arguments: list[str | Path] = ["--script", "outlast.testing.scripts:weather", "--log", calls]
        for restart in range(2):
            with Child.python("-m", "outlast.testing.model_server", *arguments, log=tmp_path / "out") as child:
                port = json.loads(child.wait_for_line(r"^\{.*\}$")[0])["port"]
                body = {"model": "scripted", "messages": HI}
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body).json()
                assert len(answer["choices"][0]["message"]["tool_calls"]) == 2
                assert answer["id"] == f"chatcmpl-{restart}"
                if restart:
                    child.terminate()
                    assert child.wait() == 0
        assert [json.loads(line)["call"] for line in calls.read_text().splitlines()] == [0, 1]

    def test_a_half_written_record_is_dropped(self, tmp_path: Path) -> None:
        calls = tmp_path / "calls.jsonl"
        calls.write_text('{"call": 0, "fault": null}\n{"call": 1, "fau')
        with ScriptedModelServer([Reply("first"), Reply("second")], log=calls) as server:
            assert chat_model(server).invoke("Hi").content == "second"
        assert [json.loads(line)["call"] for line in calls.read_text().splitlines()] == [0, 1]
