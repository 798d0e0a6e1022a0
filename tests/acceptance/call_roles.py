"""What the processes of the stories about model and tool calls do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from outlast import RunFailedError, RunNotFoundError, StoreError
from outlast.checkpointer import DaprSaver
from outlast.recovery import journal
from outlast.recovery.runtime import default_runtime
from tests.acceptance import calls, points, roles


def submit(folder: str, thread: str, run_id: str, agent: str, is_async: bool, streamed: bool = False) -> None:
    """Run an agent, report."""
    points.use(folder)
    points.instrument(run_id, thread)
    durable = calls.make(agent, is_async)
    config = {"configurable": {"thread_id": thread}, "run_id": run_id}
    if streamed:
        assert list(durable.stream(calls.input_of(agent), config, stream_mode="messages"))
        out = durable.get_run(run_id).result(roles.PATIENCE)
    elif is_async:
        out = asyncio.run(durable.ainvoke(calls.input_of(agent), config))
    else:
        out = _outcome(lambda: durable.invoke(calls.input_of(agent), config))
    roles.report(folder, durable, thread, run_id, out)
    default_runtime().stop()


def recover(folder: str, thread: str, run_id: str, agent: str, is_async: bool, streamed: bool = False) -> None:
    """Write down what is recorded, then make the agent durable again and see its run end."""
    points.use(folder)
    roles.write(folder, "recorded", recorded(run_id))
    durable = calls.make(agent, is_async)
    config = {"configurable": {"thread_id": thread}}
    try:
        handle = durable.get_run(run_id)
    except RunNotFoundError:
        points.note("resubmitted")
        assert not streamed, "its points come after the run is accepted"
        if is_async:
            handle = asyncio.run(durable.astart(calls.input_of(agent), config, run_id=run_id))
        else:
            handle = durable.start(calls.input_of(agent), config, run_id=run_id)
    roles.report(folder, durable, thread, run_id, _outcome(lambda: handle.result(roles.PATIENCE)))
    default_runtime().stop()


def _outcome(result: Callable[[], Any]) -> Any:
    """What a run came to, its own failure included."""
    try:
        return result()
    except (ValueError, RunFailedError) as error:
        return str(error)


def recorded(run_id: str) -> dict[str, list[str]]:
    """What of a run is recorded: the model's answers, and the idempotency keys of tool calls."""
    client = default_runtime().client
    found: dict[str, list[str]] = {"model": [], "tool": [], "compensation": []}
    for record in client.run(journal.read(run_id, DaprSaver(client=client).serde)):
        if record.kind == "result":
            found[record.type].append(calls.named(run_id, record))
    return found


def submit_waiting(folder: str, agent: str, prefix: str, count: int, at_once: int = 4) -> None:
    """Submit runs that ask a question; when told to, answer them all, and see them end."""
    points.use(folder)
    os.environ["OUTLAST_WORKER"] = "off"
    durable = roles.make(agent)
    names = [f"{prefix}-{number}" for number in range(count)]

    def start(name: str, tries: int = 5) -> None:
        try:
            durable.start({"log": [name]}, {"configurable": {"thread_id": name}}, run_id=name).close()
        except StoreError:
            # daprd's SQLite store gives up on a lock after two seconds. Submitted again, it is the same run.
            if tries == 1:
                raise
            start(name, tries - 1)

    def waiting(name: str) -> None:
        assert "__interrupt__" in durable.get_run(name).result(roles.PATIENCE)

    def answer(name: str) -> None:
        durable.get_run(name).resume("yes")

    def ended(name: str) -> None:
        assert durable.get_run(name).result(roles.PATIENCE)["log"] == [name, "yes"]

    with ThreadPoolExecutor(at_once) as pool:
        for work in (start, waiting, answer, ended):
            if work is answer:
                roles.say(waiting=count)
                while not Path(folder, f"answer-{prefix}").exists():
                    time.sleep(0.02)
            assert len(list(pool.map(work, names))) == count
    roles.say(ended=count)
