"""What a run comes to, as a record: the SDK's own RunState, the final output, and the context."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from agents import Agent, RunResult, RunState
from agents.items import ToolApprovalItem

from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.adapters.openai_agents.context import ContextCodec, Contexts
from outlast.errors import OutlastError, SerializationError
from outlast.recovery.runs import Typed
from outlast.recovery.steps import Question

CODEC: Final = AgentsCodec()
T = TypeVar("T")


@dataclass(frozen=True)
class Approval:
    """A tool call that waits for a person.

    Attributes:
        id: Id of the call; an answer names it.
        tool: Name of the tool.
        arguments: What it is to be called with, as the model gave it.
        agent: Name of the agent that wants to call it.
    """

    id: str
    tool: str
    arguments: str
    agent: str


class RunWaitsError(OutlastError):
    """The run waits for an answer to a question of outlast: a step in doubt, or a budget used up.

    Attributes:
        question: The question; answer it with the run's handle.
    """

    def __init__(self, run_id: str, question: Question) -> None:
        super().__init__(
            f"run {run_id!r} waits: {question.text}. Answer it: Runner.get_run(agent, {run_id!r}).answer(done(...) | "
            "again() | fail() | allow(...)), or `outlast answer`"
        )
        self.question = question


def encode(result: Any, contexts: Contexts, stretch: int, told: list[Typed] | None) -> Typed:
    """Return the record of what an attempt has come to.

    Args:
        stretch: How often the run had waited for approvals before.
        told: What readers were told, where that is more than the result has.

    Raises:
        SerializationError: If the final output cannot be stored.
    """
    pending = list(result.interruptions)
    try:
        output = CODEC.dumps_typed(result.final_output)
    except SerializationError as error:
        raise SerializationError(f"the final output of this run cannot be stored: {error}") from error
    return CODEC.dumps_typed(
        {
            "kind": "waiting" if pending else "done",
            "stretch": stretch,
            "output": list(output),
            "state": dumps_state(result.to_state()),
            "context": contexts.encoded(),
            "told": told and [list(typed) for typed in told],
            "approvals": [vars(_approval(item)) for item in pending],
        }
    )


def encode_question(question: Question, before: str) -> Typed:
    """Return the record of a run that waits for an answer to outlast.

    Args:
        before: Name of the record of what the run had come to before.
    """
    return CODEC.dumps_typed({"kind": "question", "question": vars(question), "before": before})


def decode(typed: Typed) -> dict[str, Any]:
    """Return the contents of a record."""
    body: dict[str, Any] = CODEC.loads_typed(typed)
    return body


def approvals(body: Mapping[str, Any]) -> list[Approval]:
    """Return what a waiting run waits for."""
    return [Approval(**item) for item in body.get("approvals", ())]


def _approval(item: ToolApprovalItem) -> Approval:
    return Approval(approval_id(item), item.name or "", item.arguments or "", getattr(item.agent, "name", ""))


def approval_id(item: ToolApprovalItem) -> str:
    """Return what an answer to an approval names it by."""
    raw: Any = item.raw_item
    own = raw.get("id") if isinstance(raw, dict) else getattr(raw, "id", None)
    return str(item.call_id or own or item.name)


# --- states


def dumps_state(state: RunState[Any]) -> str:
    """Return a RunState as text, without the context object, which is kept beside it."""
    return json.dumps(state_body(state), separators=(",", ":"))


def state_body(state: RunState[Any]) -> dict[str, Any]:
    """Return a RunState as a tree of its own, without the context object."""
    assert state._context is not None
    context, state._context.context = state._context.context, None
    try:
        body = state.to_json(context_serializer=lambda context: {})
    finally:
        state._context.context = context
    # Some of it is the run's own, which changes.
    body = json.loads(json.dumps(body))
    _strip(body)
    return cast(dict[str, Any], body)


def _strip(value: Any) -> None:
    """Remove the contexts of nested runs, which are the run's own, and what the SDK would refuse to read again."""
    if isinstance(value, list):
        for item in value:
            _strip(item)
    elif isinstance(value, dict):
        if "context_meta" in value:
            value["context"] = {} if value["context"] is not None else None
        if isinstance(value.get("context"), dict) and "tool_invocations" in value["context"]:
            _forget_filtered(value)
        for item in value.values():
            _strip(item)


def _forget_filtered(state: dict[str, Any]) -> None:
    """Remove finished calls whose items an input filter took out of the history: the SDK takes them for corruption."""
    lists = [state.get("generated_items"), state.get("session_items"), state.get("original_input")]
    lists.append((state.get("last_processed_response") or {}).get("new_items"))
    found: dict[str, set[bool]] = {}
    for item in (item for items in lists if isinstance(items, list) for item in items if isinstance(item, dict)):
        raw = item.get("raw_item", item)
        if isinstance(raw, dict):
            call_id = str(raw.get("call_id") or raw.get("id"))
            found.setdefault(call_id, set()).add(str(raw.get("type")).endswith("_output"))
    invocations = state["context"]["tool_invocations"] or {}
    for call_id, invocation in list(invocations.items()):
        if invocation.get("completed") and found.get(call_id) != {True, False}:
            del invocations[call_id]


async def loads_state(agent: Agent[Any], text: str, context: Any) -> RunState[Any]:
    """Return the RunState that `dumps_state` was given, with a context object."""
    state: RunState[Any] = await RunState.from_json(
        agent, json.loads(text), context_deserializer=lambda stored: context
    )
    assert state._context is not None
    state._context.context = context
    return state


async def rebuild(agent: Agent[Any], body: Mapping[str, Any], contexts: ContextCodec, context: Any) -> RunResult:
    """Return the result that a run in another process has come to.

    Args:
        context: The caller's own context object, to be brought to where the run has left it; None to make one.
    """
    typed = body["context"]
    if typed and context is not None:
        contexts.restore(context, (typed[0], typed[1]))
    elif typed:
        context = contexts.decode((typed[0], typed[1]))
    state = await loads_state(agent, body["state"], context)
    kind, data = body["output"]
    assert state._context is not None
    result = RunResult(
        input=state._original_input,
        new_items=list(state._session_items),
        raw_responses=list(state._model_responses),
        final_output=CODEC.loads_typed((kind, data)),
        input_guardrail_results=state._input_guardrail_results,
        output_guardrail_results=state._output_guardrail_results,
        tool_input_guardrail_results=state._tool_input_guardrail_results,
        tool_output_guardrail_results=state._tool_output_guardrail_results,
        context_wrapper=state._context,
        _last_agent=cast(Agent[Any], state._current_agent),
        _last_processed_response=state._last_processed_response,
        _tool_use_tracker_snapshot=state.get_tool_use_tracker_snapshot(),
        _current_turn_persisted_item_count=state._current_turn_persisted_item_count,
        _current_turn=state._current_turn,
        _model_input_items=list(state._generated_items),
        _original_input=state._original_input,
        _conversation_id=state._conversation_id,
        _previous_response_id=state._previous_response_id,
        _auto_previous_response_id=state._auto_previous_response_id,
        max_turns=state._max_turns,
        interruptions=state.get_interruptions(),
    )
    result._replay_from_model_input_items = state._generated_items != state._session_items
    result._reasoning_item_id_policy = state._reasoning_item_id_policy
    result._trace_state = state._trace_state
    result._starting_agent_for_state = state._starting_agent
    # `to_state` takes from here what a result has no field for.
    result._state = state  # type: ignore[attr-defined]
    return result


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns, from sync code, whether or not a loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    made: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            made.append(asyncio.run(coroutine))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="outlast-decode")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
