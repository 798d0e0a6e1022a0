"""What a scripted model says, and how OpenAI's chat completions API words it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ChatRequest = Mapping[str, Any]
"""The body of a chat completion request."""


@dataclass(frozen=True)
class ToolCall:
    """A tool the model wants called. Without an id it gets one that is unique in its conversation."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Reply:
    """One answer of the model: text, tool calls, or both. Without usage, tokens are guessed from the lengths."""

    content: str = ""
    tool_calls: Sequence[ToolCall] = ()
    usage: Usage | None = None
    delay: float = 0
    """Seconds before the answer begins."""
    chunk_delay: float = 0
    """Seconds before each chunk when streaming."""


Script = Sequence[Reply] | Callable[[ChatRequest, int], Reply]
"""Replies in the order of the calls; or a function of the request and the number of calls answered so far."""


def by_turn(replies: Sequence[Reply]) -> Callable[[ChatRequest, int], Reply]:
    """A script that goes by the conversation alone: the n-th reply after a user's message is `replies[n]`.

    Such a script gives the same answer to the same request, however often the server or the agent was started again.
    """

    def script(request: ChatRequest, _answered: int) -> Reply:
        turn = 0
        for message in request["messages"]:
            if message["role"] == "user":
                turn = 0
            elif message["role"] == "assistant":
                turn += 1
        if turn >= len(replies):
            raise LookupError(
                f"the script has {len(replies)} replies to a user's message; number {turn + 1} is asked for"
            )
        return replies[turn]

    return script


def choose(script: Script, request: ChatRequest, answered: int) -> Reply:
    """The script's reply, complete with ids and usage; LookupError when it has none."""
    if callable(script):
        reply = script(request, answered)
    elif answered < len(script):
        reply = script[answered]
    else:
        raise LookupError(f"the script has {len(script)} replies, all used")
    turn = len(request["messages"])
    calls = [replace(call, id=call.id or f"call_{turn}_{index}") for index, call in enumerate(reply.tool_calls)]
    usage = reply.usage or Usage(_tokens(request["messages"]), _tokens([reply.content, *map(_function, calls)]))
    return replace(reply, tool_calls=calls, usage=usage)


def completion(reply: Reply, request: ChatRequest, identifier: str) -> dict[str, Any]:
    """The reply as one chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content or None, "refusal": None}
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _function(call)} for call in reply.tool_calls
        ]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(reply)}
    return {**_head("chat.completion", request, identifier), "choices": [choice], "usage": _usage(reply)}


def chunks(reply: Reply, request: ChatRequest, identifier: str) -> Iterator[str]:
    """The reply as the events of a stream: text word by word, the arguments of tool calls in two pieces."""
    head = _head("chat.completion.chunk", request, identifier)
    with_usage = bool((request.get("stream_options") or {}).get("include_usage"))
    if with_usage:
        head["usage"] = None

    def event(delta: Mapping[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return json.dumps({**head, "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    for word in re.findall(r"\s*\S+|\s+", reply.content):
        yield event({"content": word})
    for index, call in enumerate(reply.tool_calls):
        function = _function(call)
        first, second = _halves(function["arguments"])
        start = {"index": index, "id": call.id, "type": "function", "function": {**function, "arguments": first}}
        yield event({"tool_calls": [start]})
        yield event({"tool_calls": [{"index": index, "function": {"arguments": second}}]})
    yield event({}, _finish_reason(reply))
    if with_usage:
        yield json.dumps({**head, "choices": [], "usage": _usage(reply)})
    yield "[DONE]"


def _head(kind: str, request: ChatRequest, identifier: str) -> dict[str, Any]:
    model = request.get("model", "scripted")
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": model, "service_tier": "default"}


def _function(call: ToolCall) -> dict[str, str]:
    return {"name": call.name, "arguments": json.dumps(call.arguments)}


def _finish_reason(reply: Reply) -> str:
    return "tool_calls" if reply.tool_calls else "stop"


def _usage(reply: Reply) -> dict[str, int]:
    assert reply.usage is not None, "choose() fills it in"
    prompt, answer = reply.usage.prompt_tokens, reply.usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _tokens(value: Any) -> int:
    return max(1, len(json.dumps(value)) // 4)


def _halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]
