"""What the controller and a framework's adapter say to each other."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from outlast.checkpointer.client import StateClient
from outlast.checkpointer.thread import Fence
from outlast.recovery.runs import RunHead, RunInput, Typed


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        status: `done`, `waiting` (for a signal), `yielded` (drained, to go on elsewhere) or `failed`.
        result: What the run has produced so far, serialised.
        error: Type and message of the exception, if it failed.
        exception: The exception itself, for a caller in this process.
    """

    status: Literal["done", "waiting", "yielded", "failed"]
    result: Typed | None = None
    error: tuple[str, str] | None = None
    exception: BaseException | None = None


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
        finished: Set when the attempt is over and what came of it is written down.
    """

    head: RunHead
    submitted: RunInput
    fence: Fence
    client: StateClient
    attachment: Attachment | None
    publish: Publish
    finished: threading.Event = field(default_factory=threading.Event)
    _drain: threading.Event = field(default_factory=threading.Event)

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


class Agent(Protocol):
    """An agent of some framework, as the controller sees it."""

    @property
    def name(self) -> str:
        """The name that finds the agent again after a restart."""

    def advance(self, attempt: Attempt) -> Outcome:
        """Carry the run on from its last committed state until it ends, waits or is asked to drain.

        Raises:
            FencedError: If another attempt has taken over.
            StoreError, SidecarUnavailableError: If the state store fails; the attempt is then made again.
        """
