"""Runs in the store: their heads and records, and how these change. Sans I/O; knows no framework and no workflow.

A run has one small head that is swapped (`RunHead`), and immutable records for its input, its signals and its results.
The run head, not the workflow, decides whether a `run_id` is new: a completed Dapr workflow id can be started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from outlast.checkpointer import cells, keys, records
from outlast.checkpointer.client import Save, Steps, load
from outlast.errors import FencedError, RunNotFoundError, RunStateError

Status = Literal[
    "accepted", "queued", "running", "waiting", "sleeping", "done", "failed", "cancelled", "superseded", "rejected"
]
ENDED: Final = frozenset({"done", "failed", "cancelled", "superseded", "rejected"})

Typed = tuple[str, bytes]

HIDDEN: Final = "(encrypted)"
"""Stands for the message of an error that is stored encrypted."""
NAMES = keys.RecordNames()


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


def store(run_id: str, kind: str, body: Any, limit: int) -> Steps[tuple[str, list[str]]]:
    """Write an immutable record of a run. Returns its name and the keys it is at."""
    name = NAMES.next()
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
        name, _ = yield from store(head.run_id, records.RESULT, list(result), limit)
    asked: tuple[str, str, str] | None = None
    if question:
        record, _ = yield from store(head.run_id, records.RESULT, list(question[2]), limit)
        asked = (question[0], question[1], record)

    secret = ""
    if message and error:
        secret, _ = yield from store(head.run_id, records.RESULT, list(message), limit)
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


def signal(run_id: str, value: Typed, limit: int, addressed: bool = False) -> Steps[RunHead]:
    """Hand a waiting run something it waits for.

    Args:
        addressed: Whether the value says itself what it answers, so that it may join others not yet consumed.

    Raises:
        RunNotFoundError: If there is no such run.
        RunStateError: If the run does not wait, or has been answered already.
    """
    yield from read(run_id)
    name, _ = yield from store(run_id, records.RESULT, list(value), limit)

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
    name, _ = yield from store(run_id, records.RESULT, list(value), limit)

    def give(now: RunHead) -> RunHead | None:
        if now.answers.get(question_id) == name:
            return None
        if now.status != "waiting" or not now.question or now.question[0] != question_id or now.answers:
            raise RunStateError(f"run {run_id!r} does not ask {question_id!r} now; `outlast show {run_id}` shows it")
        return replace(now, answers={question_id: name})

    return (yield from change(run_id, give))
