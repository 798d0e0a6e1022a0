"""What the processes under test do. Each function is the main program of one process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from agents import SQLiteSession, set_default_openai_api, set_default_openai_client, set_tracing_disabled
from agents.items import ToolCallItem
from openai import AsyncOpenAI

from outlast import durable
from outlast.adapters.openai_agents import DaprSession, Runner
from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.errors import RunNotFoundError
from outlast.recovery import journal, runs
from outlast.recovery.runtime import default_runtime
from tests.acceptance import points
from tests.openai_agents import desk, workshop

logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(levelname)s %(message)s")
logging.getLogger("httpx").setLevel(logging.WARNING)

MODEL_URL = "DESK_MODEL_URL"


def begin(folder: str) -> None:
    """Set this process up."""
    points.use(folder)
    set_tracing_disabled(True)
    set_default_openai_api("chat_completions")
    set_default_openai_client(AsyncOpenAI(base_url=os.environ[MODEL_URL], api_key="none", max_retries=0))


class MarkedSession(SQLiteSession):
    """A session in a file of its own, whose writes are points."""

    async def add_items(self, items: Any) -> None:
        points.reached("session before")
        await super().add_items(items)
        points.reached("session after")


def session_of(folder: str, kind: str, run_id: str) -> Any:
    return DaprSession(run_id) if kind == "dapr" else MarkedSession(run_id, Path(folder, "session.db"))


def submit(folder: str, run_id: str, mode: str, session: str) -> None:
    """Run the agent, answer what it asks, report."""
    begin(folder)
    points.instrument(run_id, run_id)
    asyncio.run(_play(folder, run_id, mode, session))
    default_runtime().stop()


def recover(folder: str, run_id: str, mode: str, session: str) -> None:
    """Write down what is recorded, then do the same as `submit` in a new process."""
    begin(folder)
    _write_recorded(folder, run_id)
    asyncio.run(_play(folder, run_id, mode, session))
    default_runtime().stop()


def _write_recorded(folder: str, run_id: str) -> None:
    client = default_runtime().client
    try:
        client.run(runs.read(run_id))
    except RunNotFoundError:
        points.note("resubmitted")
        records = []
    else:
        records = client.run(journal.read(run_id, AgentsCodec()))
    write(
        folder, "recorded", [[each.type, each.name, each.key] for each in records if each.kind in ("result", "error")]
    )


def work(folder: str, run_id: str, mode: str, again: bool) -> None:
    """Run the agent of the workshop, for the first time or again, and report."""
    begin(folder)
    if again:
        _write_recorded(folder, run_id)
    else:
        points.instrument(run_id, run_id)
    asyncio.run(_work(folder, run_id, mode))
    default_runtime().stop()


async def _work(folder: str, run_id: str, mode: str) -> None:
    given: dict[str, Any] = {"run_id": run_id, "max_turns": 20, "hooks": workshop.Hooks()}
    if mode == "run":
        result: Any = await Runner.run(workshop.make(), "go", **given)
    else:
        result = Runner.run_streamed(workshop.make(), "go", **given)
        async for _ in result.stream_events():
            pass
    outputs = [[item.type, str(getattr(item, "output", ""))] for item in result.new_items]
    write(folder, "result", {"output": result.final_output, "items": outputs, "responses": len(result.raw_responses)})


async def _play(folder: str, run_id: str, mode: str, session: str) -> None:
    agent, context, conversation = desk.make(), desk.Desk(), session_of(folder, session, run_id)
    given: dict[str, Any] = {"context": context, "session": conversation, "run_id": run_id, "max_turns": 20}
    told: list[str] = []
    input: Any = desk.INPUT
    while True:
        if mode == "run":
            result: Any = await Runner.run(agent, input, **given)
        else:
            result = Runner.run_streamed(agent, input, **given)
            async for event in result.stream_events():
                if event.type == "run_item_stream_event":
                    told.append(_told(event))
        if not result.interruptions:
            break
        points.note("answered")
        state = result.to_state()
        for item in result.interruptions:
            if item.call_id == "refund-40":
                state.approve(item)
            else:
                state.reject(item, rejection_message="two are too few")
        input = state
        points.reached("answer before")
    items = await conversation.get_items()
    head = default_runtime().client.run(runs.read(run_id))
    write(
        folder,
        "result",
        {
            "output": result.final_output.model_dump(),
            "last_agent": result.last_agent.name,
            "usage": _usage(result.context_wrapper.usage),
            "items": [_plain(item) for item in result.new_items],
            "responses": len(result.raw_responses),
            "guardrails": [
                [found.guardrail.get_name(), found.output.output_info]
                for found in [*result.input_guardrail_results, *result.output_guardrail_results]
            ],
            "session": [_bare(item) for item in items],
            "context": {**dataclasses.asdict(context), "log": sorted(context.log)},
            "status": head.status,
            "told": sorted(told),
        },
    )


def _usage(usage: Any) -> dict[str, int]:
    return {"requests": usage.requests, "input": usage.input_tokens, "output": usage.output_tokens}


def _told(event: Any) -> str:
    return f"{event.name} {json.dumps(_bare(event.item.to_input_item()), sort_keys=True)}"


def _plain(item: Any) -> list[Any]:
    name = item.tool_name if isinstance(item, ToolCallItem) else None
    said = None if item.type == "tool_approval_item" else _bare(item.to_input_item())
    return [item.type, item.agent.name, name, said]


def _bare(item: Any) -> Any:
    """An item without what differs from run to run."""
    return {key: value for key, value in dict(item).items() if key not in ("id", "provider_data") and value is not None}


def write(folder: str, name: str, value: Any) -> None:
    path = Path(folder, name)
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").rename(path)


def long(folder: str, run_id: str, turns: int, mode: str, again: bool) -> None:
    """Run an agent for many turns, for the first time or again, and report."""
    begin(folder)
    agent = workshop.long(turns)

    async def play() -> Any:
        given: dict[str, Any] = {"run_id": run_id, "max_turns": None, "session": session_of(folder, "sqlite", run_id)}
        if mode == "run":
            return await Runner.run(agent, "go", **given)
        result = Runner.run_streamed(agent, "go", **given)
        told = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
        write(folder, "told", told)
        return result

    async def main() -> dict[str, Any]:
        result = await play()
        return {
            "output": result.final_output,
            "items": [_plain(item) for item in result.new_items],
            "responses": [response.response_id for response in result.raw_responses],
            "usage": _usage(result.context_wrapper.usage),
            "session": [_bare(item) for item in await session_of(folder, "sqlite", run_id).get_items()],
        }

    write(folder, "result", asyncio.run(main()))
    records = default_runtime().client.run(journal.read(run_id, AgentsCodec()))
    write(folder, "checkpoints", [len(each.value["state"]) for each in records if each.type == "checkpoint"])
    default_runtime().stop()


def serve(folder: str, turns: int) -> None:
    """Carry runs on until SIGTERM."""
    begin(folder)
    durable(workshop.long(turns))
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    default_runtime().start_worker()
    print("serving", flush=True)  # noqa: T201
    stopped.wait()
    points.note("stopping")
    default_runtime().stop(30)


def start(folder: str, run_id: str, turns: int) -> None:
    """Submit a run, and go."""
    os.environ["OUTLAST_WORKER"] = "off"
    begin(folder)
    Runner.start(workshop.long(turns), "go", run_id=run_id, max_turns=None)


def look(folder: str, run_id: str, turns: int) -> None:
    """Say what a run has come to."""
    begin(folder)
    write(folder, "looked", {"output": Runner.get_run(workshop.long(turns), run_id).result(30).final_output})
    default_runtime().stop()


def ask(folder: str, run_id: str) -> None:
    """Submit a run and wait until it waits."""
    begin(folder)
    run = Runner.start(workshop.asking(), "go", run_id=run_id)
    run.result(30)
    write(folder, "asked", [[item.id, item.tool] for item in run.approvals()])
    default_runtime().stop()


def answer(folder: str, run_id: str) -> None:
    """Answer it."""
    begin(folder)
    run = Runner.get_run(workshop.asking(), run_id)
    run.resume({"ask-1": "not this one", "ask-2": True})
    while run.status() != "done":
        time.sleep(0.05)


def answered(folder: str, run_id: str) -> None:
    """See what came of it."""
    begin(folder)
    run = Runner.get_run(workshop.asking(), run_id)
    while run.status() != "done":
        time.sleep(0.05)
    items = run.result().new_items
    write(folder, "outputs", sorted(str(item.output) for item in items if item.type == "tool_call_output_item"))
    default_runtime().stop()
