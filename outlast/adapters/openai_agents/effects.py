"""Tools, guardrails and handoffs as steps."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from agents.guardrail import GuardrailFunctionOutput, InputGuardrailResult, OutputGuardrailResult
from agents.tool_guardrails import ToolGuardrailFunctionOutput

from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.adapters.openai_agents.place import Place, here, within
from outlast.errors import SerializationError
from outlast.recovery import steps
from outlast.recovery.journal import digest
from outlast.recovery.steps import StepCall

logger = logging.getLogger("outlast.steps")

_CODEC: Final = AgentsCodec()
Invoke = Callable[[], Awaitable[Any]]


def _where() -> tuple[steps.Scope, Place] | None:
    scope, place = steps.scope(), here()
    return None if scope is None or place is None else (scope, place)


async def step(scope: steps.Scope, place: Place, call: StepCall, invoke: Invoke) -> Any:
    """Do something that may change the context object as a step: what it makes of that is recorded with it."""
    contexts = place.track.contexts

    def dumps(result: Any) -> dict[str, Any]:
        return {"result": call.dumps(result), "context": contexts.change()}

    def loads(stored: dict[str, Any]) -> Any:
        contexts.replay(stored["context"])
        return call.loads(stored["result"])

    async def inside() -> Any:
        with within(Place(place.track, "", "step")):
            return await invoke()

    todo = steps.perform(scope, replace(call, dumps=dumps, loads=loads), functools.partial(place.track.replayed, call))
    return await steps.arun(todo, inside)


# --- function tools (MCP tools and dynamic tools among them)


def invoke_function_tool(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return the SDK's `_invoke_function_tool_with_metadata` with every call of a tool a step."""

    async def invoke(*, function_tool: Any, context: Any, arguments: str) -> Any:
        found = _where()
        if found is None:
            return await original(function_tool=function_tool, context=context, arguments=arguments)
        scope, place = found
        call_id = context.tool_call_id
        if getattr(function_tool, "_is_agent_tool", False):
            # Its run is made of steps of its own, and may wait for an approval in the middle.
            with within(Place(place.track, place.below(f"t:{call_id}"), "agent_tool")):
                return await original(function_tool=function_tool, context=context, arguments=arguments)
        call = _tool_call(function_tool.name, call_id, arguments, _storing(function_tool, context))
        return await step(
            scope, place, call, lambda: original(function_tool=function_tool, context=context, arguments=arguments)
        )

    return invoke


def _tool_call(
    name: str, call_id: str, arguments: str, storing: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None
) -> StepCall:
    dumps, loads = storing or (_storable, _same)
    return StepCall(
        type="tool",
        name=name,
        digest=digest(name, arguments),
        request=lambda: f"{name}({arguments})",
        id=call_id,
        dumps=dumps,
        loads=loads,
        arguments=((), _parsed(arguments)),
    )


def _same(value: Any) -> Any:
    return value


def _parsed(arguments: str) -> dict[str, Any]:
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        return {"input": arguments}
    return found if isinstance(found, dict) else {"input": found}


def _storing(tool: Any, context: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return how the outcome of a function tool is stored: its output, and what the tool has said of it beside."""
    kinds: list[type] = []

    def dumps(outcome: Any) -> dict[str, Any]:
        kinds.append(type(outcome))
        stored = {"output": _output(tool, context, outcome.output), "generated": outcome.is_sdk_generated_error}
        if getattr(context, "_custom_data", None):
            stored["custom"] = _storable(context._custom_data)
        return stored

    def loads(stored: dict[str, Any]) -> Any:
        from agents.tool import _FunctionToolInvocationResult

        if stored.get("custom") and hasattr(context, "_custom_data"):
            context._custom_data = stored["custom"]
        return _FunctionToolInvocationResult(stored["output"], is_sdk_generated_error=stored["generated"])

    return dumps, loads


def _output(tool: Any, context: Any, output: Any) -> Any:
    try:
        _CODEC.dumps_typed(output)
    except Exception as error:
        agent = getattr(context, "agent", None)
        if getattr(agent, "tool_use_behavior", "run_llm_again") != "run_llm_again":
            raise SerializationError(
                f"the output of tool {tool.name!r}, which may be the output of the run, cannot be stored: {error}. "
                "Return plain data, pydantic models or dataclasses"
            ) from error
        # The SDK makes a text of it for the model, so that is what the tool gave.
        return str(output)
    return output


def _storable(value: Any) -> Any:
    """Return a value as it can be stored: of what cannot be, its text."""
    try:
        _CODEC.dumps_typed(value)
    except Exception as error:
        logger.warning("a %s is recorded as text: %s", type(value).__qualname__, error)
        return str(value)
    return value


# --- other local tools: the SDK's own handling stays, only what has the effect is a step


def surrounded(execute: Any, wrap: Callable[[Any, steps.Scope, Place], Any]) -> Any:
    """Return the SDK's `execute` of a kind of tool, with the tool's own function a step.

    Args:
        wrap: Returns the call of the tool with the function wrapped.
    """
    function = execute.__func__

    async def surround(cls: Any, /, **kwargs: Any) -> Any:
        found = _where()
        name = "action" if "action" in kwargs else "call"
        if found is not None:
            kwargs[name] = wrap(kwargs[name], *found)
        return await function(cls, **kwargs)

    return classmethod(surround)


def _called(call: Any) -> tuple[str, str]:
    raw = call.tool_call

    def get(name: str) -> Any:
        return raw.get(name) if isinstance(raw, dict) else getattr(raw, name, None)

    said = {name: get(name) for name in ("action", "actions", "operation", "operations", "input", "arguments")}
    shown = json.dumps({key: value for key, value in said.items() if value is not None}, default=_shown, sort_keys=True)
    return str(get("call_id") or get("id") or ""), shown


def _shown(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json", exclude_none=True) if callable(dump) else str(value)


async def _awaited(made: Any) -> Any:
    return await made if hasattr(made, "__await__") else made


def with_executor(attribute: str, function: str) -> Callable[[Any, steps.Scope, Place], Any]:
    """Return what wraps the function of a shell, local shell or custom tool."""

    def wrap(call: Any, scope: steps.Scope, place: Place) -> Any:
        tool = getattr(call, attribute)
        original = getattr(tool, function, None)
        if original is None:
            return call
        call_id, shown = _called(call)

        async def run(*args: Any) -> Any:
            return await step(scope, place, _tool_call(tool.name, call_id, shown), lambda: _awaited(original(*args)))

        return replace(call, **{attribute: _changed(tool, function, run)})

    return wrap


def _changed(tool: Any, name: str, value: Any) -> Any:
    clone = copy.copy(tool)
    object.__setattr__(clone, name, value)
    return clone


class _Journaled:
    """An editor or a computer whose methods are steps of one tool call; all else is its own."""

    def __init__(self, target: Any, name: str, call_id: str, scope: steps.Scope, place: Place) -> None:
        self._outlast = (target, name, call_id, scope, place)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._outlast[0])

    def __getattr__(self, method: str) -> Any:
        target, name, call_id, scope, place = self._outlast
        found = getattr(target, method)
        if method.startswith("_") or not callable(found):
            return found

        async def run(*args: Any, **kwargs: Any) -> Any:
            number = place.number(f"{call_id} {method}")
            shown = json.dumps([list(args), kwargs], default=_shown, sort_keys=True)
            call = _tool_call(f"{name}.{method}", f"{call_id}#{number}", shown)
            return await step(scope, place, call, lambda: _awaited(found(*args, **kwargs)))

        # The SDK looks which arguments a driver's method takes.
        run.__wrapped__ = found  # type: ignore[attr-defined]
        return run


def with_methods(attribute: str, target: str) -> Callable[[Any, steps.Scope, Place], Any]:
    """Return what wraps the editor of an apply-patch tool."""

    def wrap(call: Any, scope: steps.Scope, place: Place) -> Any:
        tool = getattr(call, attribute)
        call_id, _ = _called(call)
        journaled = _Journaled(getattr(tool, target), tool.name, call_id, scope, place)
        return replace(call, **{attribute: _changed(tool, target, journaled)})

    return wrap


def capture_computer(capture: Any) -> Any:
    """Return the SDK's `_execute_action_and_capture` with every action on the computer a step."""
    function = capture.__func__

    async def captured(cls: Any, computer: Any, tool_call: Any) -> Any:
        found = _where()
        if found is not None:
            computer = _Journaled(computer, "computer", tool_call.call_id, *found)
        return await function(cls, computer, tool_call)

    return classmethod(captured)


# --- guardrails


def _guardrail_call(name: str, key: str, dumps: Callable[[Any], Any], loads: Callable[[Any], Any]) -> StepCall:
    return StepCall(
        type="guardrail", name=name, digest="", request=lambda: name, key=f"guardrail/{key}", dumps=dumps, loads=loads
    )


def _info(output: GuardrailFunctionOutput) -> dict[str, Any]:
    return {"info": _storable(output.output_info), "triggered": output.tripwire_triggered}


def _output_of(stored: dict[str, Any]) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=stored["info"], tripwire_triggered=stored["triggered"])


def run_input_guardrail(original: Any) -> Any:
    """Return `InputGuardrail.run` as a step."""

    async def run(self: Any, agent: Any, input: Any, context: Any) -> Any:
        found = _where()
        if found is None:
            return await original(self, agent, input, context)
        name = self.get_name()
        number = found[1].number(f"guardrail {name}")
        call = _guardrail_call(
            name, f"{name}#{number}", lambda result: _info(result.output),
            lambda stored: InputGuardrailResult(guardrail=self, output=_output_of(stored)),
        )  # fmt: skip
        return await step(*found, call, lambda: original(self, agent, input, context))

    return run


def run_output_guardrail(original: Any) -> Any:
    """Return `OutputGuardrail.run` as a step."""

    async def run(self: Any, context: Any, agent: Any, agent_output: Any) -> Any:
        found = _where()
        if found is None:
            return await original(self, context, agent, agent_output)
        name = self.get_name()
        number = found[1].number(f"guardrail {name}")

        def loads(stored: dict[str, Any]) -> Any:
            return OutputGuardrailResult(
                guardrail=self, agent=agent, agent_output=agent_output, output=_output_of(stored)
            )

        call = _guardrail_call(name, f"{name}#{number}", lambda result: _info(result.output), loads)
        return await step(*found, call, lambda: original(self, context, agent, agent_output))

    return run


def run_tool_guardrail(original: Any) -> Any:
    """Return `ToolInputGuardrail.run` or `ToolOutputGuardrail.run` as a step."""

    async def run(self: Any, data: Any) -> Any:
        found = _where()
        if found is None:
            return await original(self, data)
        name = self.get_name()
        key = f"{type(self).__name__} {name} {getattr(data.context, 'tool_call_id', '')}"
        number = found[1].number(key)
        call = _guardrail_call(
            name, f"{key}#{number}",
            lambda output: {"info": _storable(output.output_info), "behavior": dict(output.behavior)},
            lambda stored: ToolGuardrailFunctionOutput(output_info=stored["info"], behavior=stored["behavior"]),
        )  # fmt: skip
        return await step(*found, call, lambda: original(self, data))

    return run


# --- handoffs


def execute_handoffs(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return the SDK's `execute_handoffs` with `on_handoff` a step."""

    async def execute(**kwargs: Any) -> Any:
        found = _where()
        run_handoffs = kwargs.get("run_handoffs")
        if found is not None and run_handoffs:
            first = run_handoffs[0]
            kwargs["run_handoffs"] = [replace(first, handoff=_handoff(first, *found)), *run_handoffs[1:]]
        return await original(**kwargs)

    return execute


def _handoff(run: Any, scope: steps.Scope, place: Place) -> Any:
    handoff = run.handoff
    target = handoff._agent_ref() if handoff._agent_ref is not None else None
    if target is None:
        # Which agent it will be only its function knows.
        return handoff
    original = handoff.on_invoke_handoff

    async def invoke(context: Any, arguments: str) -> Any:
        call = StepCall(
            type="handoff",
            name=handoff.tool_name,
            digest=digest(handoff.tool_name, arguments or ""),
            request=lambda: f"{handoff.tool_name}({arguments})",
            id=run.tool_call.call_id,
            dumps=lambda agent: None,
            loads=lambda stored: target,
        )
        return await step(scope, place, call, lambda: original(context, arguments))

    return _changed(handoff, "on_invoke_handoff", invoke)
