"""Streaming: the SDK's RunResultStreaming of a run that is carried out elsewhere, in this process or another."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
from typing import TYPE_CHECKING, Any, Final, Literal

from agents import RunState
from agents.result import RunResultStreaming
from agents.run_config import DEFAULT_MAX_TURNS
from agents.run_context import RunContextWrapper
from agents.run_internal.run_steps import QueueCompleteSentinel
from agents.stream_events import AgentUpdatedStreamEvent

from outlast.adapters.openai_agents import events
from outlast.adapters.openai_agents.handle import AgentRun, name_states
from outlast.recovery import runs
from outlast.recovery.attempt import Attachment

if TYPE_CHECKING:
    from outlast.adapters.openai_agents.face import DurableAgent

_POLL: Final = 0.05
_OWN: Final = frozenset(
    {
        "_event_queue", "_input_guardrail_queue", "run_loop_task", "_input_guardrails_task", "_output_guardrails_task",
        "_triggered_input_guardrail_result", "_stored_exception", "_cancel_mode", "_waiting_on_event_queue",
        "_active_stream_consumers", "_stream_consumers_stopped", "is_complete", "_sandbox_cleanup",
        "_sandbox_cleanup_task", "_sandbox_cleanup_callback_registered", "_sandbox_wrapped_run_loop_task",
        "_model_provider_cleanup", "_model_provider_cleanup_task", "_current_agent_ref", "_tool_error_selected",
    }
)  # fmt: skip
"""Fields that are the reader's own."""


def begin(agent: DurableAgent, input: Any, kwargs: dict[str, Any]) -> RunResultStreaming:
    """Submit a streamed run and return its result, whose events come as the run goes on."""
    loop = asyncio.get_running_loop()
    chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    attachment = Attachment(loop=loop, chunks=chunks)
    first = kwargs.get("agent") or agent.agent
    result = _Reader(
        input=input if not isinstance(input, RunState) else input._original_input,
        new_items=[],
        raw_responses=[],
        final_output=None,
        input_guardrail_results=[],
        output_guardrail_results=[],
        tool_input_guardrail_results=[],
        tool_output_guardrail_results=[],
        context_wrapper=_wrapper(kwargs.get("context")),
        current_agent=first,
        current_turn=0,
        max_turns=kwargs.get("max_turns", DEFAULT_MAX_TURNS),
        _current_agent_output_schema=None,
        trace=None,
    )
    follower = _Follower(agent, result, attachment, input)
    object.__setattr__(result, "_outlast_follower", follower)
    result.run_loop_task = asyncio.create_task(follower.follow(kwargs))
    return result


def _wrapper(context: Any) -> RunContextWrapper[Any]:
    return context if isinstance(context, RunContextWrapper) else RunContextWrapper(context=context)


class _Reader(RunResultStreaming):
    """A streamed result that follows a durable run; type and fields are the SDK's."""

    def cancel(self, mode: Literal["immediate", "after_turn"] = "immediate") -> None:
        """Cancel the run: at once, or after its turn. A reader that only goes away does not cancel it."""
        follower: _Follower = self._outlast_follower  # type: ignore[attr-defined]
        task = asyncio.current_task()
        if mode == "after_turn":
            self._cancel_mode = mode
            follower.after_turn()
            return
        if not (task is not None and task.cancelling()):
            follower.cancel()
        super().cancel(mode)


class _Follower:
    """Brings the events of a run to one reader.

    Args:
        agent: The durable agent.
        result: The reader.
        attachment: Where an attempt in this process puts its events.
        input: What was submitted.
    """

    def __init__(self, agent: DurableAgent, result: _Reader, attachment: Attachment, input: Any) -> None:
        self._agent = agent
        self._result = result
        self._attachment = attachment
        self._input = input
        self._seen = events.Seen()
        self._wire = events.Wire(agent.agent)
        self._handle: AgentRun | None = None
        self._epoch, self._number = -1, 0
        self._soft = False
        self._cancelled = False

    def cancel(self) -> None:
        """End the run."""
        self._cancelled = True
        handle, inner = self._handle, self._attachment.extras.get("inner")
        if handle is None:
            return
        loop = asyncio.get_running_loop()

        def end() -> None:
            handle.cancel()
            if inner is not None:
                # Once it is written down: what ends now ends as cancelled.
                loop.call_soon_threadsafe(inner.cancel)

        loop.run_in_executor(None, end)

    def after_turn(self) -> None:
        """End the run after its turn, if it is carried out here."""
        self._soft = True
        inner = self._attachment.extras.get("inner")
        if inner is not None:
            inner.cancel("after_turn")

    async def follow(self, kwargs: dict[str, Any]) -> None:
        """Submit the run, give its events on, and complete the result; raises what the run failed with."""
        reader = self._result
        own = {name: kwargs.pop(name) for name in ("run_id", "thread_id", "if_busy") if name in kwargs}
        first = kwargs.pop("agent", None)
        try:
            if isinstance(self._input, RunState):
                await self._skip(self._input, own.get("run_id"))
            self._handle = await asyncio.to_thread(
                self._agent.begin, self._input, kwargs, "streamed", attachment=self._attachment, agent=first, **own
            )
            if self._cancelled:
                await asyncio.to_thread(self._handle.cancel)
            await self._events()
            await self._complete(self._handle)
        finally:
            reader.is_complete = True
            reader._event_queue.put_nowait(QueueCompleteSentinel())
            if self._handle is not None:
                self._handle.close()

    async def _skip(self, state: RunState[Any], run_id: str | None) -> None:
        """What the state has, or the waiting run has told, the reader has been told of."""
        stored = await asyncio.to_thread(self._agent.told, state, run_id)
        names = events.Names()
        told = [chunk for typed in stored if (chunk := self._wire.loads(typed)) is not None]
        for chunk in told or [names.chunk(event) for event in events.of_items(state._session_items)]:
            self._seen.takes(chunk)

    async def _events(self) -> None:
        idle = 0.0
        while True:
            if self._local():
                idle = 0.0
                continue
            if idle < _POLL:
                idle += 0.005
                await asyncio.sleep(0.005)
                continue
            idle = 0.0
            chunks, over = await asyncio.to_thread(self._elsewhere)
            for chunk in chunks:
                self._take(chunk)
            if over:
                self._local()
                return

    def _local(self) -> bool:
        """Take the events that an attempt in this process has told."""
        assert self._attachment.chunks is not None
        found = False
        while True:
            try:
                chunk = self._attachment.chunks.get_nowait()
            except queue.Empty:
                return found
            found = True
            inner = self._attachment.extras.get("inner")
            if inner is not None:
                if self._soft:
                    inner.cancel("after_turn")
                _mirror(inner, self._result)
            self._take(chunk)

    def _elsewhere(self) -> tuple[list[events.Chunk], bool]:
        """Return the next events from the store, and whether the run has ended or waits."""
        assert self._handle is not None
        runtime, run_id = self._agent.runtime, self._handle.run_id
        head = runtime.client.run(runs.read(run_id))
        if head.running and head.running.epoch != self._epoch:
            self._epoch, self._number = head.running.epoch, 0
        stored = runtime.chunks(run_id, self._epoch, self._number) if self._epoch >= 0 else []
        self._number += len(stored)
        chunks = [chunk for typed in stored if (chunk := self._wire.loads(typed)) is not None]
        return chunks, (head.ended or head.idle) and not stored

    def _take(self, chunk: events.Chunk) -> None:
        if self._seen.takes(chunk):
            if isinstance(chunk.event, AgentUpdatedStreamEvent):
                self._result.current_agent = chunk.event.new_agent
            self._result._event_queue.put_nowait(chunk.event)

    async def _complete(self, handle: AgentRun) -> None:
        """Fill the result, and tell what the reader has missed."""
        live = self._attachment.extras.get("live")
        head = await handle._runtime.client.arun(runs.read(handle.run_id))
        if live is not None and live[0] == head.attempts and not head.question and head.status in ("done", "waiting"):
            found = live[1]
        else:
            found = await handle.aresult()
        _mirror(found, self._result)
        told = self._attachment.extras.get("told") if found is (live and live[1]) else None
        if told is None:
            stored = await asyncio.to_thread(handle.told, head)
            told = [chunk for typed in stored if (chunk := self._wire.loads(typed)) is not None]
        names = events.Names()
        for chunk in told or [names.chunk(event) for event in events.of_items(found.new_items)]:
            self._take(chunk)
        name_states(self._result, handle.run_id)


def _mirror(found: Any, reader: RunResultStreaming) -> None:
    """Give the reader what a result has."""
    for item in dataclasses.fields(RunResultStreaming):
        if item.name not in _OWN and item.name in vars(found):
            setattr(reader, item.name, getattr(found, item.name))
    reader.current_agent = found.last_agent
    reader.current_turn = getattr(found, "current_turn", None) or getattr(found, "_current_turn", None) or 0
    if isinstance(getattr(found, "_state", None), RunState):
        reader._state = found._state
        reader._starting_agent_for_state = found._starting_agent_for_state or found._state._starting_agent


__all__ = ["begin"]
