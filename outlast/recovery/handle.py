"""A handle on a run: wait for it, answer it, cancel it; from any process, sync and async."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from outlast.errors import OutlastError, RunCancelledError, RunFailedError, SidecarUnavailableError, StoreError
from outlast.recovery import journal, runs
from outlast.recovery.answers import Answer, give_answer, question
from outlast.recovery.attempt import Attachment
from outlast.recovery.codec import Codec
from outlast.recovery.journal import Record
from outlast.recovery.runs import RunHead, Status
from outlast.recovery.runtime import Runtime
from outlast.recovery.steps import Question

logger = logging.getLogger("outlast.runtime")

T = TypeVar("T")

_FIRST_POLL: Final = 0.02
_LONGEST_POLL: Final = 0.5
_PATIENCE: Final = 60.0
_AWAY: Final = (StoreError, SidecarUnavailableError)


class RunHandle(Generic[T]):
    """A run, wherever it is carried out.

    Args:
        runtime: The store the run is in.
        run_id: The run.
        codec: Turns a stored result into the value the agent's own call would have returned.
        answer: Hands the run an answer: checks it, serialises it, signals.

    Attributes:
        run_id: The run.
    """

    def __init__(
        self,
        runtime: Runtime,
        run_id: str,
        codec: Codec,
        answer: Callable[[str, Any], None],
        attachment: Attachment | None = None,
    ) -> None:
        self.run_id = run_id
        self._runtime = runtime
        self._codec = codec
        self._answer = answer
        self._attachment = attachment or Attachment()
        if attachment is None:
            runtime.attach(run_id, self._attachment)

    def __repr__(self) -> str:
        return f"RunHandle({self.run_id!r})"

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening to the run; the run goes on."""
        self._runtime.detach(self.run_id, self._attachment)

    def _head(self) -> RunHead:
        return self._runtime.client.run(runs.read(self.run_id))

    def status(self) -> Status:
        """Return where the run is now.

        Raises:
            RunNotFoundError: If there is no such run.
        """
        return self._head().status

    async def astatus(self) -> Status:
        """Return where the run is now. Async face of `status`."""
        return (await self._runtime.client.arun(runs.read(self.run_id))).status

    def result(self, timeout: float | None = None) -> T:
        """Wait until the run has ended or waits for an answer, and return what its own call would return then.

        For a LangGraph run that waits, that is the state with `__interrupt__` in it; after `resume`, call again.

        Args:
            timeout: Seconds to wait at most; None waits for ever.

        Raises:
            TimeoutError: If the run is not there after `timeout` seconds; it goes on.
            RunFailedError: If the run failed; where that happened in this process, the agent's own exception instead.
            RunCancelledError: If the run was cancelled, or superseded by another one on its thread.
            StoreError, SidecarUnavailableError: If the store answers nothing else for a minute; the run may go on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poll, outage = _FIRST_POLL, _Outage()
        while True:
            try:
                head = outage.over(self._head())
                if _settled(head):
                    return self._value(head)
            except _AWAY as error:
                outage.bear(error)
            self._attachment.settled.wait(self._pause(poll, deadline, outage))
            self._attachment.settled.clear()
            poll = min(poll * 1.5, _LONGEST_POLL)

    async def aresult(self, timeout: float | None = None) -> T:
        """Wait until the run has ended or waits for an answer. Async face of `result`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        poll, outage = _FIRST_POLL, _Outage()
        while True:
            try:
                head = outage.over(await self._runtime.client.arun(runs.read(self.run_id)))
                if _settled(head):
                    return await asyncio.to_thread(self._value, head)
            except _AWAY as error:
                outage.bear(error)
            await self._asettled(self._pause(poll, deadline, outage))
            self._attachment.settled.clear()
            poll = min(poll * 1.5, _LONGEST_POLL)

    async def _asettled(self, timeout: float) -> None:
        """Wait until the attachment is told, `timeout` seconds at most."""
        loop, told = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.set)

        self._attachment.listeners.append(tell)
        try:
            if not self._attachment.settled.is_set():
                async with asyncio.timeout(timeout):
                    await told.wait()
        except TimeoutError:
            return
        finally:
            self._attachment.listeners.remove(tell)

    def _pause(self, poll: float, deadline: float | None, outage: _Outage) -> float:
        if deadline is None:
            return poll
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"run {self.run_id!r} is still {outage.status}; it goes on, ask again later")
        return min(poll, left)

    def _value(self, head: RunHead) -> T:
        if head.status == "failed":
            if self._attachment.failure is not None:
                raise self._attachment.failure
            kind, message = head.error or ("unknown", "")
            if head.message:
                message = self._codec.loads_typed(self._runtime.client.run(runs.read_typed(self.run_id, head.message)))
            raise RunFailedError(self.run_id, kind, message)
        if head.status in ("cancelled", "superseded", "rejected"):
            raise RunCancelledError(f"run {self.run_id!r} was {head.status}")
        value: T = self._codec.loads_typed(self._runtime.client.run(runs.read_typed(self.run_id, head.result)))
        return value

    def resume(self, value: Any = None) -> None:
        """Give a waiting run its answer; it goes on at once, on whatever worker.

        Args:
            value: The answer; for LangGraph what `Command(resume=value)` takes, or a whole `Command`.

        Raises:
            RunNotFoundError: If there is no such run.
            RunStateError: If the run does not wait for an answer.
        """
        self._answer(self.run_id, value)

    async def aresume(self, value: Any = None) -> None:
        """Give a waiting run its answer. Async face of `resume`."""
        await asyncio.to_thread(self.resume, value)

    def question(self) -> Question | None:
        """Return what outlast itself asks while the run waits (a step in doubt, a budget used up), or None."""
        return question(self._runtime, self._codec, self._head())

    def answer(self, answer: Answer) -> None:
        """Answer the question that outlast asks; the run goes on at once.

        Args:
            answer: Made by `done`, `again`, `fail` or `allow`.

        Raises:
            RunNotFoundError: If there is no such run.
            RunStateError: If it asks nothing, or the answer does not fit the question.
        """
        give_answer(self._runtime, self._codec, self.run_id, answer)

    def steps(self) -> list[Record]:
        """Return the recorded steps of the run, in the order in which they ended."""
        return self._runtime.client.run(journal.read(self.run_id, self._codec))

    def retry(self) -> None:
        """Let a failed run go on from where it failed; recorded results are used, recorded errors are not.

        Raises:
            RunNotFoundError: If there is no such run.
            RunStateError: If it has not failed, or its steps were undone.
        """
        self._attachment.failure = None
        self._runtime.retry(self.run_id)

    def cancel(self, compensate: bool = False) -> None:
        """Ask the run to end: at once where it waits, else at its next boundary. Ended runs stay as they are.

        Args:
            compensate: Undo its finished steps first, by what they gave as `compensate`.
        """
        self._runtime.cancel(self.run_id, compensate)

    async def acancel(self, compensate: bool = False) -> None:
        """Ask the run to end. Async face of `cancel`."""
        await asyncio.to_thread(self.cancel, compensate)


class _Outage:
    """A store that is away for a while does not end the waiting for a run, which goes on without its waiter."""

    def __init__(self) -> None:
        self.status: str = "unknown"
        self._since: float | None = None

    def over(self, head: RunHead) -> RunHead:
        self._since, self.status = None, head.status
        return head

    def bear(self, error: OutlastError) -> None:
        now = time.monotonic()
        if self._since is None:
            logger.warning("the state store does not answer, waiting goes on: %s", error)
            self._since = now
        if now - self._since > _PATIENCE:
            raise error


def _settled(head: RunHead) -> bool:
    return head.ended or head.idle
