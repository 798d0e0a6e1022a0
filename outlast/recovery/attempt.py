"""What the controller and a framework's adapter say to each other."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from outlast.checkpointer.client import StateClient
from outlast.checkpointer.thread import Fence
from outlast.errors import FencedError
from outlast.recovery.budget import Account, Budget
from outlast.recovery.codec import Codec
from outlast.recovery.journal import Journal
from outlast.recovery.policy import Breakers, Policies
from outlast.recovery.runs import RunHead, RunInput, Typed
from outlast.recovery.steps import AttemptStopped, Question, Stop


class AttemptHungError(FencedError):
    """The worker has given an attempt up because it hangs."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        status: `done`, `waiting` (for a signal), `sleeping`, `yielded` (drained, to go on elsewhere) or `failed`.
        result: What the run has produced so far, serialised.
        error: Type and message of the exception, if it failed.
        exception: The exception itself, for a caller in this process.
        question: What a waiting run asks, if outlast itself asks it.
        until: Unix time at which a sleeping run goes on.
    """

    status: Literal["done", "waiting", "sleeping", "yielded", "failed"]
    result: Typed | None = None
    error: tuple[str, str] | None = None
    exception: BaseException | None = None
    question: Question | None = None
    until: float | None = None


@dataclass
class Attachment:
    """The caller of a run in this process, while it waits: what cannot be stored, and where to tell it of progress.

    Attributes:
        loop: The event loop the run was submitted from, if any; its coroutines run there.
        context: The context variables of the caller.
        extras: What the adapter wants to have as it was given (callbacks and the like).
        chunks: Where stream chunks go.
        settled: Set whenever the run ends or begins to wait.
        failure: The exception the run failed with.
    """

    loop: asyncio.AbstractEventLoop | None = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    extras: dict[str, Any] = field(default_factory=dict)
    chunks: queue.SimpleQueue[Any] | None = None
    settled: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    listeners: list[Callable[[], None]] = field(default_factory=list)

    def settle(self) -> None:
        """Tell whoever waits that the run has ended or waits for an answer."""
        self.settled.set()
        for listener in list(self.listeners):
            listener()


Publish = Callable[[Any, Callable[[Any], Typed]], None]
"""Hands a stream chunk to whoever listens; the second argument serialises it if that is elsewhere."""


@dataclass
class Attempt:
    """One execution of a run's next stretch by one worker.

    Attributes:
        head: The run.
        submitted: What was submitted.
        fence: What the attempt holds of the thread.
        client: The state store.
        attachment: The caller, if it is in this process.
        publish: Hands a stream chunk to whoever listens.
        journal: The steps of the run.
        policies, budget: Of the agent.
        account: What the run has spent.
        breakers: Of the worker.
        answers: What persons answered to questions of outlast, by id of the question.
        finished: Set when the attempt is over and what came of it is written down.
        stop: Why the attempt is to end in the middle of a step, once it is.
        flying: The calls in progress.
        doomed: Calls that only wait for a stopped call in them.
        loop: The event loop that the attempt runs on, if any.
    """

    head: RunHead
    submitted: RunInput
    fence: Fence
    client: StateClient
    attachment: Attachment | None
    publish: Publish
    journal: Journal
    policies: Policies
    budget: Budget
    account: Account
    breakers: Breakers
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: threading.Event = field(default_factory=threading.Event)
    stop: Stop | None = None
    flying: set[object] = field(default_factory=set)
    doomed: set[object] = field(default_factory=set)
    loop: asyncio.AbstractEventLoop | None = None
    _drain: threading.Event = field(default_factory=threading.Event)
    _abandoned: threading.Event = field(default_factory=threading.Event)
    _deadlines: dict[object, float] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """The run."""
        return self.head.run_id

    @property
    def thread_id(self) -> str:
        """The thread."""
        return self.head.thread_id

    @property
    def draining(self) -> bool:
        """Whether the attempt is asked to stop at the next boundary."""
        return self._drain.is_set()

    def drain(self) -> None:
        """Ask the attempt to stop at the next boundary."""
        self._drain.set()

    # --- ending in the middle

    @property
    def stopped(self) -> bool:
        """Whether the attempt is to end in the middle of a step."""
        return self.stop is not None or self._abandoned.is_set()

    def check(self) -> None:
        """Unwind if the attempt is to end.

        Raises:
            AttemptStopped: If so.
        """
        if self.stopped:
            raise AttemptStopped

    def refuse_if_stopped(self) -> None:
        """Let nothing be committed once the attempt is to end in the middle of a step.

        Raises:
            FencedError: If so.
        """
        if self.stopped:
            raise FencedError(f"this attempt of run {self.run_id!r} ends: what it has not recorded is done again")

    def end_with(self, stop: Stop) -> None:
        """Let the attempt end, with the first reason that is given; an error goes before what can be asked again."""
        if self.stop is None or (stop.error is not None and self.stop.error is None):
            self.stop = stop

    # --- hanging

    @property
    def abandoned(self) -> bool:
        """Whether the worker has given the attempt up, because it hangs."""
        return self._abandoned.is_set()

    def abandon(self) -> None:
        """Give the attempt up; whatever it still does is fenced by the next."""
        self._abandoned.set()

    def given_up(self) -> AttemptHungError:
        """Return the error to end with after `abandon`."""
        return AttemptHungError(f"this attempt of run {self.run_id!r} hung and was given up")

    def watched(self, timeout: float) -> object:
        """Expect something within `timeout` seconds, until `unwatched` is called with the result."""
        token = object()
        self._deadlines[token] = time.monotonic() + timeout
        return token

    def unwatched(self, token: object) -> None:
        """What was expected has come."""
        self._deadlines.pop(token, None)

    def overdue(self, grace: float) -> bool:
        """Whether something expected is late by more than `grace` seconds: not even its timeout could be served."""
        now = time.monotonic()
        return any(now - deadline > grace for deadline in list(self._deadlines.values()))


class Agent(Protocol):
    """An agent of some framework, as the controller sees it."""

    @property
    def name(self) -> str:
        """The name that finds the agent again after a restart."""

    @property
    def policies(self) -> Policies:
        """What to do when steps and runs of the agent fail."""

    @property
    def budget(self) -> Budget:
        """What a run of the agent may spend."""

    @property
    def codec(self) -> Codec:
        """Serialises the results of steps."""

    def advance(self, attempt: Attempt) -> Outcome:
        """Carry the run on from its last committed state until it ends, waits or is asked to drain.

        Raises:
            FencedError: If another attempt has taken over.
            StoreError, SidecarUnavailableError: If the state store fails; the attempt is then made again.
        """
