"""The Dapr workflow of a run: deterministic and tiny. It carries references, never payloads or state."""

from __future__ import annotations

from collections.abc import Generator
from datetime import timedelta
from typing import Any, Final, Literal, NotRequired, TypedDict

from dapr.ext.workflow import DaprWorkflowContext

RUN: Final = "outlast.run.v1"
"""Name of the workflow; the version changes with the order of what it yields."""
ADVANCE: Final = "outlast.advance.v1"
"""Name of the activity that carries a run on."""
WAKE: Final = "outlast.wake"
"""Name of the event that ends a wait: a signal has come, a thread is free, a worker is there."""

_TURNS: Final = 10
_FIRST_BACKOFF: Final = 0.05
_LONGEST_BACKOFF: Final = 30.0


class RunRef(TypedDict):
    """The workflow's input.

    `turn` counts the calls of `advance` over all generations, `failures` those that failed in a row.
    """

    run: str
    turn: int
    failures: int


class Delivery(TypedDict):
    """The activity's input. `id` is the same when Dapr delivers the same call again."""

    run: str
    instance: str
    id: str


class Next(TypedDict):
    """The activity's result: what the workflow does next.

    `sleep` is for what ought to be ready by then and backs off where no time is given; `pause` is a time asked for.
    """

    then: Literal["end", "wait", "sleep", "pause", "again"]
    seconds: NotRequired[float]
    status: NotRequired[str]


def run_workflow(ctx: DaprWorkflowContext, ref: RunRef) -> Generator[Any, Any, str]:
    """Call `advance` until the run has ended; between calls wait for events or sleep on durable timers."""
    turn, failures = ref["turn"], ref["failures"]
    for _ in range(_TURNS):
        turn += 1
        delivery: Delivery = {"run": ref["run"], "instance": ctx.instance_id, "id": f"{ctx.instance_id}#{turn}"}
        try:
            step: Next = yield ctx.call_activity(ADVANCE, input=delivery)
            failures = 0 if step["then"] != "sleep" else failures + 1
        except Exception:  # the activity failed: the store or the sidecar did, never the user's code
            failures += 1
            step = {"then": "sleep"}
        if step["then"] == "end":
            return step.get("status", "")
        if step["then"] == "again":
            continue
        seconds = step.get("seconds")
        if step["then"] == "sleep" and seconds is None:
            seconds = min(_FIRST_BACKOFF * 2 ** min(failures, 20), _LONGEST_BACKOFF)
        try:
            # A wake-up that came early is kept by the workflow, so none is lost between `advance` and the wait.
            yield ctx.wait_for_external_event(WAKE, timeout=timedelta(seconds=seconds) if seconds else None)
        except TimeoutError:
            continue
    # Continue as new, so that history stays small however long the run lives.
    ctx.continue_as_new({"run": ref["run"], "turn": turn, "failures": failures}, save_events=True)
    return "continued"
