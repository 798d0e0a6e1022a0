"""A process of its own over a shared file: `python -m tests.embedded.worker FILE LOG [--client]`.

It logs each execution of an activity as lines `start PID KEY` and `end PID KEY`, appended whole.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

from dapr.ext.workflow import DaprWorkflowContext, WorkflowActivityContext, WorkflowRuntime, when_all

from outlast.embedded import EmbeddedSidecar

Steps = Generator[Any, Any, Any]


def say(log: Path, *words: object) -> None:
    with log.open("ab", buffering=0) as file:
        file.write((" ".join(str(word) for word in words) + "\n").encode())


def serve(path: Path, log: Path) -> tuple[EmbeddedSidecar, WorkflowRuntime]:
    """A sidecar over the file, and a worker with two workflows."""

    def work(ctx: WorkflowActivityContext, request: dict[str, Any]) -> str:
        key = f"{ctx.workflow_id}/{request['number']}"
        say(log, "start", os.getpid(), key)
        time.sleep(request["seconds"])
        say(log, "end", os.getpid(), key)
        return key

    def steps(ctx: DaprWorkflowContext, request: dict[str, Any]) -> Steps:
        for number in range(request["count"]):
            yield ctx.call_activity(work, input={"number": number, "seconds": request["seconds"]})
        return request["count"]

    def fan(ctx: DaprWorkflowContext, request: dict[str, Any]) -> Steps:
        tasks = [
            ctx.call_activity(work, input={"number": number, "seconds": request["seconds"]})
            for number in range(request["count"])
        ]
        results = yield when_all(tasks)
        return len(results)

    def sleeper(ctx: DaprWorkflowContext, seconds: float) -> Steps:
        yield ctx.create_timer(timedelta(seconds=seconds))
        return "awake"

    sidecar = EmbeddedSidecar(path).start()
    runtime = WorkflowRuntime(host="127.0.0.1", port=str(sidecar.grpc_port))
    for workflow in (steps, fan, sleeper):
        runtime.register_workflow(workflow)
    runtime.register_activity(work)
    runtime.start()
    return sidecar, runtime


def main() -> None:
    path, log = Path(sys.argv[1]), Path(sys.argv[2])
    serve(path, log)
    say(log, "ready", os.getpid())
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
