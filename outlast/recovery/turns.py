"""Turns: how runs begin, get their thread, are taken over and give it on. Sans I/O.

A run is accepted by its head; the head of its thread names the run whose turn it is, and those that wait for theirs.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from outlast.checkpointer import cells, keys, records
from outlast.checkpointer.client import Delete, Steps
from outlast.checkpointer.head import Head
from outlast.checkpointer.registry import ACTIVE, RUNS
from outlast.checkpointer.thread import ThreadLog
from outlast.errors import RunConflictError, RunStateError, ThreadBusyError
from outlast.recovery.runs import NAMES, RunHead, RunInput, Running, change, instance_id, read, store


def accept(run_id: str, submitted: RunInput, limit: int, queue: bool = True) -> Steps[tuple[RunHead, bool]]:
    """Record a submission once. Returns the run's head and whether this call made the run.

    From when the head exists the run will be carried out, whatever happens to the submitter: the set of active runs,
    entered before, tells the workers.

    Args:
        queue: Whether the run waits if the thread is busy with another one.

    Raises:
        RunConflictError: If `run_id` is a run of another agent, thread or input.
        ThreadBusyError: If the thread is busy and `queue` is false.
    """
    name, written = yield from store(run_id, records.RUN, asdict(submitted), limit)
    yield from ACTIVE.put(run_id, 1)
    yield from RUNS.add(run_id)
    new = RunHead(
        run_id, submitted.agent, submitted.thread_id, submitted.fingerprint, name, instance=instance_id(run_id)
    ).body()

    def create(body: Any) -> Any:
        # A rejected run never began, so the same id may ask again.
        return new if body is None or body["status"] == "rejected" else None

    head = RunHead.of((yield from cells.update(keys.run_key(run_id), records.RUN_HEAD, create)))
    mine = head.input == name
    if not mine:
        yield Delete(written)
    if head.fingerprint != submitted.fingerprint:
        raise RunConflictError(
            f"run {run_id!r} was submitted before with another agent, thread or input "
            f"(agent {head.agent!r}, thread {head.thread_id!r}); a run_id names one submission: use another one"
        )
    if head.ended:
        yield from ACTIVE.discard(run_id)
        return head, False
    if mine:
        yield from _line_up(head, queue)
    return head, mine


def _line_up(head: RunHead, queue: bool) -> Steps[None]:
    """Enter the run in its thread's queue."""
    log = ThreadLog(head.thread_id)
    thread = yield from log.change(lambda now: _entered(now, head.run_id, queue))
    if thread.active == head.run_id or head.run_id in thread.queue:
        return
    yield from change(head.run_id, lambda now: replace(now, status="rejected"))
    yield from ACTIVE.discard(head.run_id)
    raise ThreadBusyError(
        f"thread {head.thread_id!r} is busy with run {thread.active!r}; wait for that run, "
        "or submit with if_busy='queue'"
    )


def _entered(thread: Head, run_id: str, queue: bool) -> Head | None:
    if thread.active == run_id or run_id in thread.queue:
        return None
    if not thread.active:
        return replace(thread, active=run_id)
    return replace(thread, queue=(*thread.queue, run_id)) if queue else None


def take_over(head: RunHead, worker: str, delivery: str) -> Steps[tuple[RunHead, Head] | None]:
    """Begin an attempt: own the thread with the next epoch. Returns None if it is another run's turn."""
    log = ThreadLog(head.thread_id)
    attempt = f"{worker}/{NAMES.next()}"

    def own(thread: Head) -> Head | None:
        entered = _entered(thread, head.run_id, True) or thread
        if entered.active != head.run_id:
            return None if entered is thread else entered
        if entered.owner == attempt:
            return None
        return replace(entered, epoch=entered.epoch + 1, owner=attempt)

    thread = yield from log.change(own)
    if thread.active != head.run_id:
        return None
    root = thread.root.checkpoint_id if thread.root else ""
    running = Running(worker, thread.epoch, delivery)

    def begin(now: RunHead) -> RunHead | None:
        if now.ended or (now.running and now.running.epoch > thread.epoch):
            return None
        base = root if now.base is None else now.base
        return replace(now, status="running", running=running, attempts=now.attempts + 1, base=base)

    head = yield from change(head.run_id, begin)
    return (head, thread) if head.running == running else None


def release(head: RunHead) -> Steps[str | None]:
    """Let the next run have the thread of an ended one. Returns the id of the run whose turn it is, if any."""
    log = ThreadLog(head.thread_id)

    def leave(thread: Head) -> Head | None:
        if thread.active == head.run_id:
            active, *rest = (*thread.queue, "") if thread.queue else ("",)
            return replace(thread, active=active, queue=tuple(name for name in rest if name))
        if head.run_id in thread.queue:
            return replace(thread, queue=tuple(name for name in thread.queue if name != head.run_id))
        return None

    existing = yield from log.read()
    thread = (yield from log.change(leave)) if existing else None
    yield from ACTIVE.discard(head.run_id)
    return thread.active if thread and thread.active else None


def supersede(run_id: str) -> Steps[str | None]:
    """End a run that waits for an answer, in favour of a new one. Returns whose turn it is then, if anybody's."""
    head = yield from change(run_id, lambda now: replace(now, status="superseded") if now.idle else None)
    if head.status != "superseded":
        return None
    return (yield from release(head))


def retry(run_id: str) -> Steps[RunHead]:
    """Let a failed run go on from where it failed.

    Raises:
        RunNotFoundError: If there is no such run.
        RunStateError: If it has not failed, or its steps were undone.
    """
    seen = yield from read(run_id)
    yield from ACTIVE.put(run_id, 1)

    def anew(now: RunHead) -> RunHead | None:
        if now.retries == seen.retries + 1 and now.status == "accepted":
            return None
        if now.status != "failed" or now.ending:
            state = "its steps were undone" if now.status == "failed" else f"it is {now.status}"
            raise RunStateError(f"run {run_id!r} cannot be tried again: {state}; submit a new run")
        return replace(
            now, status="accepted", error=None, message="", retries=now.retries + 1, instance=_next_instance(now)
        )

    head = yield from change(run_id, anew)
    yield from _line_up(head, True)
    return head


def overtake(head: RunHead) -> Steps[RunHead | None]:
    """Give a run whose worker hangs a new workflow. Returns the new head, or None if somebody else was quicker."""
    instance = _next_instance(head)
    changed = yield from change(
        head.run_id,
        lambda now: replace(now, instance=instance) if now.running == head.running and not now.ended else None,
    )
    return changed if changed.instance == instance else None


def _next_instance(head: RunHead) -> str:
    generation = int(head.instance.rpartition("~")[2]) if "~" in head.instance else 0
    return f"{instance_id(head.run_id)}~{generation + 1}"
