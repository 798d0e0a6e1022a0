"""What the processes under test do. Each function is the main program of one process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from langgraph.types import Command, Interrupt

import outlast
from outlast import RunNotFoundError, durable
from outlast.checkpointer import DaprSaver
from outlast.checkpointer.registry import ACTIVE
from outlast.checkpointer.thread import ThreadLog
from outlast.recovery import runs
from outlast.recovery.runtime import default_runtime
from tests.acceptance import agents, calls, points

logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(levelname)s %(message)s")

INPUT = {"log": ["start"]}
PATIENCE = 40.0


def say(**values: Any) -> None:
    """Print a line that the test reads."""
    print(json.dumps(values), flush=True)  # noqa: T201


def write(folder: str, name: str, value: Any) -> None:
    path = Path(folder, name)
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").rename(path)


def _plain(value: Any) -> Any:
    """A value without what differs from run to run: ids that LangGraph draws."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "content"):
        kept = ("tool_call_id", "tool_calls", "usage_metadata", "artifact", "status")
        metadata = {key: item for key, item in value.response_metadata.items() if key != "id"}
        return [value.type, value.content, [_plain(getattr(value, name, None)) for name in kept], _plain(metadata)]
    if isinstance(value, Interrupt):
        return ["interrupt", _plain(value.value)]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def _history(agent: Any, thread: str) -> list[Any]:
    """The thread's history, oldest first: superstep, source, what comes next, and values."""
    states = agent.get_state_history(_config(thread))
    return [
        [state.metadata["step"], state.metadata["source"], sorted(state.next), _plain(state.values)] for state in states
    ][::-1]


def report(folder: str, agent: Any, thread: str, run_id: str, out: Any) -> None:
    """Write down how the run ended; waits until nothing of it is active any more."""
    runtime = default_runtime()
    head = runtime.client.run(runs.read(run_id))
    runtime.workflows.wait_for_workflow_completion(head.instance, timeout_in_seconds=int(PATIENCE))
    threadhead = runtime.client.run(ThreadLog(thread).read())
    assert threadhead is not None
    state = agent.get_state(_config(thread))
    write(
        folder,
        "result",
        {
            "out": _plain(out),
            "state": _plain(state.values),
            "next": list(state.next),
            "history": _history(agent, thread),
            "status": head.status,
            "active": [name for name in runtime.client.run(ACTIVE.items()) if name == run_id],
            "serves": threadhead.active,
        },
    )


# --- the kill matrix


def submit_trip(folder: str, thread: str, run_id: str, is_async: bool = False) -> None:
    """Submit the reference agent, answer its question, report."""
    points.use(folder)
    points.instrument(run_id, thread)
    agent = durable(agents.trip(is_async), name="trip")
    config = {**_config(thread), "run_id": run_id}
    answer: Any = Command(resume="yes")
    if is_async:

        async def both() -> Any:
            out = await agent.ainvoke(INPUT, config)
            assert "__interrupt__" in out, out
            return await agent.ainvoke(answer, _config(thread))

        out = asyncio.run(both())
    else:
        out = agent.invoke(INPUT, config)
        assert "__interrupt__" in out, out
        out = agent.invoke(answer, _config(thread))
    report(folder, agent, thread, run_id, out)
    default_runtime().stop()


def recover_trip(folder: str, thread: str, run_id: str, is_async: bool = False) -> None:
    """Make the agent durable again and see its run end; resubmit and answer only what the store has not got."""
    points.use(folder)
    graph = agents.trip(is_async)
    before = graph.copy({"checkpointer": DaprSaver(client=default_runtime().client)})
    write(folder, "pending", _pending(before.get_state(_config(thread), subgraphs=True)))
    agent = durable(graph, name="trip")
    try:
        handle = agent.get_run(run_id)
    except RunNotFoundError:
        points.note("resubmitted")
        if is_async:
            handle = asyncio.run(agent.astart(INPUT, _config(thread), run_id=run_id))
        else:
            handle = agent.start(INPUT, _config(thread), run_id=run_id)
    out = handle.result(PATIENCE)
    if "__interrupt__" in out:
        points.note("answered")
        handle.resume("yes")
        out = handle.result(PATIENCE)
    report(folder, agent, thread, run_id, out)
    default_runtime().stop()


def _pending(state: Any) -> list[str]:
    """The nodes that are due and have no committed result, those inside subgraphs among them."""
    names: list[str] = []
    for task in state.tasks:
        if task.result is None and not isinstance(task.state, dict | None):
            names += _pending(task.state)
        if task.result is None:
            names.append(task.name)
    return names


# --- replicas


def serve(folder: str, agent_names: list[str], is_async: bool = False) -> None:
    """A worker: makes agents durable and lives until SIGTERM."""
    points.use(folder)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    for name in agent_names:
        make(name, is_async)
    default_runtime().start_worker()
    points.note(f"serving {os.getpid()}")
    say(serving=os.getpid())
    ended.wait()
    say(draining=os.getpid())
    default_runtime().stop(PATIENCE)
    say(stopped=os.getpid())


def only_durable(folder: str, agent_names: list[str]) -> None:
    """A program that makes agents durable and then does something else."""
    points.use(folder)
    for name in agent_names:
        make(name)
    threading.Event().wait()


def make(name: str, is_async: bool = False) -> Any:
    if name == "trip":
        return durable(agents.trip(is_async), name="trip")
    if name == "endless":
        return durable(agents.endless(), name="endless")
    if name.startswith("questions-"):
        return durable(agents.questions(int(name.partition("-")[2])), name=name)
    if name.startswith("line-"):
        return durable(agents.line(list(name.partition("-")[2])), name=name)
    return calls.make(name, is_async)


def client(folder: str) -> None:
    """A process that only submits and waits, as the test tells it line by line in the file `orders`."""
    points.use(folder)
    os.environ["OUTLAST_WORKER"] = "off"
    orders, done = Path(folder, "orders"), 0
    made: dict[str, Any] = {}
    points.note("client")
    while True:
        lines = orders.read_text().split("\n")[:-1] if orders.exists() else []
        for line in lines[done:]:
            done += 1
            order = json.loads(line)
            name = order["agent"]
            if name not in made:
                made[name] = make(name)
            threading.Thread(target=_obey, args=(folder, made[name], order), daemon=True).start()
        time.sleep(0.005)


def _obey(folder: str, agent: Any, order: dict[str, Any]) -> None:
    try:
        answer = _carried_out(agent, order)
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    write(folder, f"answer-{order['number']}", answer)


def _carried_out(agent: Any, order: dict[str, Any]) -> Any:
    match order["do"]:
        case "start":
            options = {"if_busy": order["if_busy"]} if "if_busy" in order else {}
            arguments = (order["input"], {**_config(order["thread"]), **order.get("config", {})})
            if order.get("is_async"):
                handle = asyncio.run(agent.astart(*arguments, run_id=order["run_id"], **options))
            else:
                handle = agent.start(*arguments, run_id=order["run_id"], **options)
            return {"status": handle.status()}
        case "result":
            return {"out": _plain(agent.get_run(order["run_id"]).result(order.get("patience", PATIENCE)))}
        case "steps":
            steps = agent.get_run(order["run_id"]).steps()
            kept = ("kind", "type", "key", "slot", "attempt", "ended")
            plain = [{name: getattr(step, name) for name in kept} for step in steps]
            of = [calls.named(order["run_id"], step) for step in steps]
            return {"steps": [{**step, "of": name} for step, name in zip(plain, of, strict=True)]}
        case "status":
            return {"status": agent.get_run(order["run_id"]).status()}
        case "resume":
            agent.get_run(order["run_id"]).resume(order["value"])
            return {}
        case "cancel":
            agent.get_run(order["run_id"]).cancel(order.get("compensate", False))
            return {}
        case "question":
            question = agent.get_run(order["run_id"]).question()
            return {"question": vars(question) if question else None}
        case "answer":
            given = getattr(outlast, order["give"])(*order.get("args", ()), **order.get("more", {}))
            agent.get_run(order["run_id"]).answer(given)
            return {}
        case "history":
            return {"history": _history(agent, order["thread"])}
        case "events":
            runtime = default_runtime()
            head = runtime.client.run(runs.read(order["run_id"]))
            return {"events": len(runtime.workflows.get_workflow_history(head.instance))}
        case "workflow":
            runtime = default_runtime()
            head = runtime.client.run(runs.read(order["run_id"]))
            state = runtime.workflows.wait_for_workflow_completion(head.instance, timeout_in_seconds=int(PATIENCE))
            return {"workflow": state.runtime_status.name if state else None}
    raise ValueError(order["do"])


# --- submissions


def submit_together(folder: str, prefix: str, me: int, rounds: int) -> None:
    """Submit one run id after another, each at the same instant as another process does."""
    points.use(folder)
    agent = make("line-ab")
    runtime = default_runtime()
    assert runtime.start_worker()
    for number in range(rounds):
        run_id = f"{prefix}-{number}"
        # The barrier: both say that they are there, and both look at the same clock for the next instant.
        _append_line(folder, "barrier", f"{number} {time.monotonic()}")
        arrived = _both(folder, number)
        while time.monotonic() < arrived + 0.005:
            pass
        handle = agent.start({"log": [run_id]}, _config(run_id), run_id=run_id)
        assert handle.result(PATIENCE)["log"] == [run_id, "a", "b"]
    say(done=me)
    _wait_for_go(folder)
    runtime.stop()


def _both(folder: str, number: int) -> float:
    while True:
        times = [line.split()[1] for line in _lines(folder, "barrier") if line.split()[0] == str(number)]
        if len(times) == 2:
            return max(map(float, times))


def _lines(folder: str, name: str) -> list[str]:
    path = Path(folder, name)
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _append_line(folder: str, name: str, line: str) -> None:
    out = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(out, line.encode() + b"\n")
    os.close(out)


def _wait_for_go(folder: str) -> None:
    while not Path(folder, "go").exists():
        time.sleep(0.005)
