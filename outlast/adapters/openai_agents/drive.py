"""One attempt of an OpenAI Agents run: the SDK's own Runner runs, and what is recorded is not done again."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Final

from agents import Agent, Handoff, RunConfig, RunState

from outlast.adapters.openai_agents import events, results
from outlast.adapters.openai_agents.checkpoints import Checkpoints
from outlast.adapters.openai_agents.context import ContextCodec, Contexts
from outlast.adapters.openai_agents.place import Place, Track, within
from outlast.adapters.openai_agents.seams import sdk_runner
from outlast.adapters.openai_agents.sessions import journaled
from outlast.errors import FencedError
from outlast.recovery import runs
from outlast.recovery.attempt import Attempt, Outcome
from outlast.recovery.ending import stopped
from outlast.recovery.failures import away, describe
from outlast.recovery.runs import RunHead, Typed
from outlast.recovery.runtime import Runtime

RUN_ID: Final = "outlast_run_id"
"""Key of a trace's metadata that names the run."""


class Drive:
    """Carries one attempt on.

    Args:
        agent: The agent to begin with.
        runtime: The store.
        attempt: The attempt.
        submitted: What `payload.decode` returned.
        options: Arguments for the SDK's Runner, but the context.
        context: The caller's own context object, if the caller is in this process.
        codec: How contexts are stored.
    """

    def __init__(
        self,
        agent: Agent[Any],
        runtime: Runtime,
        attempt: Attempt,
        submitted: Mapping[str, Any],
        options: dict[str, Any],
        context: Any,
        codec: ContextCodec,
    ) -> None:
        self.attempt = attempt
        self._agent = agent
        self._client = runtime.client
        self._runtime = runtime
        self._submitted = submitted
        self._options = options
        typed = submitted["context"]
        if context is None and typed is not None:
            context = codec.decode(typed)
        self.contexts = Contexts(context, codec)
        self._stretch = 0
        self._before = ""
        self._base: dict[str, Any] | None = None
        self._track: Track | None = None
        self._told: list[Typed] | None = None

    async def carry(self) -> Outcome:
        """Carry the run on until it ends, waits, sleeps or drains.

        Raises:
            FencedError: If another attempt has taken over.
            StoreError, SidecarUnavailableError: If the state store fails.
        """
        try:
            outcome = await self._ended()
        except BaseException:
            # What user code made of the unwinding does not matter.
            if not self.attempt.stopped:
                raise
        else:
            if not self.attempt.stopped:
                return outcome
        return self._stopped()

    @property
    def _drained(self) -> bool:
        return self._track is not None and self._track.drained

    def _stopped(self) -> Outcome:
        stop = self.attempt.stop
        if stop is not None and stop.question is not None:
            return stopped(self.attempt, results.encode_question(stop.question, self._before))
        if stop is not None and stop.error is None and self._drained:
            return Outcome("yielded")
        return stopped(self.attempt, None)

    async def _ended(self) -> Outcome:
        try:
            return await self._run()
        except Exception as error:
            if isinstance(error, FencedError) or away(error):
                raise
            return Outcome("failed", error=describe(error), exception=error)

    async def _run(self) -> Outcome:
        await asyncio.to_thread(self._read_base)
        typed = self._base["context"] if self._base else self._submitted["context"]
        self.contexts.begin((typed[0], typed[1]) if typed else None)
        track = self._track = Track(self.attempt, self.contexts)
        place = Place(track, f"s{self._stretch}" if self._stretch else "", "run")
        options = {**self._options, "context": self.contexts.value, "run_config": self._run_config()}
        if "session" in options:
            options["session"] = place.session = journaled(options["session"], place)
        checkpoints = Checkpoints(self._agent, self.attempt, place, self.contexts, self._stretch)
        start, skipped = await checkpoints.newest(await self._start())
        track.begin_after(skipped)
        with within(place), checkpoints.kept():
            async with _connected(self._agent):
                if self._submitted["mode"] == "streamed":
                    result = await self._streamed(start, options)
                else:
                    result = await sdk_runner().run(self._agent, start, **options)
        self.attempt.check()
        if getattr(result, "_cancel_mode", "none") == "immediate":
            # The run is cancelled, which the next attempt finds.
            return Outcome("yielded")
        self._show(result)
        encoded = results.encode(result, self.contexts, self._stretch, self._told)
        return Outcome("waiting" if result.interruptions else "done", result=encoded)

    # --- where the attempt begins

    def _read_base(self) -> None:
        """Read what the run had come to when it waited for approvals last."""
        head = self.attempt.head
        self._before = head.result
        while self._before:
            body = results.decode(self._client.run(runs.read_typed(head.run_id, self._before)))
            if body["kind"] == "question":
                self._before = body["before"]
                continue
            self._base, self._stretch = body, body["stretch"] + 1
            break
        if head.signals and not head.taken:
            self.attempt.head = self._client.run(runs.change(head.run_id, self._taking))

    def _taking(self, now: RunHead) -> RunHead | None:
        """Note which answers this attempt applies, so that they are spent when it ends."""
        if now.running != self.attempt.head.running or now.taken:
            return None
        return replace(now, taken={"signal": now.signals[0], "signals": list(now.signals)})

    async def _start(self) -> Any:
        """Return the input for the SDK: what was submitted, or the state in which the run waited, with the answers."""
        given = copy.deepcopy(self._submitted["input"])
        if self._base is None:
            if isinstance(given, dict):
                return await results.loads_state(self._agent, given["state"], self.contexts.value)
            return given
        signals = [
            results.decode(await self._client.arun(runs.read_typed(self.attempt.run_id, name)))
            for name in self.attempt.head.signals
        ]
        text = next((signal["state"] for signal in reversed(signals) if "state" in signal), self._base["state"])
        state = await results.loads_state(self._agent, text, self.contexts.value)
        for signal in signals:
            for id, decision in signal.get("decisions", {}).items():
                decide(state, id, decision)
        return state

    def _run_config(self) -> RunConfig:
        """Return the run's RunConfig, with one trace for all attempts."""
        config: RunConfig = self._options["run_config"]
        run_id = self.attempt.run_id
        if config.trace_id is None:
            config.trace_id = f"trace_{hashlib.sha256(run_id.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
        config.trace_metadata = {**(config.trace_metadata or {}), RUN_ID: run_id}
        return config

    # --- streaming and telling

    async def _streamed(self, start: Any, options: dict[str, Any]) -> Any:
        inner = sdk_runner().run_streamed(self._agent, start, **options)
        attachment = self.attempt.attachment
        if attachment is not None:
            attachment.extras["inner"] = inner
        names, wire = events.Names(), events.Wire(self._agent)
        told: list[events.Chunk] = []
        if isinstance(start, RunState):
            names.skip_answers(len(start._model_responses))
            before = [wire.loads((kind, data)) for kind, data in (self._base or {}).get("told") or ()]
            known = [chunk.event for chunk in before if chunk is not None] or events.of_items(start._session_items)
            for event in known:
                told.append(names.chunk(event))
                await self._publish(told[-1], wire)
        async for event in inner.stream_events():
            chunk = names.chunk(event)
            if chunk.name:
                told.append(chunk)
            await self._publish(chunk, wire)
        if attachment is not None:
            attachment.extras["told"] = told
        if len(list(events.of_items(inner.new_items))) < sum(chunk.is_item for chunk in told):
            # An input filter of a handoff has taken items out of the history that readers have been told of.
            self._told = [wire.dumps(chunk) for chunk in told]
        return inner

    async def _publish(self, chunk: events.Chunk, wire: events.Wire) -> None:
        reader = self._runtime.attachment(self.attempt.run_id)
        if reader is not None and reader.chunks is not None:
            self.attempt.publish(chunk, wire.dumps)
        elif chunk.name:
            # Nobody here reads along: deltas are not worth a write each.
            await asyncio.to_thread(self.attempt.publish, chunk, wire.dumps)

    def _show(self, result: Any) -> None:
        """Hand the result itself to the caller in this process."""
        if self.attempt.attachment is not None:
            self.attempt.attachment.extras["live"] = (self.attempt.head.attempts, result)


def decide(state: RunState[Any], id: str, decision: Mapping[str, Any]) -> None:
    """Apply a person's answer to the approval of this id, if it is still pending."""
    for item in state.get_interruptions():
        if results.approval_id(item) != id:
            continue
        if decision["approve"]:
            state.approve(item, always_approve=decision.get("always", False))
        else:
            state.reject(item, always_reject=decision.get("always", False), rejection_message=decision.get("message"))


@contextlib.asynccontextmanager
async def _connected(agent: Agent[Any]) -> AsyncIterator[None]:
    """Connect the MCP servers of the agents that are not connected, as after a restart, and let them go at the end."""
    servers = [server for server in _servers(agent) if getattr(server, "session", _CONNECTED) is None]
    if not servers:
        yield
        return
    from agents.mcp import MCPServerManager

    async with MCPServerManager(servers, strict=True, drop_failed_servers=False):
        yield


_CONNECTED: Final = object()
"""Stands for a server that has no session of its own to look at."""


def reached_from(agent: Any, seen: dict[int, Agent[Any]] | None = None) -> list[Agent[Any]]:
    """Return an agent and all that it may hand off to or call."""
    seen = {} if seen is None else seen
    if isinstance(agent, Agent) and id(agent) not in seen:
        seen[id(agent)] = agent
        for other in agent.handoffs:
            target: Any = other
            if isinstance(other, Handoff):
                target = other._agent_ref() if other._agent_ref else None
            reached_from(target, seen)
        for tool in agent.tools:
            reached_from(getattr(tool, "_agent_instance", None), seen)
    return list(seen.values())


def _servers(agent: Agent[Any]) -> list[Any]:
    """Return the MCP servers of an agent and of all that it may hand off to or call."""
    found = [server for each in reached_from(agent) for server in each.mcp_servers]
    return list({id(server): server for server in found}.values())
