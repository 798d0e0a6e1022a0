"""`outlast worker`: carries the runs of agents on, and submits nothing."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import time
import traceback
from typing import Annotated, Any

import typer

from outlast.cli._console import AsJson, CommandError, Verbose, print_json, say
from outlast.cli._serving import UntilStopped
from outlast.recovery.runtime import WORKER, Runtime


def command(
    agents: Annotated[list[str], typer.Argument(metavar="MODULE:ATTR …", help="Where the durable agents are.")],
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long a superstep in progress may take at the end.")
    ] = 5.0,
    store: Annotated[str | None, typer.Option(help="Refuse agents that are on another state store.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Carry on the runs of these agents, whoever submitted them, until SIGTERM or SIGINT.

    ATTR is a durable agent, or a function without arguments that returns one. Modules are found as `python -m` finds
    them, first of all in the current folder. On SIGTERM or SIGINT the worker drains: each run stops after the superstep
    it is in and goes on at another worker, or when one comes back.

    With --json it prints one line for each event: {"event": "ready" | "draining" | "stopped", "time", "pid", "agents"}.
    """
    found = load_agents(agents)
    names = sorted({agent.name for agent in found})
    runtimes: list[Runtime] = list({id(agent._runtime): agent._runtime for agent in found}.values())
    for agent in found:
        if store is not None and agent._runtime.store != store:
            raise CommandError(
                f"agent {agent.name!r} is on the state store {agent._runtime.store!r}, not {store!r}: "
                f"durable(…, store={store!r}), or leave --store out"
            )

    def tell(event: str, text: str) -> None:
        if as_json:
            print_json({"event": event, "time": time.time(), "pid": os.getpid(), "agents": names}, indent=None)
        else:
            say(text)

    until = UntilStopped()
    for runtime in runtimes:
        runtime.start_worker()
    tell("ready", f"worker ready for {', '.join(names)} (process {os.getpid()}, {runtimes[0].client.address})")
    until.wait()
    tell("draining", f"draining, {grace:g} seconds at most")
    for runtime in runtimes:
        runtime.stop(grace)
        runtime.close()
    tell("stopped", "stopped; what is unfinished goes on at the next worker")


def load_agents(targets: list[str]) -> list[Any]:
    """Import the agents, with the worker kept from starting before all of them are known."""
    sys.path.insert(0, os.getcwd())
    os.environ[WORKER] = "off"
    try:
        return [_agent(target) for target in targets]
    finally:
        # Asked for by name: `outlast worker` works, also where OUTLAST_WORKER keeps other programs from it.
        del os.environ[WORKER]


def _agent(target: str) -> Any:
    value = _imported(target)
    if inspect.isfunction(value):
        try:
            value = value()
        except Exception as error:
            raise _failed(f"{target} was called and failed", error) from error
    if isinstance(getattr(value, "name", None), str) and hasattr(type(value), "advance"):
        return value
    what = f"a {type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "invoke"):
        raise CommandError(
            f"{target} is {what} that nothing has made durable: agent = durable(graph, name='…'), "
            f"and name that: {target.partition(':')[0]}:agent"
        )
    raise CommandError(f"{target} is {what}, no durable agent: name what `durable(…)` returned")


def _imported(target: str) -> Any:
    module, colon, attribute = target.partition(":")
    is_file = module.endswith(".py") or "/" in module
    if not colon or is_file or not all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        hint = " (a module's name, not a file's)" if is_file else ""
        raise typer.BadParameter(f"{target!r} is not MODULE:ATTR{hint}, such as weather_agent:agent")
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise CommandError(
                f"there is no module {module!r} in {os.getcwd()} or on the Python path; "
                "start the worker in the folder the module is in, or set PYTHONPATH"
            ) from error
        raise _failed(f"importing {module} failed", error) from error
    except Exception as error:
        raise _failed(f"importing {module} failed", error) from error
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise CommandError(f"module {module!r} has no {attribute!r}") from None
    return value


def _failed(what: str, error: Exception) -> Exception:
    """The user's own code failed: show where."""
    say("".join(traceback.format_exception(error)).rstrip())
    return error if type(error).__module__ == "outlast.errors" else CommandError(f"{what}: see above")
