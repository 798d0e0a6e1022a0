"""Adapters: one per framework. Each maps that framework's seams onto the controller, and nothing else."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from outlast.recovery.runtime import Runtime


def adapt(agent: Any, name: str | None, runtime: Runtime, **options: Any) -> Any:
    """Return the durable form of an agent of any framework that has an adapter.

    Raises:
        TypeError: If the object is no agent; the message says what to pass.
        ValueError: If the agent has no name of its own and none is given.
    """
    if "langgraph" in sys.modules:
        from langgraph.graph import StateGraph
        from langgraph.pregel import Pregel

        if isinstance(agent, StateGraph):
            raise TypeError("durable() takes a compiled graph: durable(builder.compile(), name=...)")
        if isinstance(agent, Pregel):
            from outlast.adapters.langgraph import DurableGraph

            own = agent.get_name()
            if name is None and own in ("LangGraph", "Pregel", ""):
                raise ValueError(
                    "the graph has no name of its own: durable(graph, name='…'); "
                    "the name finds its runs again after a restart, so keep it the same"
                )
            return DurableGraph(agent, name or own, runtime, **options)
    if "agents" in sys.modules and _is_openai_agent(agent):
        from outlast.adapters.openai_agents import DurableAgent

        return DurableAgent(agent, name or agent.name, runtime, **options)
    if inspect.isfunction(agent):
        return _made(agent, name, runtime, options)
    raise TypeError(
        f"durable() takes a compiled LangGraph graph, an OpenAI agent, or a function without arguments that returns "
        f"one; got {type(agent).__qualname__}"
    )


def _is_openai_agent(agent: Any) -> bool:
    # `agents` is a name that packages of users have, too.
    kind = getattr(sys.modules["agents"], "Agent", None)
    return isinstance(kind, type) and kind.__module__ == "agents.agent" and isinstance(agent, kind)


def _made(make: Callable[..., Any], name: str | None, runtime: Runtime, options: dict[str, Any]) -> Any:
    """Adapt what a decorated function returns."""
    if inspect.iscoroutinefunction(make):
        raise TypeError(f"@durable on {make.__qualname__}: the function must not be async; it only builds the agent")
    needed = [
        parameter.name
        for parameter in inspect.signature(make).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise TypeError(
            f"@durable on {make.__qualname__}: the function must take no arguments (it needs {', '.join(needed)}), "
            "so that it can build the agent again after a restart"
        )
    return adapt(make(), name or make.__name__, runtime, **options)
