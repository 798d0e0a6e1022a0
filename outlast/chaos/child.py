"""A process of a trial: `python -m outlast.chaos.child work|submit MODULE:ATTR FOLDER`.

`work` carries runs on and writes down what it does; `submit` reads orders from stdin, submits runs and tells results.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from typer import BadParameter

from outlast.chaos.events import HANG, Writer
from outlast.checkpointer import keys
from outlast.cli._serving import UntilStopped
from outlast.cli.worker import load_agents
from outlast.errors import OutlastError
from outlast.recovery import steps
from outlast.recovery.journal import Journal, Place, Record, Round
from outlast.recovery.runtime import WORKER


def observe(writer: Writer, folder: Path) -> None:
    """Have every step of this process written down, before and after it is made and when it is recorded."""
    once = steps._try
    settle = Journal.settle

    class Told(steps.StepInfo):
        """Tells when the code of a step asks for its idempotency key."""

        def __getattribute__(self, name: str) -> Any:
            if name == "idempotency_key":
                get = super().__getattribute__
                writer.write("read", get("run_id"), get("idempotency_key"), "", get("name"))
            return super().__getattribute__(name)

    def tried(making: Any) -> Any:
        step = (making.attempt.run_id, making.idempotency_key, making.call.type, making.call.name)
        writer.write("begin", *step, detail=f"{making.policy.timeout or ''}")
        try:
            value = yield from once(making)
        except BaseException as error:
            writer.write("failed", *step, detail=type(error).__name__)
            raise
        writer.write("end", *step)
        return value

    def settled(self: Journal, place: Place, record: Record, round: Round) -> None:
        settle(self, place, record, round)
        key = keys.digest(self.run_id, place.key, str(place.slot.index))
        writer.write("recorded", self.run_id, key, record.type, record.name, detail=record.kind)

    changed: Any = steps
    changed._try, changed.StepInfo = tried, Told
    Journal.settle = settled  # type: ignore[method-assign]
    _let_hang(writer, folder)


def _let_hang(writer: Writer, folder: Path) -> None:
    """Have the next call of the tool that is named in the folder hang."""
    order = folder / HANG
    run, arun = steps.run_operation, steps.arun_operation

    def hangs(operation: Any) -> bool:
        info = operation.context.info if isinstance(operation, steps.Invoke) else None
        if info is None:
            return False
        try:
            if order.read_text() != info.name:
                return False
            order.unlink()
        except FileNotFoundError:
            return False
        writer.write("hung", info.run_id, object.__getattribute__(info, "idempotency_key"), "tool", info.name)
        return True

    def run_operation(operation: Any, invoke: Callable[[], Any]) -> Any:
        return run(operation, threading.Event().wait if hangs(operation) else invoke)

    async def arun_operation(operation: Any, invoke: Callable[[], Any]) -> Any:
        return await arun(operation, asyncio.Event().wait if hangs(operation) else invoke)

    changed: Any = steps
    changed.run_operation, changed.arun_operation = run_operation, arun_operation


def _say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _work(agent: Any) -> None:
    until = UntilStopped()
    threading.Thread(target=_end_with_trial, daemon=True).start()
    agent.runtime.start_worker()
    _say(ready=agent.name, store=agent.runtime.store)
    until.wait()
    agent.runtime.close()


def _end_with_trial() -> None:
    """End this process when the one that started it is gone, however that ended."""
    sys.stdin.read()
    os._exit(1)


def _submit(agent: Any) -> None:
    os.environ[WORKER] = "off"
    _say(ready=agent.name, store=agent.runtime.store)
    handles: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        run = order["run"]
        try:
            if "input" in order:
                config = {"configurable": {"thread_id": run}}
                handles[run] = agent.start(order["input"], config, run_id=run)
                _say(run=run)
            else:
                _say(run=run, **_end(handles[run], order["timeout"]))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            _say(run=run, error=text, ended=text)
    agent.runtime.close()


def _end(handle: Any, timeout: float) -> dict[str, Any]:
    """Wait for a run's end; return how it ended, and its state as plain data."""
    result = handle.result(timeout)
    question = handle.question()
    ended = f"asks a person: {question.text}" if question else handle.status()
    return {"ended": ended, "result": to_jsonable_python(result, serialize_unknown=True, inf_nan_mode="strings")}


def main() -> None:
    """Run as a process."""
    role, target, folder = sys.argv[1:]
    try:
        (agent,) = load_agents([target])
    except (OutlastError, BadParameter) as error:
        _say(failed=str(error))
        sys.exit(1)
    if role == "submit":
        _submit(agent)
        return
    observe(Writer(Path(folder)), Path(folder))
    _work(agent)


if __name__ == "__main__":
    main()
