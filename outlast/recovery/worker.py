"""The worker of a process: takes deliveries of `advance` from the sidecar and carries runs on."""

from __future__ import annotations

import base64
import functools
import logging
import math
import os
import socket
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from dapr.ext.workflow import DaprWorkflowContext, WorkflowActivityContext, WorkflowRuntime
from dapr.ext.workflow.logger import LoggerOptions

from outlast.checkpointer.head import Head
from outlast.checkpointer.registry import ACTIVE, WORKERS
from outlast.checkpointer.thread import Fence
from outlast.errors import (
    CorruptRecordError,
    FencedError,
    OutlastError,
    RunCancelledError,
    RunNotFoundError,
    SidecarUnavailableError,
    StoreError,
    UnknownFormatError,
)
from outlast.recovery import runs, turns
from outlast.recovery.answers import loads
from outlast.recovery.attempt import Agent, Attachment, Attempt, AttemptHungError, Outcome
from outlast.recovery.budget import Account
from outlast.recovery.codec import hides
from outlast.recovery.ending import again_at, carry_on, deadline
from outlast.recovery.failures import away, describe
from outlast.recovery.journal import Journal
from outlast.recovery.runs import RunHead
from outlast.recovery.watch import Holdings, Watch
from outlast.recovery.workflow import ADVANCE, RUN, Delivery, Next, run_workflow

if TYPE_CHECKING:
    from outlast.recovery.runtime import Runtime

logger = logging.getLogger("outlast.worker")

CONCURRENCY: Final = "OUTLAST_CONCURRENCY"
"""Environment variable: attempts a worker makes at once. Default 64."""

HISTORIES: Final = 256
"""Histories that the Dapr SDK keeps in memory. By default 100,000, for an hour each: waiting runs would cost memory.
One that is not there is fetched; those of runs are short."""
_QUIET: Final = 0.05
"""Seconds without anything to do after which a worker that stops may disconnect."""
_RETRY: Final = (StoreError, SidecarUnavailableError)
"""What an attempt is made again for; what is too large for the store fails the run instead."""


class Worker:
    """Carries runs on, for all agents of a runtime. One per process and runtime.

    Args:
        runtime: Knows the agents, the store and the waiting callers.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._client = runtime.client
        suffix = base64.b32encode(os.urandom(5)).decode("ascii").lower()
        self.id = f"{socket.gethostname()}-{os.getpid()}-{suffix}"
        self._held = Holdings()
        self._watch = Watch(runtime, self.id, self._held)
        self._ending: set[str] = set()
        self._last_turn = 0.0
        self._stopping = threading.Event()
        self._abandon = threading.Event()
        self._sdk: WorkflowRuntime | None = None

    # --- life

    def start(self) -> None:
        """Connect to the sidecar and begin to take work.

        Raises:
            SidecarUnavailableError: If no sidecar answers.
        """
        self._client.capabilities  # noqa: B018  fail early, with an error that names the mend
        address = self._client.address
        concurrency = int(os.environ.get(CONCURRENCY, "64"))
        self._sdk = WorkflowRuntime(
            host=address.host,
            port=str(address.port),
            logger_options=sdk_logging(),
            maximum_concurrent_activity_work_items=concurrency,
            maximum_thread_pool_workers=concurrency,
            history_cache_max_instances=HISTORIES,
        )

        def workflow(ctx: DaprWorkflowContext, ref: Any) -> Any:
            try:
                return (yield from run_workflow(ctx, ref))
            finally:
                self._ending.discard(ctx.instance_id)
                self._last_turn = time.monotonic()

        def advance(ctx: WorkflowActivityContext, delivery: Any) -> Any:
            return self.advance(delivery)

        self._sdk.register_workflow(workflow, name=RUN)
        self._sdk.register_activity(advance, name=ADVANCE)
        self._sdk.start()
        threading.Thread(target=self._watch.run, args=(self._stopping,), name="outlast-watch", daemon=True).start()
        logger.info("worker %s takes work from the %s", self.id, address)

    def stop(self, grace: float = 5.0) -> None:
        """Drain: ask attempts to stop at their next boundary, give up on them after `grace` seconds, disconnect."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        for attempt in self._held.in_progress():
            attempt.drain()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and self._held:
            time.sleep(0.01)
        self._abandon.set()
        self._let_workflows_end()
        try:
            self._client.run(WORKERS.discard(self.id))
        except OutlastError as error:
            logger.debug("worker %s could not sign off: %s", self.id, error)
        if self._sdk:
            self._sdk.shutdown()

    def _let_workflows_end(self, patience: float = 1.0) -> None:
        """Wait until what attempts here have answered is on its way and nothing new came for a moment.

        Else the SDK is torn down in the middle of it, which is harmless (the next worker gets it again) but noisy.
        """
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            quiet = time.monotonic() - self._last_turn > _QUIET
            if quiet and not self._ending:
                return
            time.sleep(0.005)

    # --- one delivery

    def advance(self, delivery: Delivery) -> Next:
        """Carry a run on; the body of the activity.

        Raises:
            StoreError, SidecarUnavailableError: If the state store fails; the workflow then calls again, later.
        """
        run_id = delivery["run"]
        self._held.delivered(run_id)
        try:
            step = self._advance(run_id, delivery)
            if step["then"] == "end":
                self._ending.add(delivery["instance"])
            return step
        except RunNotFoundError:
            logger.warning("run %s is not in the store any more; its workflow ends", run_id)
            return {"then": "end", "status": "unknown"}
        except AttemptHungError as error:
            logger.warning("run %s: %s", run_id, error)
            return {"then": "again"}
        except FencedError as error:
            logger.warning("run %s: %s: %s", run_id, type(error).__name__, error)
            return {"then": "sleep", "seconds": 1.0}
        except (CorruptRecordError, UnknownFormatError) as error:
            return self._unreadable(run_id, error)
        finally:
            self._last_turn = time.monotonic()
            self._held.answered(run_id)

    def _unreadable(self, run_id: str, error: OutlastError) -> Next:
        """Fail a run whose records cannot be read: trying again would not help."""
        logger.error("run %s fails: %s", run_id, error)
        failed = describe(error)
        self._runtime.failing(run_id, error)
        try:
            head = self._client.run(runs.change(run_id, lambda now: _failed(now, failed)))
            self._runtime.settled(head)
            self._client.run(turns.release(head))
        except (CorruptRecordError, UnknownFormatError) as unreleased:
            logger.error("run %s: its thread could not be given on: %s", run_id, unreleased)
            self._client.run(ACTIVE.discard(run_id))
        return {"then": "end", "status": "failed"}

    def _advance(self, run_id: str, delivery: Delivery) -> Next:
        head = self._client.run(runs.read(run_id))
        if head.ended:
            return self._end(head)
        if head.instance != delivery["instance"]:
            return {"then": "end", "status": "overtaken"}
        if self._stopping.is_set():
            return {"then": "sleep", "seconds": 0.2}
        agent = self._runtime.agents.get(head.agent)
        if agent is None:
            # Another process has it; a worker that comes with this agent wakes the run.
            return {"then": "sleep"}
        held = self._held.attempt(run_id)
        if held is not None:
            # Delivered again because the sidecar lost the connection, not this worker: the attempt goes on.
            self._until(held.finished)
            return {"then": "again"}
        if head.running and head.running.delivery != delivery["id"] and self._watch.alive(head):
            return {"then": "sleep", "seconds": 1.0}
        idle = self._idle(head, agent)
        if idle is not None:
            return idle
        if head.cancel and not head.compensate:
            return self._end(self._client.run(runs.change(run_id, _cancelled)))
        self._watch.beat()
        taken = self._client.run(turns.take_over(head, self.id, delivery["id"]))
        if taken is None:
            head = self._client.run(runs.change(run_id, _queued))
            return self._end(head) if head.ended else {"then": "wait"}
        attempt = self._begin(agent, *taken)
        try:
            return self._finish(agent, attempt, self._execute(functools.partial(carry_on, agent), attempt))
        except _RETRY:
            self._held.lost(attempt.head)
            raise
        finally:
            self._held.over(attempt)

    def _idle(self, head: RunHead, agent: Agent) -> Next | None:
        """Return what the workflow does if there is nothing to carry on now."""
        now, end = time.time(), deadline(head, agent.policies)
        if head.cancel or now >= end:
            return None
        if head.idle:
            self._runtime.settled(head)
            return {"then": "wait"} if end == math.inf else {"then": "wait", "seconds": end - now}
        if head.status == "sleeping" and now < head.until:
            return {"then": "pause", "seconds": min(head.until, end) - now}
        return None

    def _begin(self, agent: Agent, head: RunHead, thread: Head) -> Attempt:
        """Open the journal and begin an attempt."""
        fence = Fence(thread.epoch, thread.owner)
        journal = Journal(self._client, head.run_id, fence, agent.codec, head.attempts)
        if head.attempts > 1:
            self._client.run(journal.take_over())
        answers = {
            question: loads(agent.codec, self._client.run(runs.read_typed(head.run_id, name)))
            for question, name in head.answers.items()
        }
        attempt = Attempt(
            head=head,
            submitted=self._client.run(runs.read_input(head)),
            fence=fence,
            client=self._client,
            attachment=self._runtime.attachment(head.run_id),
            publish=self._runtime.publisher(head),
            journal=journal,
            policies=agent.policies,
            budget=agent.budget,
            account=Account(agent.budget, head.created, journal.records),
            breakers=self._runtime.breakers,
            answers=answers,
        )
        self._held.begun(attempt)
        return attempt

    def _until(self, event: threading.Event, attempt: Attempt | None = None) -> None:
        """Wait for `event`.

        Raises:
            FencedError: If `attempt` is given up meanwhile.
            SidecarUnavailableError: If the worker is stopped meanwhile.
        """
        while not event.wait(0.5):
            if self._abandon.is_set():
                raise SidecarUnavailableError("the worker was stopped in the middle of an attempt")
            if attempt is not None and attempt.abandoned:
                raise attempt.given_up()

    def _execute(self, advance: Any, attempt: Attempt) -> Outcome:
        """Run the framework on a thread of its own, so that a stop need not wait for the user's code."""
        outcome: list[Outcome] = []
        failure: list[BaseException] = []
        done = threading.Event()
        attachment = attempt.attachment or Attachment()

        def body() -> None:
            try:
                outcome.append(attachment.context.copy().run(advance, attempt))
            except BaseException as error:
                failure.append(error)
            finally:
                done.set()

        if self._stopping.is_set():
            attempt.drain()
        logger.info("run %s: attempt %d, epoch %d", attempt.run_id, attempt.head.attempts, attempt.fence.epoch)
        threading.Thread(target=body, name=f"outlast-{attempt.run_id}", daemon=True).start()
        self._until(done, attempt)
        if failure:
            error = failure[0]
            if isinstance(error, FencedError) or away(error):
                raise error
            logger.error("run %s: attempt failed outside the agent", attempt.run_id, exc_info=error)
            return Outcome("failed", error=describe(error), exception=error)
        return outcome[0]

    def _finish(self, agent: Agent, attempt: Attempt, outcome: Outcome) -> Next:
        limit = self._client.capabilities.quirks.max_value
        status: runs.Status = "accepted" if outcome.status == "yielded" else outcome.status
        if isinstance(outcome.exception, RunCancelledError) and attempt.head.cancel:
            status = "cancelled"
            outcome = replace(outcome, exception=None)
        failed = again_at(agent, attempt, outcome) if outcome.status == "failed" else None
        if failed is not None:
            status = "sleeping"
        elif outcome.exception:
            # Before the status can be read: a caller in this process is to get the agent's own exception.
            self._runtime.failing(attempt.run_id, outcome.exception)
        if outcome.status == "failed":
            status = attempt.head.ending[0] if attempt.head.ending else status
        asked = outcome.question
        question = (asked.id, asked.kind, agent.codec.dumps_typed(vars(asked))) if asked else None
        head = self._client.run(
            runs.settle(
                attempt.head, status, limit, result=outcome.result, error=outcome.error,
                until=failed or outcome.until or 0.0, question=question,
                message=agent.codec.dumps_typed(outcome.error[1]) if outcome.error and hides(agent.codec) else None,
                retried=failed is not None,
            )
        )  # fmt: skip
        if head.status == "failed":
            logger.warning("run %s failed: %s", head.run_id, ": ".join(head.error or ()))
        if head.status == "accepted" or (head.status == "waiting" and (not head.idle or head.cancel)):
            return {"then": "again"}
        if head.ended:
            return self._end(head)
        return self._idle(head, agent) or {"then": "again"}

    def _end(self, head: RunHead) -> Next:
        self._runtime.settled(head)
        successor = self._client.run(turns.release(head))
        if successor:
            self._runtime.wake(successor)
        return {"then": "end", "status": head.status}


def _cancelled(now: RunHead) -> RunHead | None:
    return None if now.ended else replace(now, status="cancelled", running=None)


def _failed(now: RunHead, error: tuple[str, str]) -> RunHead | None:
    return None if now.ended else replace(now, status="failed", running=None, error=error)


def _queued(now: RunHead) -> RunHead | None:
    return replace(now, status="queued") if now.status == "accepted" else None


def sdk_logging() -> LoggerOptions:
    """Return logger options that leave the Dapr SDK's records to the program's own handlers; it would print them."""
    return LoggerOptions(log_handler=logging.NullHandler())
