"""How a run goes on or ends: deadlines, retries of the run, and undoing what its steps have done."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from outlast.errors import RunCancelledError, RunTimeoutError
from outlast.recovery import runs, steps
from outlast.recovery.attempt import Agent, Attempt, Outcome
from outlast.recovery.codec import hides
from outlast.recovery.failures import describe
from outlast.recovery.journal import Record
from outlast.recovery.policy import Policies
from outlast.recovery.runs import RunHead

logger = logging.getLogger("outlast.worker")


def deadline(head: RunHead, policies: Policies) -> float:
    """Return the Unix time by which a run must have ended."""
    return math.inf if policies.timeout is None else head.created + policies.timeout


def again_at(agent: Agent, attempt: Attempt, outcome: Outcome) -> float | None:
    """Return the Unix time at which a failed run is tried again, or None if it has failed for good."""
    policy = agent.policies.run
    if policy is None or outcome.exception is None or attempt.head.ending:
        return None
    wait = policy.wait(outcome.exception, attempt.head.retries + 1)
    return None if wait is None else time.time() + wait


def carry_on(agent: Agent, attempt: Attempt) -> Outcome:
    """Let the agent run; if its run is to end without success, undo its steps.

    Raises:
        FencedError: If another attempt has taken over.
        StoreError, SidecarUnavailableError: If the state store fails; the attempt is then made again.
    """
    outcome = _outcome(agent, attempt)
    if outcome.status != "failed" or again_at(agent, attempt, outcome) is not None:
        return outcome
    if not _undoable(attempt):
        return outcome
    if not attempt.head.ending:
        # Decided before the first is undone: an attempt that takes over must not go on with the run.
        status: runs.Status = "cancelled" if isinstance(outcome.exception, RunCancelledError) else "failed"
        running, error = attempt.head.running, outcome.error
        if error and hides(attempt.journal.codec):
            error = (error[0], runs.HIDDEN)
        attempt.head = attempt.client.run(
            runs.change(
                attempt.run_id,
                lambda now: replace(now, ending=(status, error)) if now.running == running else None,
            )
        )
    attempt.stop = None
    return _undo(attempt, outcome)


def _outcome(agent: Agent, attempt: Attempt) -> Outcome:
    head = attempt.head
    if head.ending:
        # The exception itself was lost with the worker that had it.
        return Outcome("failed", error=head.ending[1])
    error: Exception
    if head.cancel:
        error = RunCancelledError(f"run {head.run_id!r} was cancelled")
        return Outcome("failed", error=describe(error), exception=error)
    end = deadline(head, agent.policies)
    if time.time() < end:
        outcome = agent.advance(attempt)
        if outcome.status in ("done", "failed") or time.time() < end:
            return outcome
    error = RunTimeoutError(f"run {head.run_id!r} took longer than the {agent.policies.timeout:g} s it may take")
    return Outcome("failed", error=describe(error), exception=error)


def _undoable(attempt: Attempt) -> list[tuple[Record, Callable[..., Any] | None]]:
    """Return the finished steps that have something that undoes them, the last one first."""
    found = [
        (record, attempt.policies.of(record.type, record.name).compensate or _imported(record.undo["at"]))
        for record in attempt.journal.records
        if record.kind == "result" and record.undo is not None
    ]
    return sorted(found, key=lambda pair: pair[0].ended, reverse=True)


def _imported(path: str) -> Callable[..., Any] | None:
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module) if module else None
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found if callable(found) else None


def _undo(attempt: Attempt, outcome: Outcome) -> Outcome:
    """Undo finished steps; each undoing is a step itself. What could not be undone is said in the run's error."""
    left: list[str] = []
    token = steps.enter(attempt, lambda: ("compensate", 1))
    try:
        for record, function in _undoable(attempt):
            try:
                _undo_one(attempt, record, function)
            except Exception as error:
                logger.exception("run %s: %s %r could not be undone", attempt.run_id, record.type, record.name)
                left.append(f"{record.type} {record.name!r} could not be undone ({': '.join(describe(error))})")
    except steps.AttemptStopped:
        return stopped(attempt, None)
    finally:
        steps.leave(token)
    if not left:
        return outcome
    kind, message = outcome.error or ("", "")
    return replace(outcome, error=(kind, "; ".join((message, *left))))


def _undo_one(attempt: Attempt, record: Record, function: Callable[..., Any] | None) -> None:
    if function is None:
        assert record.undo is not None
        raise LookupError(f"its compensation {record.undo['at']!r} cannot be imported in this process")
    codec = attempt.journal.codec
    assert record.undo is not None
    kind, data = record.undo["args"]
    args, kwargs = codec.loads_typed((kind, data))
    here = steps.scope()
    assert here is not None

    def invoke() -> Any:
        made = function(*args, **kwargs)
        return asyncio.run(_awaited(made)) if inspect.isawaitable(made) else made

    call = steps.StepCall(
        type="compensation",
        name=record.name,
        digest=record.digest,
        request=lambda: f"undo {record.request}",
        id=f"{record.key}#{record.slot}",
        dumps=lambda result: None,
    )
    steps.run(steps.perform(here, call), invoke)


async def _awaited(made: Any) -> Any:
    return await made


def stopped(attempt: Attempt, result: runs.Typed | None) -> Outcome:
    """Return how an attempt ends that was stopped in the middle of a step.

    Args:
        result: What the run has produced so far, for a run that is to wait.

    Raises:
        FencedError: If the worker has given the attempt up.
        Exception: The error that the attempt was stopped with.
    """
    stop = attempt.stop
    if stop is None:
        raise attempt.given_up()
    if stop.error is not None:
        raise stop.error
    if stop.question is not None:
        return Outcome("waiting", result=result, question=stop.question)
    return Outcome("sleeping", until=stop.until)
