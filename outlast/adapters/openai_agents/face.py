"""DurableAgent: an OpenAI agent whose runs survive the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
import uuid
from dataclasses import replace
from typing import Any, Literal

from agents import Agent, RunConfig, RunResult, RunState
from agents.result import RunResultStreaming

from outlast.adapters import loops
from outlast.adapters.openai_agents import payload, results, seams, streams
from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.adapters.openai_agents.context import PLAIN, ContextCodec
from outlast.adapters.openai_agents.drive import RUN_ID, Drive, reached_from
from outlast.adapters.openai_agents.handle import AgentRun
from outlast.adapters.openai_agents.place import locate
from outlast.errors import RunNotFoundError
from outlast.recovery import runs, steps
from outlast.recovery.attempt import Attachment, Attempt, Outcome
from outlast.recovery.budget import Budget
from outlast.recovery.failures import describe
from outlast.recovery.policy import Policies
from outlast.recovery.runs import RunHead, RunInput, Typed
from outlast.recovery.runtime import Runtime

logger = logging.getLogger("outlast.worker")

IfBusy = Literal["queue", "reject"]


class DurableAgent:
    """Runs of an agent that survive `kill -9` and go on by themselves. The agent is not changed.

    Args:
        agent: The agent that runs begin with.
        name: Finds the runs again after a restart.
        runtime: The state store and worker to use.
        if_busy: What a submission does if its thread has an unfinished run: wait for its turn, or raise
            ThreadBusyError.
        policies: What to do when model calls, tool calls, marked functions and runs fail.
        budget: What a run may spend.
        context_codec: How context objects are stored that are no plain data, pydantic models or dataclasses.
        hooks, error_handlers, run_config, session: Used for runs whose caller is not in the process that carries them
            on; a session may be a function of the session's id.

    Raises:
        TypeError: If the agent, or one it may hand off to or call, works in a sandbox.
        DuplicateAgentError: If another agent of this process has the name.
        UnsupportedSDKError: If this release of openai-agents lacks what outlast needs.
    """

    def __init__(
        self,
        agent: Agent[Any],
        name: str,
        runtime: Runtime,
        *,
        if_busy: IfBusy = "queue",
        policies: Policies | None = None,
        budget: Budget | None = None,
        context_codec: ContextCodec = PLAIN,
        hooks: Any = None,
        error_handlers: Any = None,
        run_config: RunConfig | dict[str, Any] | None = None,
        session: Any = None,
    ) -> None:
        self.name: str = name
        self.agent = agent
        self.runtime = runtime
        self.policies = policies or Policies()
        self.budget = budget or Budget()
        self.codec = AgentsCodec()
        self.context_codec = context_codec
        self._runtime = runtime
        self._if_busy: IfBusy = if_busy
        given = {"hooks": hooks, "error_handlers": error_handlers, "run_config": run_config}
        self._defaults = {**payload.checked(given), "session": session}
        _refuse_sandboxes(agent)
        seams.activate()
        runtime.register(self, self._is_same)

    def __repr__(self) -> str:
        return f"DurableAgent({self.name!r})"

    def _is_same(self, other: object) -> bool:
        return isinstance(other, DurableAgent) and (
            other.agent is self.agent
            or [getattr(tool, "name", "") for tool in other.agent.tools]
            == [getattr(tool, "name", "") for tool in self.agent.tools]
        )

    # --- running, as the SDK's Runner has it

    async def run(self, input: Any, **kwargs: Any) -> RunResult:
        """Run the agent durably on this event loop; arguments as of `Runner.run`, and `run_id`, `thread_id`, `if_busy`.

        Raises:
            RunFailedError: If the run failed in another process. In this one the SDK's own exception is raised.
            RunWaitsError: If the run waits for an answer to outlast.
            SerializationError: If input or context cannot be stored; nothing has begun then.
        """
        handle = await self.astart(input, **kwargs)
        try:
            return await handle.aresult()
        finally:
            handle.close()

    def run_sync(self, input: Any, **kwargs: Any) -> RunResult:
        """Run the agent durably. Sync face of `run`."""
        handle = self.start(input, **kwargs)
        try:
            return handle.result()
        finally:
            handle.close()

    def run_streamed(self, input: Any, **kwargs: Any) -> RunResultStreaming:
        """Run the agent durably on this event loop; `stream_events()` of the result yields its events.

        The run goes on when its reader goes away; one that comes back, by the same call with the same `run_id`, gets
        each run item once. `cancel()` ends the run.
        """
        return streams.begin(self, input, kwargs)

    # --- runs

    def start(
        self,
        input: Any,
        *,
        run_id: str | None = None,
        thread_id: str | None = None,
        if_busy: IfBusy | None = None,
        **options: Any,
    ) -> AgentRun:
        """Submit a run and return at once; from then on it will be carried out, whatever happens to this process.

        Args:
            input: As for the SDK's Runner: text, items, or a RunState; that of a waiting durable run answers it.
            run_id: Names the submission: the same run_id is the same run, however often it is submitted.
            thread_id: Runs of one thread come one after another; by default each run has a thread of its own.
            if_busy: Overrides what the agent does if the thread is busy.
            **options: As for the SDK's Runner.

        Raises:
            RunConflictError: If `run_id` is another submission.
            ThreadBusyError: If the thread is busy and `if_busy="reject"`.
            SerializationError: If input or context cannot be stored.
            SidecarUnavailableError: If no sidecar answers.
        """
        return self.begin(input, options, run_id=run_id, thread_id=thread_id, if_busy=if_busy)

    async def astart(
        self,
        input: Any,
        *,
        run_id: str | None = None,
        thread_id: str | None = None,
        if_busy: IfBusy | None = None,
        **options: Any,
    ) -> AgentRun:
        """Submit a run that is carried out on this event loop while it lives; else as `start`."""
        attachment = Attachment(loop=asyncio.get_running_loop())
        return await asyncio.to_thread(
            self.begin, input, options, run_id=run_id, thread_id=thread_id, if_busy=if_busy, attachment=attachment
        )

    def get_run(self, run_id: str) -> AgentRun:
        """Return a handle on a run that was submitted before, by any process.

        Raises:
            RunNotFoundError: If there is no such run.
        """
        self._runtime.client.run(runs.read(run_id))
        self._runtime.start_worker()
        return AgentRun(self, run_id)

    def begin(
        self,
        input: Any,
        options: dict[str, Any],
        mode: payload.Mode = "run",
        *,
        run_id: str | None = None,
        thread_id: str | None = None,
        if_busy: IfBusy | None = None,
        attachment: Attachment | None = None,
        agent: Agent[Any] | None = None,
    ) -> AgentRun:
        """Submit a run, or answer one that waits. For `start` and the streams."""
        agent = options.pop("agent", None) or agent
        options = payload.checked(options)
        attachment = attachment or Attachment()
        attachment.extras |= {"options": options, "agent": agent}
        if isinstance(input, RunState):
            run_id = run_id or run_of(input)
            waiting = self._waiting(run_id) if run_id else None
            if waiting is not None:
                handle = AgentRun(self, waiting, attachment)
                self._runtime.attach(waiting, attachment)
                handle.resume(input)
                return handle
            input = {"state": results.dumps_state(input)}
        run_id = run_id or str(uuid.uuid4())
        thread_id = thread_id or run_id
        submitted = RunInput(
            agent=self.name,
            thread_id=thread_id,
            payload=payload.encode(input, options, mode, self.context_codec),
            fingerprint=payload.fingerprint(self.name, thread_id, input),
        )
        handle = AgentRun(self, run_id, attachment)
        try:
            mine = self._runtime.submit(
                run_id, submitted, queue=(if_busy or self._if_busy) == "queue", attach=attachment
            )
        except BaseException:
            handle.close()
            raise
        if not mine:
            self._bring_parts(run_id)
        return handle

    def told(self, state: RunState[Any], run_id: str | None) -> list[Typed]:
        """Return what readers were told of the waiting run that a state is of. For the streams."""
        run_id = self._waiting(run_id or run_of(state) or "")
        if run_id is None:
            return []
        handle = AgentRun(self, run_id)
        try:
            return handle.told(self._runtime.client.run(runs.read(run_id)))
        finally:
            handle.close()

    def _waiting(self, run_id: str) -> str | None:
        try:
            head = self._runtime.client.run(runs.read(run_id))
        except RunNotFoundError:
            return None
        return run_id if head.status == "waiting" else None

    def _bring_parts(self, run_id: str) -> None:
        """Wake a run that sleeps for want of what its caller, who is here now, has."""

        def now_here(now: RunHead) -> RunHead | None:
            if now.status != "sleeping" or not now.until or not now.error or now.error[0] != _MISSING:
                return None
            return replace(now, until=0.0)

        if self._runtime.client.run(runs.change(run_id, now_here)).status == "sleeping":
            self._runtime.wake(run_id)

    # --- the controller's side

    def advance(self, attempt: Attempt) -> Outcome:
        """Carry a run on. Called by the controller."""
        submitted = payload.decode(attempt.submitted.payload)
        extras = attempt.attachment.extras if attempt.attachment else {}
        given = extras.get("options", {})
        try:
            options = payload.options_of(submitted, given, self._defaults, attempt.run_id)
        except payload.MissingPartsError as error:
            logger.warning("%s", error)
            wait = min(0.2 * 1.5 ** min(attempt.head.attempts, 20), 30.0)
            return Outcome("sleeping", error=describe(error), until=time.time() + wait)
        agent = extras.get("agent") or self.agent
        drive = Drive(agent, self._runtime, attempt, submitted, options, given.get("context"), self.context_codec)
        # In this thread's context, which asyncio hands on to all that runs in it.
        steps.enter(attempt, locate)
        loop = attempt.loop = loops.choose(attempt.attachment.loop if attempt.attachment else None)
        try:
            return asyncio.run_coroutine_threadsafe(drive.carry(), loop).result()
        except (concurrent.futures.CancelledError, asyncio.CancelledError):
            # The caller's loop ended in the middle; the next attempt goes on without it.
            return Outcome("yielded")


def _refuse_sandboxes(agent: Agent[Any]) -> None:
    """Refuse an agent whose tools work in a sandbox.

    Raises:
        TypeError: If it, or one it may hand off to or call, is such an agent.
    """
    for found in reached_from(agent):
        if any(kind.__module__.startswith("agents.sandbox") for kind in type(found).__mro__):
            raise TypeError(
                f"agent {found.name!r} works in a sandbox, whose files and processes are lost with its worker: it "
                "cannot be made durable. Give it tools that reach what they need from any process"
            )


_MISSING = f"{payload.MissingPartsError.__module__}.{payload.MissingPartsError.__qualname__}"


def run_of(state: RunState[Any]) -> str | None:
    """Return the durable run that a state is of, if it is of one."""
    own = getattr(state, "_outlast_run_id", None)
    if own is None and state._trace_state is not None:
        own = (state._trace_state.metadata or {}).get(RUN_ID)
    return own if isinstance(own, str) else None
