"""Workflows and activities that exercise every feature of Dapr's workflow API."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

from dapr.ext.workflow import (
    DaprWorkflowContext,
    PropagationScope,
    RetryPolicy,
    WorkflowActivityContext,
    WorkflowRuntime,
    when_all,
    when_any,
)

Steps = Generator[Any, Any, Any]

attempts: collections.Counter[str] = collections.Counter()
gate = threading.Event()


def echo(ctx: WorkflowActivityContext, value: Any) -> Any:
    attempts[ctx.workflow_id] += 1
    return value


async def echo_async(ctx: WorkflowActivityContext, value: Any) -> Any:
    return value


def fail(ctx: WorkflowActivityContext, times: int) -> str:
    attempts[ctx.workflow_id] += 1
    if attempts[ctx.workflow_id] <= times:
        raise ValueError(f"attempt {attempts[ctx.workflow_id]}")
    return "good at last"


def wait_for_gate(ctx: WorkflowActivityContext, seconds: float) -> str:
    return "open" if gate.wait(seconds) else "timeout"


def slow(ctx: WorkflowActivityContext, seconds: float) -> float:
    attempts[ctx.workflow_id] += 1
    time.sleep(seconds)
    return seconds


def chain(ctx: DaprWorkflowContext, count: int) -> Steps:
    total = 0
    for number in range(count):
        total += yield ctx.call_activity("echo", input=number)
    return total


def chain_async(ctx: DaprWorkflowContext, count: int) -> Steps:
    for number in range(count):
        yield ctx.call_activity("echo_async", input=number)
    return count


def fan_out(ctx: DaprWorkflowContext, count: int) -> Steps:
    results = yield when_all([ctx.call_activity("echo", input=number) for number in range(count)])
    return sum(results)


def fan_slow(ctx: DaprWorkflowContext, count: int) -> Steps:
    results = yield when_all([ctx.call_activity("slow", input=0.3) for _ in range(count)])
    return len(results)


def gated(ctx: DaprWorkflowContext, seconds: float) -> Steps:
    return (yield ctx.call_activity("wait_for_gate", input=seconds))


def failing(ctx: DaprWorkflowContext, times: int) -> Steps:
    return (yield ctx.call_activity("fail", input=times))


def retrying(ctx: DaprWorkflowContext, times: int) -> Steps:
    policy = RetryPolicy(first_retry_interval=timedelta(milliseconds=20), max_number_of_attempts=3)
    return (yield ctx.call_activity("fail", input=times, retry_policy=policy))


def unknown_activity(ctx: DaprWorkflowContext, _: Any) -> Steps:
    return (yield ctx.call_activity("nobody knows this"))


def sleeper(ctx: DaprWorkflowContext, seconds: float) -> Steps:
    before = ctx.current_utc_datetime
    yield ctx.create_timer(timedelta(seconds=seconds))
    return (ctx.current_utc_datetime - before).total_seconds()


def approval(ctx: DaprWorkflowContext, seconds: float) -> Steps:
    event = ctx.wait_for_external_event("answer")
    timer = ctx.create_timer(timedelta(seconds=seconds))
    first = yield when_any([event, timer])
    return "timeout" if first is timer else event.get_result()


def listener(ctx: DaprWorkflowContext, count: int) -> Steps:
    heard = []
    for _ in range(count):
        heard.append((yield ctx.wait_for_external_event("word")))
    return heard


def late_listener(ctx: DaprWorkflowContext, seconds: float) -> Steps:
    yield ctx.create_timer(timedelta(seconds=seconds))
    return (yield ctx.wait_for_external_event("word"))


def parent(ctx: DaprWorkflowContext, count: int) -> Steps:
    return (yield when_all([ctx.call_child_workflow("chain", input=number) for number in range(count)]))


def parent_of(ctx: DaprWorkflowContext, request: dict[str, Any]) -> Steps:
    try:
        result = yield ctx.call_child_workflow(request["name"], input=request["input"], instance_id=request.get("id"))
    except Exception as error:
        return f"child failed: {error}"
    return result


def generations(ctx: DaprWorkflowContext, left: int) -> Steps:
    ctx.set_custom_status(f"left {left}")
    yield ctx.call_activity("echo", input=left)
    if left:
        ctx.continue_as_new(left - 1)
        return None
    return "the last one"


def collector(ctx: DaprWorkflowContext, heard: list[str]) -> Steps:
    word = yield ctx.wait_for_external_event("word")
    heard = [*heard, word]
    if len(heard) < 5:
        ctx.continue_as_new(heard, save_events=True)
        return None
    return heard


def status_setter(ctx: DaprWorkflowContext, text: str) -> Steps:
    ctx.set_custom_status(text)
    yield ctx.wait_for_external_event("word")
    return "done"


def immediate(ctx: DaprWorkflowContext, value: Any) -> Any:
    return value


def fire_and_forget(ctx: DaprWorkflowContext, value: Any) -> Steps:
    ctx.call_activity("slow", input=0.2)
    yield ctx.call_activity("echo", input=value)
    return value


def seen_names(ctx: WorkflowActivityContext, _: Any) -> list[str]:
    shown = ctx.get_propagated_history()
    return [] if shown is None else [workflow.name for workflow in shown.get_workflows()]


def shows_its_history(ctx: DaprWorkflowContext, depth: int) -> Steps:
    """What an activity at the end of a chain of children is shown, by workflow name."""
    yield ctx.call_activity("echo", input=depth)
    if depth:
        lineage = PropagationScope.LINEAGE
        return (yield ctx.call_child_workflow("shows_its_history", input=depth - 1, propagation=lineage))
    return (yield ctx.call_activity("seen_names", propagation=PropagationScope.LINEAGE))


WORKFLOWS: list[Callable[..., Any]] = [
    chain,
    chain_async,
    fan_out,
    fan_slow,
    gated,
    failing,
    retrying,
    unknown_activity,
    sleeper,
    approval,
    listener,
    late_listener,
    parent,
    parent_of,
    generations,
    collector,
    status_setter,
    immediate,
    fire_and_forget,
    shows_its_history,
]
ACTIVITIES: list[Callable[..., Any]] = [echo, echo_async, fail, wait_for_gate, slow, seen_names]


def register(runtime: WorkflowRuntime) -> None:
    for workflow in WORKFLOWS:
        runtime.register_workflow(workflow)
    for activity in ACTIVITIES:
        runtime.register_activity(activity)
