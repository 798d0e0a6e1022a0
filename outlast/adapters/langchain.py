"""LangChain models and tools as steps: inside a durable run every call of one is recorded, and not made again.

`activate` puts a hook before the methods that all chat models and tools share. Outside of a durable run a hooked method
is the method itself. Recorded is what the model's provider, or the tool's own function, gave back; everything LangChain
does around it (callbacks, parsing, formatting, handling of tool errors) is LangChain's own, also on replay.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, cast

from langchain_core.callbacks import (
    BaseCallbackHandler,
    CallbackManager,
    adispatch_custom_event,
    dispatch_custom_event,
)
from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.outputs.chat_generation import merge_chat_generation_chunks
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from pydantic import BaseModel

from outlast.errors import SerializationError
from outlast.recovery import steps
from outlast.recovery.journal import Usage, digest
from outlast.recovery.steps import Scope, StepCall

logger = logging.getLogger("outlast.steps")

REPLAYED: Final = "outlast.replayed"
"""Name of the custom event that tells callbacks of a model or tool run that its outcome came from the journal."""

_ACTIVATING: Final = threading.Lock()
_HOOKED: Final = "__outlast_hook__"


def activate() -> None:
    """Make the calls of chat models and tools steps, where they are made inside a durable run."""
    with _ACTIVATING:
        for owner, name, hook in (
            (BaseChatModel, "_generate_with_cache", _generate),
            (BaseChatModel, "_agenerate_with_cache", _agenerate),
            (BaseChatModel, "stream", _stream),
            (BaseChatModel, "astream", _astream),
            (BaseTool, "run", _run),
            (BaseTool, "arun", _arun),
        ):
            method = getattr(owner, name)
            if not hasattr(method, _HOOKED):
                hooked = hook(method)
                setattr(hooked, _HOOKED, method)
                setattr(owner, name, hooked)


# --- models


def _generate(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def generate(self: BaseChatModel, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        here = steps.scope()
        if here is None:
            return cast(ChatResult, method(self, messages, *args, **kwargs))
        manager = kwargs.get("run_manager")
        call = _model_call(here, self, messages, {**kwargs, "args": args})
        mark = functools.partial(_mark_model, manager)
        found = steps.run(
            steps.perform(here, call, mark if manager else _nothing),
            lambda: method(self, messages, *args, **kwargs),
        )
        return cast(ChatResult, found)

    return generate


def _agenerate(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def generate(self: BaseChatModel, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        here = steps.scope()
        if here is None:
            return cast(ChatResult, await method(self, messages, *args, **kwargs))
        manager = kwargs.get("run_manager")
        call = _model_call(here, self, messages, {**kwargs, "args": args})
        replayed = _Flag()
        found = await steps.arun(
            steps.perform(here, call, replayed.set), lambda: method(self, messages, *args, **kwargs)
        )
        if replayed and manager:
            await _amark_model(manager)
        return cast(ChatResult, found)

    return generate


def _stream(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def stream(self: BaseChatModel, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:
        here = steps.scope()
        if here is None or not self._should_stream(async_api=False, **{**kwargs, "stream": True}):
            # Without streaming of its own the model is invoked, which is a step by itself.
            yield from method(self, input, config, **kwargs)
            return
        original, told = self._stream, _Told(self, config)

        def chunks(messages: list[BaseMessage], *more: Any, **options: Any) -> Iterator[ChatGenerationChunk]:
            call = _model_call(here, self, messages, {**options, "args": more})
            call = _merged(call)
            return _streamed(steps.perform(here, call, told.mark), lambda: original(messages, *more, **options))

        yield from method(_with(self, _stream=chunks), input, told.config, **kwargs)

    return stream


def _astream(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def stream(self: BaseChatModel, input: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
        here = steps.scope()
        if here is None or not self._should_stream(async_api=True, **{**kwargs, "stream": True}):
            async for chunk in method(self, input, config, **kwargs):
                yield chunk
            return
        original, told = self._astream, _Told(self, config)

        def chunks(messages: list[BaseMessage], *more: Any, **options: Any) -> AsyncIterator[ChatGenerationChunk]:
            call = _model_call(here, self, messages, {**options, "args": more})
            call = _merged(call)
            return _astreamed(steps.perform(here, call, told.set), lambda: original(messages, *more, **options))

        async for chunk in method(_with(self, _astream=chunks), input, told.config, **kwargs):
            if told:
                await told.amark()
            yield chunk

    return stream


def _model_call(here: Scope, model: BaseChatModel, messages: list[BaseMessage], options: Mapping[str, Any]) -> StepCall:
    name = model_name(model)
    _tell_of_two_owners(here, model, name)
    said = {key: value for key, value in options.items() if key != "run_manager" and value not in (None, (), [])}
    request = _canonical([[_spoken(message) for message in messages], said])
    base_url = getattr(model, "openai_api_base", None) or getattr(model, "base_url", None) or ""
    return StepCall(
        type="model",
        name=name,
        digest=digest(type(model).__qualname__, request),
        request=lambda: request,
        usage=functools.partial(_usage, name),
        dumps=functools.partial(_dump_result, here),
        loads=_load_result,
        endpoint=f"{type(model).__qualname__} {base_url} {name}",
    )


def model_name(model: BaseChatModel) -> str:
    """Return the name of a model, as its provider calls it."""
    found = getattr(model, "model_name", None) or getattr(model, "model", None)
    return found if isinstance(found, str) else type(model).__name__


def _spoken(message: BaseMessage) -> dict[str, Any]:
    """Return what of a message makes a request another one; ids do not."""
    said = {"type": message.type, "content": message.content, "name": message.name}
    for key in ("tool_calls", "tool_call_id", "status"):
        value = getattr(message, key, None)
        if value:
            said[key] = value
    return said


_OWNERS: Final[set[str]] = set()


def _tell_of_two_owners(here: Scope, model: BaseChatModel, name: str) -> None:
    own = getattr(model, "max_retries", None)
    if not own or name in _OWNERS or here.attempt.policies.of("model", name).retry is None:
        return
    _OWNERS.add(name)
    logger.warning(
        "model %s retries by itself (max_retries=%s) and so does the RetryPolicy: failed calls are made %s times as "
        "often, and Retry-After is waited for with a worker held; set max_retries=0 on the model",
        name, own, f"{own + 1}",
    )  # fmt: skip


def _usage(name: str, result: ChatResult) -> Usage | None:
    found = Usage(model=name)
    for generation in result.generations:
        message = generation.message
        taken = message.usage_metadata if isinstance(message, AIMessage) else None
        if taken:
            found = Usage(found.input + taken["input_tokens"], found.output + taken["output_tokens"], name)
    return found if found.input or found.output else None


def _dump_result(here: Scope, result: ChatResult) -> dict[str, Any]:
    return {
        "generations": [
            [generation.message, _storable(here, generation.generation_info)] for generation in result.generations
        ],
        "llm_output": _storable(here, result.llm_output),
    }


def _load_result(stored: dict[str, Any]) -> ChatResult:
    generations = [ChatGeneration(message=message, generation_info=info) for message, info in stored["generations"]]
    return ChatResult(
        generations=generations, llm_output={**(stored["llm_output"] or {}), "outlast": {"replayed": True}}
    )


def _storable(here: Scope, info: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what of additional information can be stored; no result is to be lost for the rest."""
    if not info:
        return info
    kept = {}
    for key, value in info.items():
        try:
            here.attempt.journal.codec.dumps_typed(value)
        except Exception:
            logger.debug("%r of a model's result cannot be stored and will be missing on replay", key)
        else:
            kept[key] = value
    return kept


# --- streams


class _BrokenStream(Exception):
    """A stream broke off after its consumer had seen a part: it cannot be tried again here."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _merged(call: StepCall) -> StepCall:
    """Return the step of a streamed model call: its result is the chunks merged into one, and replayed as that one."""

    def load(stored: dict[str, Any]) -> ChatGenerationChunk:
        ((message, info),) = stored["generations"]
        return ChatGenerationChunk(message=message, generation_info=info)

    def dump(chunk: ChatGenerationChunk) -> dict[str, Any]:
        return cast(dict[str, Any], call.dumps(ChatResult(generations=[chunk])))

    def usage(chunk: ChatGenerationChunk) -> Usage | None:
        return call.usage(ChatResult(generations=[chunk]))

    return replace(call, dumps=dump, loads=load, usage=usage, volatile=(_BrokenStream,))


def _streamed(
    todo: steps.Steps[ChatGenerationChunk], open_stream: Callable[[], Iterator[ChatGenerationChunk]]
) -> Iterator[ChatGenerationChunk]:
    """Carry a streamed step out, giving its chunks on as they come."""
    seen: list[ChatGenerationChunk] = []
    try:
        operation = next(todo)
        while True:
            try:
                if isinstance(operation, steps.Invoke):
                    for chunk in open_stream():
                        seen.append(chunk.model_copy(deep=True))
                        yield chunk
                    result: Any = _whole(seen)
                else:
                    result = steps.run_operation(operation, _nothing)
            except Exception as error:
                operation = todo.throw(_BrokenStream(error) if seen else error)
            except BaseException as error:
                operation = todo.throw(error)
            else:
                operation = todo.send(result)
    except StopIteration as stop:
        if not seen:
            yield stop.value
    except _BrokenStream as broken:
        raise broken.error from None


async def _astreamed(
    todo: steps.Steps[ChatGenerationChunk], open_stream: Callable[[], AsyncIterator[ChatGenerationChunk]]
) -> AsyncIterator[ChatGenerationChunk]:
    """Carry a streamed step out in async code."""
    seen: list[ChatGenerationChunk] = []
    found: ChatGenerationChunk | None = None
    try:
        operation = next(todo)
        while True:
            try:
                if isinstance(operation, steps.Invoke):
                    async for chunk in open_stream():
                        seen.append(chunk.model_copy(deep=True))
                        yield chunk
                    result: Any = _whole(seen)
                else:
                    result = await steps.arun_operation(operation, _anothing)
            except Exception as error:
                operation = todo.throw(_BrokenStream(error) if seen else error)
            except BaseException as error:
                operation = todo.throw(error)
            else:
                operation = todo.send(result)
    except StopIteration as stop:
        found = stop.value
    except _BrokenStream as broken:
        raise broken.error from None
    if not seen and found is not None:
        yield found


def _whole(chunks: list[ChatGenerationChunk]) -> ChatGenerationChunk:
    merged = merge_chat_generation_chunks(chunks)
    if merged is None:
        raise ValueError("No generation chunks were returned")
    return merged


# --- tools


def _run(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: BaseTool, tool_input: Any, *args: Any, **kwargs: Any) -> Any:
        here = steps.scope()
        if here is None:
            return method(self, tool_input, *args, **kwargs)
        call = _tool_call(here, self, tool_input, kwargs.get("tool_call_id"))
        original = self._run

        @functools.wraps(original)
        def once(*given: Any, **named: Any) -> Any:
            return steps.run(steps.perform(here, call, _announce), lambda: original(*given, **named))

        return method(_with(self, _run=once), tool_input, *args, **kwargs)

    return run


def _arun(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def run(self: BaseTool, tool_input: Any, *args: Any, **kwargs: Any) -> Any:
        here = steps.scope()
        if here is None:
            return await method(self, tool_input, *args, **kwargs)
        call = _tool_call(here, self, tool_input, kwargs.get("tool_call_id"))
        original = self._arun

        @functools.wraps(original)
        async def once(*given: Any, **named: Any) -> Any:
            replayed = _Flag()
            found = await steps.arun(steps.perform(here, call, replayed.set), lambda: original(*given, **named))
            if replayed:
                await _aannounce()
            return found

        return await method(_with(self, _arun=once), tool_input, *args, **kwargs)

    return run


def _tool_call(here: Scope, tool: BaseTool, tool_input: Any, call_id: str | None) -> StepCall:
    # What ToolNode injects (state, store, runtime) is not the model's request, and not the same in every attempt.
    shown = tool._filter_injected_args(tool_input) if isinstance(tool_input, dict) else tool_input
    request = _canonical(shown)
    return StepCall(
        type="tool",
        name=tool.name,
        digest=digest(tool.name, request),
        request=lambda: f"{tool.name}({request})",
        id=call_id or "",
        dumps=functools.partial(_dump_output, here, tool, call_id),
        loads=_load_output,
        arguments=((), dict(shown)) if isinstance(shown, dict) else ((shown,), {}),
        volatile=_control_flow(),
    )


def _dump_output(here: Scope, tool: BaseTool, call_id: str | None, output: Any) -> dict[str, Any]:
    pair = isinstance(output, tuple)
    stored = {"pair": pair, "output": list(output) if pair else output}
    try:
        here.attempt.journal.codec.dumps_typed(stored)
    except Exception as error:
        if call_id is None or tool.response_format != "content":
            raise SerializationError(
                f"the output of tool {tool.name!r} cannot be stored: {error}. Return plain data, messages, pydantic "
                "models or dataclasses"
            ) from error
        # LangChain makes a text of it for the model anyway (`_stringify`), so that is what the tool gave.
        stored = {"pair": False, "output": _text(output)}
    return stored


def _load_output(stored: dict[str, Any]) -> Any:
    return tuple(stored["output"]) if stored["pair"] else stored["output"]


def _text(output: Any) -> str:
    try:
        return json.dumps(output, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(output)


def _control_flow() -> tuple[type[BaseException], ...]:
    """Return the exceptions by which LangGraph's `interrupt` and `Command(graph=PARENT)` leave a tool."""
    errors = sys.modules.get("langgraph.errors")
    return (errors.GraphBubbleUp,) if errors else ()


# --- common


def _with(model: Any, **methods: Any) -> Any:
    """Return a copy of a model or tool that shares everything with it but these methods."""
    clone = copy.copy(model)
    for name, method in methods.items():
        # Past pydantic, which would take it for a private attribute that was not declared.
        object.__setattr__(clone, name, method)
    return clone


def _canonical(value: Any) -> str:
    """Return a text that is the same in every process for the same request."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {"type": type(value).__qualname__, **value.model_dump(mode="python")}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, tuple | list):
        return list(value)
    if isinstance(value, bytes):
        return digest(value)
    # Never `repr`, which shows addresses.
    named = value if isinstance(value, type) or callable(value) else type(value)
    return f"<{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', type(named).__qualname__)}>"


class _Flag:
    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def __bool__(self) -> bool:
        return self._set


class _Told(_Flag):
    """A streamed model run that is marked as replayed: LangChain tells the model's `_stream` nothing of its run."""

    def __init__(self, model: BaseChatModel, config: Any) -> None:
        super().__init__()
        self.config = ensure_config(config)
        self.run_id = self.config["run_id"] = self.config.get("run_id") or uuid.uuid4()
        self.tags, self.metadata = self.config.get("tags") or [], self.config.get("metadata") or {}
        self._callbacks = (self.config.get("callbacks"), model.callbacks, model.verbose)

    @property
    def handlers(self) -> list[BaseCallbackHandler]:
        return CallbackManager.configure(*self._callbacks).handlers

    def mark(self) -> None:
        _mark_model(self)

    async def amark(self) -> None:
        self._set = False
        await _amark_model(self)


def _nothing() -> None:
    return None


async def _anothing() -> None:
    return None


def _mark_model(manager: Any) -> None:
    event = ("on_custom_event", "ignore_custom_event", REPLAYED, {"type": "model"})
    handle_event(manager.handlers, *event, run_id=manager.run_id, tags=manager.tags, metadata=manager.metadata)


async def _amark_model(manager: Any) -> None:
    event = ("on_custom_event", "ignore_custom_event", REPLAYED, {"type": "model"})
    await ahandle_event(manager.handlers, *event, run_id=manager.run_id, tags=manager.tags, metadata=manager.metadata)


def _announce() -> None:
    """Tell the callbacks of the run that this code is in."""
    try:
        dispatch_custom_event(REPLAYED, {})
    except RuntimeError:
        # Without a parent run there is nobody to tell.
        return


async def _aannounce() -> None:
    try:
        await adispatch_custom_event(REPLAYED, {})
    except RuntimeError:
        return
