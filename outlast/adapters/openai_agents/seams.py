"""Where outlast takes hold of the SDK. Outside of a durable run every seam is the SDK's own function."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Final

from agents import RunState, run
from agents.guardrail import InputGuardrail, OutputGuardrail
from agents.result import RunResult, RunResultStreaming
from agents.run import AgentRunner, get_default_agent_runner, set_default_agent_runner
from agents.run_internal import model_retry, run_loop, tool_actions, tool_execution, turn_resolution
from agents.tool_guardrails import ToolInputGuardrail, ToolOutputGuardrail

from outlast.adapters.openai_agents import checkpoints, effects, models
from outlast.adapters.openai_agents.place import Place, here, within
from outlast.adapters.openai_agents.sessions import journaled
from outlast.errors import OutlastError
from outlast.recovery import steps

_ACTIVATING: Final = threading.Lock()
_HOOKED: Final = "__outlast_hook__"


class UnsupportedSDKError(OutlastError):
    """The installed release of openai-agents has not the seams that outlast needs."""


def activate() -> None:
    """Make the models, tools, guardrails, handoffs, sessions and nested runs of durable runs steps.

    Raises:
        UnsupportedSDKError: If the SDK lacks a seam; the message names it.
    """
    with _ACTIVATING:
        for owner, name, hook in _SEAMS:
            found = vars(owner).get(name)
            if found is None:
                raise UnsupportedSDKError(
                    f"openai-agents has no {owner.__name__}.{name}: this release of it is not supported yet; install "
                    "outlast[openai-agents], which has the range of releases that are"
                )
            if not hasattr(getattr(found, "__func__", found), _HOOKED):
                hooked = hook(found)
                setattr(getattr(hooked, "__func__", hooked), _HOOKED, found)
                setattr(owner, name, hooked)
        runner = get_default_agent_runner()
        if not isinstance(runner, _NestedRuns):
            set_default_agent_runner(_NestedRuns(runner))


def _get_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_model(*args: Any, **kwargs: Any) -> Any:
        return models.journaled(original(*args, **kwargs))

    return get_model


def _sleep_for_retry(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def sleep(delay: float) -> None:
        place = here()
        if place is not None and place.track.replaying:
            # The failed call is a recorded one; it has been waited for.
            delay = 0.0
        await original(delay)

    return sleep


_SEAMS: Final[list[tuple[Any, str, Callable[[Any], Any]]]] = [
    (run, "run_single_turn", checkpoints.run_single_turn),
    (run_loop, "run_single_turn_streamed", checkpoints.run_single_turn_streamed),
    (run_loop, "get_model", _get_model),
    (model_retry, "_sleep_for_retry", _sleep_for_retry),
    (tool_execution, "_invoke_function_tool_with_metadata", effects.invoke_function_tool),
    (turn_resolution, "execute_handoffs", effects.execute_handoffs),
    (InputGuardrail, "run", effects.run_input_guardrail),
    (OutputGuardrail, "run", effects.run_output_guardrail),
    (ToolInputGuardrail, "run", effects.run_tool_guardrail),
    (ToolOutputGuardrail, "run", effects.run_tool_guardrail),
    *(
        (getattr(tool_actions, kind), "execute", functools.partial(effects.surrounded, wrap=wrap))
        for kind, wrap in (
            ("ShellAction", effects.with_executor("shell_tool", "executor")),
            ("LocalShellAction", effects.with_executor("local_shell_tool", "executor")),
            ("CustomToolAction", effects.with_executor("custom_tool", "on_invoke_tool")),
            ("ApplyPatchAction", effects.with_methods("apply_patch_tool", "editor")),
        )
    ),
    (tool_actions.ComputerAction, "_execute_action_and_capture", effects.capture_computer),
]


class _NestedRuns(AgentRunner):
    """The SDK's runner; a run that begins inside a durable one (an agent as a tool, say) is a place of its own there.

    Args:
        runner: The runner in use so far.
    """

    def __init__(self, runner: AgentRunner) -> None:
        self._outlast_runner = runner

    async def run(self, starting_agent: Any, input: Any, **kwargs: Any) -> RunResult:
        """Run an agent."""
        place = _nested(starting_agent, input)
        if place is None:
            return await self._outlast_runner.run(starting_agent, input, **kwargs)
        with within(place):
            return await self._outlast_runner.run(starting_agent, input, **_wrapped(kwargs, place))

    def run_sync(self, starting_agent: Any, input: Any, **kwargs: Any) -> RunResult:
        """Run an agent from sync code."""
        place = _nested(starting_agent, input)
        if place is None:
            return self._outlast_runner.run_sync(starting_agent, input, **kwargs)
        with within(place):
            return self._outlast_runner.run_sync(starting_agent, input, **_wrapped(kwargs, place))

    def run_streamed(self, starting_agent: Any, input: Any, **kwargs: Any) -> RunResultStreaming:
        """Run an agent and stream its events."""
        place = _nested(starting_agent, input)
        if place is None:
            return self._outlast_runner.run_streamed(starting_agent, input, **kwargs)
        with within(place):
            # The task that carries it out takes the place with it.
            return self._outlast_runner.run_streamed(starting_agent, input, **_wrapped(kwargs, place))


def sdk_runner() -> AgentRunner:
    """Return the runner that carries runs out: the SDK's, or whoever took its place before outlast."""
    runner = get_default_agent_runner()
    return runner._outlast_runner if isinstance(runner, _NestedRuns) else runner


def _nested(agent: Any, input: Any) -> Place | None:
    place = here()
    if place is None or steps.scope() is None:
        return None
    return place.child(getattr(agent, "name", ""), input, isinstance(input, RunState))


def _wrapped(kwargs: dict[str, Any], place: Place) -> dict[str, Any]:
    session = kwargs.get("session")
    return kwargs if session is None else {**kwargs, "session": journaled(session, place)}


__all__ = ["UnsupportedSDKError", "activate", "sdk_runner"]
