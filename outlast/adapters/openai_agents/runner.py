"""Runner: the SDK's Runner, with runs that survive the process."""

from __future__ import annotations

import functools
from typing import Any

from agents import Agent, RunResult
from agents import Runner as SDKRunner
from agents.result import RunResultStreaming
from agents.run_config import DEFAULT_MAX_TURNS

from outlast.adapters.openai_agents.face import DurableAgent, IfBusy
from outlast.adapters.openai_agents.handle import AgentRun
from outlast.adapters.openai_agents.place import here
from outlast.recovery.runtime import Runtime, default_runtime


class Runner:
    """Has the methods of `agents.Runner`, with the same arguments and results; the runs are durable.

    Beside the SDK's arguments each takes:

    * `run_id`: names the run; called again with it, in this process or another, the same run is waited for. Without it
      a run has a name of its own that nobody can ask for again.
    * `thread_id`: runs of one thread come one after another; by default each run has a thread of its own.
    * `if_busy`: what happens if the thread is busy: `queue` or `reject`.

    An agent is known by its name: give agents of different kinds different names. Options (policies, a budget, a
    store, a name of its own) are given to `durable(agent, ...)`, whose result takes the place of the agent here.
    Inside of a durable run these methods are those of `agents.Runner`: the run in it is a part of the durable one.
    """

    @classmethod
    async def run(
        cls,
        starting_agent: Agent[Any] | DurableAgent,
        input: Any,
        *,
        context: Any = None,
        max_turns: int | None = DEFAULT_MAX_TURNS,
        hooks: Any = None,
        run_config: Any = None,
        error_handlers: Any = None,
        previous_response_id: str | None = None,
        auto_previous_response_id: bool = False,
        conversation_id: str | None = None,
        session: Any = None,
        run_id: str | None = None,
        thread_id: str | None = None,
        if_busy: IfBusy | None = None,
    ) -> RunResult:
        """Run an agent durably on this event loop. See `agents.Runner.run`, and the class for the arguments beside.

        Raises:
            RunFailedError: If the run failed in another process. In this one the SDK's own exception is raised.
            RunWaitsError: If the run waits for an answer to a question of outlast.
            SerializationError: If input or context cannot be stored; nothing has begun then.
        """
        options = _options(
            context, max_turns, hooks, run_config, error_handlers, previous_response_id, auto_previous_response_id,
            conversation_id, session,
        )  # fmt: skip
        if here() is not None:
            return await SDKRunner.run(_plain(starting_agent), input, **options)
        durable, agent = of(starting_agent)
        return await durable.run(input, agent=agent, run_id=run_id, thread_id=thread_id, if_busy=if_busy, **options)

    @classmethod
    def run_sync(
        cls,
        starting_agent: Agent[Any] | DurableAgent,
        input: Any,
        *,
        context: Any = None,
        max_turns: int | None = DEFAULT_MAX_TURNS,
        hooks: Any = None,
        run_config: Any = None,
        error_handlers: Any = None,
        previous_response_id: str | None = None,
        auto_previous_response_id: bool = False,
        conversation_id: str | None = None,
        session: Any = None,
        run_id: str | None = None,
        thread_id: str | None = None,
        if_busy: IfBusy | None = None,
    ) -> RunResult:
        """Run an agent durably, from sync code. Sync face of `run`."""
        options = _options(
            context, max_turns, hooks, run_config, error_handlers, previous_response_id, auto_previous_response_id,
            conversation_id, session,
        )  # fmt: skip
        if here() is not None:
            return SDKRunner.run_sync(_plain(starting_agent), input, **options)
        durable, agent = of(starting_agent)
        return durable.run_sync(input, agent=agent, run_id=run_id, thread_id=thread_id, if_busy=if_busy, **options)

    @classmethod
    def run_streamed(
        cls,
        starting_agent: Agent[Any] | DurableAgent,
        input: Any,
        *,
        context: Any = None,
        max_turns: int | None = DEFAULT_MAX_TURNS,
        hooks: Any = None,
        run_config: Any = None,
        error_handlers: Any = None,
        previous_response_id: str | None = None,
        auto_previous_response_id: bool = False,
        conversation_id: str | None = None,
        session: Any = None,
        run_id: str | None = None,
        thread_id: str | None = None,
        if_busy: IfBusy | None = None,
    ) -> RunResultStreaming:
        """Run an agent durably and stream its events. See `agents.Runner.run_streamed`, and `DurableAgent`."""
        options = _options(
            context, max_turns, hooks, run_config, error_handlers, previous_response_id, auto_previous_response_id,
            conversation_id, session,
        )  # fmt: skip
        if here() is not None:
            return SDKRunner.run_streamed(_plain(starting_agent), input, **options)
        durable, agent = of(starting_agent)
        return durable.run_streamed(input, agent=agent, run_id=run_id, thread_id=thread_id, if_busy=if_busy, **options)

    @classmethod
    def start(cls, starting_agent: Agent[Any] | DurableAgent, input: Any, **kwargs: Any) -> AgentRun:
        """Submit a run and return at once. See `DurableAgent.start`."""
        durable, agent = of(starting_agent)
        return durable.start(input, agent=agent, **kwargs)

    @classmethod
    def get_run(cls, starting_agent: Agent[Any] | DurableAgent, run_id: str) -> AgentRun:
        """Return a handle on a run that was submitted before, by any process.

        Raises:
            RunNotFoundError: If there is no such run.
        """
        return of(starting_agent)[0].get_run(run_id)


def of(agent: Agent[Any] | DurableAgent, runtime: Runtime | None = None) -> tuple[DurableAgent, Agent[Any]]:
    """Return the durable form of an agent: that which `durable(agent)` made, or a new one; and the agent.

    Raises:
        TypeError: If it is no agent.
        DuplicateAgentError: If an agent of another kind has its name.
    """
    if isinstance(agent, DurableAgent):
        return agent, agent.agent
    if not isinstance(agent, Agent):
        raise TypeError(
            f"Runner takes an agents.Agent, or what durable(agent) returned; got {type(agent).__qualname__}"
        )
    runtime = runtime or default_runtime()
    for known in runtime.agents.values():
        if isinstance(known, DurableAgent) and known.agent is agent:
            return known, agent
    found = runtime.agents.get(agent.name)
    made = functools.partial(DurableAgent, agent, agent.name, runtime)
    if isinstance(found, DurableAgent) and found._is_same(_Shape(agent)):
        return found, agent
    return made(), agent


class _Shape(DurableAgent):
    """An agent to compare with, not registered."""

    def __init__(self, agent: Agent[Any]) -> None:
        self.agent = agent


def _plain(agent: Agent[Any] | DurableAgent) -> Agent[Any]:
    return agent.agent if isinstance(agent, DurableAgent) else agent


def _options(
    context: Any, max_turns: Any, hooks: Any, run_config: Any, error_handlers: Any, previous_response_id: Any,
    auto_previous_response_id: Any, conversation_id: Any, session: Any,
) -> dict[str, Any]:  # fmt: skip
    options = {
        "context": context, "hooks": hooks, "run_config": run_config, "error_handlers": error_handlers,
        "previous_response_id": previous_response_id, "conversation_id": conversation_id, "session": session,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    given["max_turns"] = max_turns
    if auto_previous_response_id:
        given["auto_previous_response_id"] = True
    return given
