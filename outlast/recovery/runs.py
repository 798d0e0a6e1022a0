"""Runs in the store: accepting, taking over, waiting, ending. Sans I/O; knows no framework and no workflow.

A run has one small head that is swapped (`RunHead`), and immutable records for its input, its signals and its results.
The run head, not the workflow, decides whether a `run_id` is new: a completed Dapr workflow id can be started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from outlast.checkpointer import cells, keys, records
from outlast.checkpointer.client import Delete, Save, Steps, load
from outlast.checkpointer.head import Head
from outlast.checkpointer.registry import ACTIVE, RUNS
from outlast.checkpointer.thread import ThreadLog
from outlast.errors import FencedError, RunConflictError, RunNotFoundError, RunStateError, ThreadBusyError

Status = Literal[
    "accepted", "queued", "running", "waiting", "sleeping", "done", "failed", "cancelled", "superseded", "rejected"
]
ENDED: Final = frozenset({"done", "failed", "cancelled", "superseded", "rejected"})

Typed = tuple[str, bytes]

HIDDEN: Final = "(encrypted)"
"""Stands for the message of an error that is stored encrypted."""
_NAMES = keys.RecordNames()


@dataclass(frozen=True)
class RunInput:
    """What was submitted; never changes.

    Attributes:
        agent: Name of the agent.
        thread_id: The thread the run works on.
        payload: The agent's adapter's own encoding of input, config and options.
        fingerprint: Digest of what makes two submissions the same.
    """

    agent: str
    thread_id: str
    payload: Typed
    fingerprint: str


@dataclass(frozen=True)
class Running:
    """The attempt in progress: the worker, its epoch, and the delivery of `advance` that it is."""

    worker: str
    epoch: int
    delivery: str


@dataclass(frozen=True)
class RunHead:
    """The one record of a run that is overwritten.

    Attributes:
        run_id: The run.
        agent, thread_id, fingerprint, input: From the submission; `input` names its record.
        status: Where the run is.
        instance: Id of the workflow that drives the run.
        attempts: Attempts begun so far.
        running: The attempt in progress, if any.
        base: Root checkpoint of the thread when the first attempt began; empty for a new thread, None before.
        signals: Names of the records of signals not yet consumed, oldest first.
        taken: What the adapter notes of the signal it is applying; `signal` is the name of its record.
        call: Name of the record of the signal whose options are in force; empty while those of the submission are.
        result: Name of the record of the newest result.
        error: Type and message of the exception the run failed with.
        message: Name of the record of that message, where it may only be stored encrypted.
        cancel: Whether somebody asked the run to end; `compensate`: and to undo its finished steps.
        retries: How often the run was tried again after it had failed.
        until: Unix time until which a sleeping run sleeps.
        question: What outlast itself asks while the run waits: its id, its kind, and the name of the record of it.
        answers: Names of the records of answers not yet consumed, by id of the question.
        ending: Status and error the run is to end with, once its steps are undone.
        created, updated: Unix times in seconds.
    """

    run_id: str
    agent: str
    thread_id: str
    fingerprint: str
    input: str
    status: Status = "accepted"
    instance: str = ""
    attempts: int = 0
    running: Running | None = None
    base: str | None = None
    signals: tuple[str, ...] = ()
    taken: dict[str, Any] | None = None
    call: str = ""
    result: str = ""
    error: tuple[str, str] | None = None
    message: str = ""
    cancel: bool = False
    compensate: bool = False
    retries: int = 0
    until: float = 0.0
    question: tuple[str, str, str] | None = None
    answers: dict[str, str] = field(default_factory=dict)
    ending: tuple[Status, tuple[str, str] | None] | None = None
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    @property
    def idle(self) -> bool:
        """Whether the run waits for an answer that has not been given."""
        return self.status == "waiting" and not self.signals and not self.answers

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the run."""
        return self.status in ENDED

    def body(self) -> dict[str, Any]:
        """Return the run head as the body of a record."""
        return asdict(self)

    @staticmethod
    def of(body: dict[str, Any]) -> RunHead:
        """Return the run head with this body.

        Raises:
            CorruptRecordError: If it is no body of a run head.
        """
        return records.build("of a run head", lambda: RunHead._of(body))

    @staticmethod
    def _of(body: dict[str, Any]) -> RunHead:
        running, error, ending = body["running"], body["error"], body.get("ending")
        return RunHead(
            **{
                **body,
                "running": Running(**running) if running else None,
                "signals": tuple(body["signals"]),
                "error": tuple(error) if error else None,
                "question": tuple(body["question"]) if body.get("question") else None,
                "ending": (ending[0], tuple(ending[1]) if ending[1] else None) if ending else None,
            }
        )


def instance_id(run_id: str) -> str:
    """Return the workflow id of a run: the run id itself where Dapr can take it."""
    plain = 0 < len(run_id) <= 100 and all(c.isascii() and (c.isalnum() or c in "._-") for c in run_id)
    return run_id if plain else f"run-{keys.digest(run_id)}"


def read(run_id: str) -> Steps[RunHead]:
    """Return the head of a run.

    Raises:
        RunNotFoundError: If no such run was ever accepted.
    """
    body, _ = yield from cells.read(keys.run_key(run_id), records.RUN_HEAD)
    if body is None:
        raise RunNotFoundError(f"no run {run_id!r} in this state store; `outlast runs` lists those there are")
    return RunHead.of(body)


def read_many(run_ids: list[str]) -> Steps[list[RunHead]]:
    """Return the heads of those of these runs that exist."""
    bodies = yield from cells.read_many([keys.run_key(run_id) for run_id in run_ids], records.RUN_HEAD)
    return [RunHead.of(body) for body in bodies.values()]


def change(run_id: str, change: Callable[[RunHead], RunHead | None]) -> Steps[RunHead]:
    """Swap the head of a run for `change(head)`, which must be idempotent; None leaves it."""

    def step(body: Any) -> Any:
        if body is None:
            raise RunNotFoundError(f"no run {run_id!r} in this state store")
        changed = change(RunHead.of(body))
        return None if changed is None else replace(changed, updated=time.time()).body()

    return RunHead.of((yield from cells.update(keys.run_key(run_id), records.RUN_HEAD, step)))


def _store(run_id: str, kind: str, body: Any, limit: int) -> Steps[tuple[str, list[str]]]:
    """Write an immutable record of a run. Returns its name and the keys it is at."""
    name = _NAMES.next()
    pairs = list(records.split(f"{keys.run_key(run_id)}-{name}", records.encode(kind, body), limit))
    yield Save(pairs)
    return name, [key for key, _ in pairs]


def _fetch(run_id: str, kind: str, name: str) -> Steps[Any]:
    key = f"{keys.run_key(run_id)}-{name}"
    return records.decode(key, kind, (yield from load([key])).get(key, b""))


def read_input(head: RunHead) -> Steps[RunInput]:
    """Return what was submitted as this run."""
    body = yield from _fetch(head.run_id, records.RUN, head.input)
    return RunInput(**{**body, "payload": tuple(body["payload"])})


def read_typed(run_id: str, name: str) -> Steps[Typed]:
    """Return a result or a signal of a run by the name of its record."""
    kind, data = yield from _fetch(run_id, records.RESULT, name)
    return kind, data


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
    name, written = yield from _store(run_id, records.RUN, asdict(submitted), limit)
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
    attempt = f"{worker}/{_NAMES.next()}"

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


def settle(
    head: RunHead,
    status: Status,
    limit: int,
    *,
    result: Typed | None = None,
    error: tuple[str, str] | None = None,
    message: Typed | None = None,
    until: float = 0.0,
    question: tuple[str, str, Typed] | None = None,
    retried: bool = False,
) -> Steps[RunHead]:
    """Write down how the attempt of `head` ended.

    Args:
        message: The message of `error`, if that may only be stored encrypted.
        question: Id, kind and content of what outlast asks.
        retried: Whether the run has failed and is tried again.

    Raises:
        FencedError: If another attempt has taken the run over.
    """
    name = head.result
    if result:
        name, _ = yield from _store(head.run_id, records.RESULT, list(result), limit)
    asked: tuple[str, str, str] | None = None
    if question:
        record, _ = yield from _store(head.run_id, records.RESULT, list(question[2]), limit)
        asked = (question[0], question[1], record)

    secret = ""
    if message and error:
        secret, _ = yield from _store(head.run_id, records.RESULT, list(message), limit)
        error = (error[0], HIDDEN)

    def end(now: RunHead) -> RunHead | None:
        if now.status == status and now.result == name and now.running is None:
            return None
        if now.running != head.running or now.ended:
            raise FencedError(f"run {head.run_id!r} was taken over; what this attempt found is dropped")
        # An adapter that applies several signals at once notes them all.
        for signal in (now.taken.get("signals") or [now.taken["signal"]]) if now.taken else ():
            now = spent(now, signal)
        changed = replace(now, status=status, running=None, result=name, error=error, until=until, question=asked)
        return replace(changed, message=secret, answers={}, retries=now.retries + retried)

    return (yield from change(head.run_id, end))


def spent(now: RunHead, signal: str) -> RunHead:
    """Return the head without a signal that was applied; the options that came with it are in force from then on."""
    call = signal if now.taken and now.taken["signal"] == signal and now.taken.get("call") else now.call
    return replace(now, signals=tuple(name for name in now.signals if name != signal), taken=None, call=call)


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


def signal(run_id: str, value: Typed, limit: int, addressed: bool = False) -> Steps[RunHead]:
    """Hand a waiting run something it waits for.

    Args:
        addressed: Whether the value says itself what it answers, so that it may join others not yet consumed.

    Raises:
        RunNotFoundError: If there is no such run.
        RunStateError: If the run does not wait, or has been answered already.
    """
    yield from read(run_id)
    name, _ = yield from _store(run_id, records.RESULT, list(value), limit)

    def hand(now: RunHead) -> RunHead | None:
        if name in now.signals:
            return None
        if now.ended:
            raise RunStateError(f"run {run_id!r} is {now.status}: it waits for nothing any more; submit a new run")
        if now.status != "waiting" or (now.signals and not addressed):
            # An answer given ahead, or twice, would silently answer the next question.
            raise RunStateError(f"run {run_id!r} does not wait for an answer now; wait until its status is 'waiting'")
        return replace(now, signals=(*now.signals, name))

    return (yield from change(run_id, hand))


def answer(run_id: str, question_id: str, value: Typed, limit: int) -> Steps[RunHead]:
    """Answer what outlast itself asks of a waiting run.

    Raises:
        RunNotFoundError: If there is no such run.
        RunStateError: If it does not ask that, or has been answered already.
    """
    yield from read(run_id)
    name, _ = yield from _store(run_id, records.RESULT, list(value), limit)

    def give(now: RunHead) -> RunHead | None:
        if now.answers.get(question_id) == name:
            return None
        if now.status != "waiting" or not now.question or now.question[0] != question_id or now.answers:
            raise RunStateError(f"run {run_id!r} does not ask {question_id!r} now; `outlast show {run_id}` shows it")
        return replace(now, answers={question_id: name})

    return (yield from change(run_id, give))


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


def supersede(run_id: str) -> Steps[str | None]:
    """End a run that waits for an answer, in favour of a new one. Returns whose turn it is then, if anybody's."""
    head = yield from change(run_id, lambda now: replace(now, status="superseded") if now.idle else None)
    if head.status != "superseded":
        return None
    return (yield from release(head))


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
