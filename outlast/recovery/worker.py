"""The worker of a process: takes deliveries of `advance` from the sidecar, beats, and overtakes workers that hang."""

from __future__ import annotations

import base64
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from dapr.ext.workflow import DaprWorkflowContext, WorkflowActivityContext, WorkflowRuntime
from dapr.ext.workflow.logger import LoggerOptions

from outlast.checkpointer import keys, records
from outlast.checkpointer.client import Get, Save, Steps
from outlast.checkpointer.registry import ACTIVE, WORKERS
from outlast.checkpointer.thread import Fence, ThreadLog
from outlast.errors import (
    CorruptRecordError,
    FencedError,
    OutlastError,
    RunNotFoundError,
    SidecarUnavailableError,
    StoreError,
    UnknownFormatError,
)
from outlast.recovery import runs
from outlast.recovery.attempt import Attachment, Attempt, Outcome
from outlast.recovery.runs import RunHead
from outlast.recovery.workflow import ADVANCE, RUN, Delivery, Next, run_workflow

if TYPE_CHECKING:
    from outlast.recovery.runtime import Runtime

logger = logging.getLogger("outlast.worker")

HEARTBEAT_TIMEOUT: Final = "OUTLAST_HEARTBEAT_TIMEOUT"
"""Environment variable: seconds without a heartbeat after which a worker counts as hung. Default 10."""
CONCURRENCY: Final = "OUTLAST_CONCURRENCY"
"""Environment variable: attempts a worker makes at once. Default 64."""

_QUIET: Final = 0.05
"""Seconds without anything to do after which a worker that stops may disconnect."""
_ORPHAN: Final = 60.0
"""Seconds after which a name among the active runs that has no run is taken for a submission cut short."""
_RETRY: Final = (StoreError, SidecarUnavailableError)


@dataclass
class _Peer:
    """What this worker has seen of another one: its last beat, and when that changed by this worker's clock."""

    beat: int
    seen: float


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
        self._timeout = float(os.environ.get(HEARTBEAT_TIMEOUT, "10"))
        self._lock = threading.Lock()
        self._attempts: dict[str, Attempt] = {}
        self._starting: dict[str, int] = {}
        self._unsettled: dict[str, RunHead] = {}
        self._ending: set[str] = set()
        self._last_turn = 0.0
        self._beat = 0
        self._peers: dict[str, _Peer] = {}
        self._active: dict[str, float] = {}
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
        threading.Thread(target=self._watch, name="outlast-watch", daemon=True).start()
        logger.info("worker %s takes work from the %s", self.id, address)

    def stop(self, grace: float = 5.0) -> None:
        """Drain: ask attempts to stop at their next boundary, give up on them after `grace` seconds, disconnect."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self._lock:
            attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.drain()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (self._attempts or self._starting):
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
        with self._lock:
            self._starting[run_id] = self._starting.get(run_id, 0) + 1
        try:
            step = self._advance(run_id, delivery)
            if step["then"] == "end":
                self._ending.add(delivery["instance"])
            return step
        except RunNotFoundError:
            logger.warning("run %s is not in the store any more; its workflow ends", run_id)
            return {"then": "end", "status": "unknown"}
        except FencedError as error:
            logger.warning("run %s: %s: %s", run_id, type(error).__name__, error)
            return {"then": "sleep", "seconds": 1.0}
        except (CorruptRecordError, UnknownFormatError) as error:
            return self._unreadable(run_id, error)
        finally:
            self._last_turn = time.monotonic()
            with self._lock:
                self._starting[run_id] -= 1
                if not self._starting[run_id]:
                    del self._starting[run_id]

    def _unreadable(self, run_id: str, error: OutlastError) -> Next:
        """Fail a run whose records cannot be read: trying again would not help."""
        logger.error("run %s fails: %s", run_id, error)
        failed = describe(error)
        head = self._client.run(runs.change(run_id, lambda now: _failed(now, failed)))
        self._runtime.settled(head, error)
        try:
            self._client.run(runs.release(head))
        except OutlastError as unreleased:
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
        held = self._attempts.get(run_id)
        if held is not None:
            # Delivered again because the sidecar lost the connection, not this worker: the attempt goes on.
            self._until(held.finished)
            return {"then": "again"}
        if head.running and head.running.delivery != delivery["id"] and self._alive(head):
            return {"then": "sleep", "seconds": 1.0}
        if head.cancel:
            return self._end(self._client.run(runs.change(run_id, _cancelled)))
        if head.status == "waiting" and not head.signals:
            self._runtime.settled(head)
            return {"then": "wait"}
        self._send_beat(run_id)
        taken = self._client.run(runs.take_over(head, self.id, delivery["id"]))
        if taken is None:
            self._client.run(runs.change(run_id, _queued))
            return {"then": "wait"}
        head, thread = taken
        attempt = Attempt(
            head=head,
            submitted=self._client.run(runs.read_input(head)),
            fence=Fence(thread.epoch, thread.owner),
            client=self._client,
            attachment=self._runtime.attachment(run_id),
            publish=self._runtime.publisher(head),
        )
        with self._lock:
            self._attempts[run_id] = attempt
        try:
            return self._finish(attempt, self._execute(agent.advance, attempt))
        except _RETRY:
            with self._lock:
                self._unsettled[run_id] = head
            raise
        finally:
            with self._lock:
                self._attempts.pop(run_id, None)
            attempt.finished.set()

    def _until(self, event: threading.Event) -> None:
        """Wait for `event`.

        Raises:
            SidecarUnavailableError: If the worker is stopped meanwhile.
        """
        while not event.wait(0.5):
            if self._abandon.is_set():
                raise SidecarUnavailableError("the worker was stopped in the middle of an attempt")

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
        self._until(done)
        if failure:
            error = failure[0]
            if isinstance(error, (FencedError, *_RETRY)):
                raise error
            logger.error("run %s: attempt failed outside the agent", attempt.run_id, exc_info=error)
            return Outcome("failed", error=describe(error), exception=error)
        return outcome[0]

    def _finish(self, attempt: Attempt, outcome: Outcome) -> Next:
        limit = self._client.capabilities.quirks.max_value
        status: runs.Status = "accepted" if outcome.status == "yielded" else outcome.status
        head = self._client.run(runs.settle(attempt.head, status, limit, result=outcome.result, error=outcome.error))
        if outcome.status == "failed":
            logger.warning("run %s failed: %s", head.run_id, ": ".join(outcome.error or ()))
        if outcome.status == "yielded" or (outcome.status == "waiting" and (head.signals or head.cancel)):
            return {"then": "again"}
        self._runtime.settled(head, outcome.exception)
        return self._end(head) if head.ended else {"then": "wait"}

    def _end(self, head: RunHead) -> Next:
        self._runtime.settled(head)
        successor = self._client.run(runs.release(head))
        if successor:
            self._runtime.wake(successor)
        return {"then": "end", "status": head.status}

    # --- heartbeats

    def _send_beat(self, starting: str | None = None) -> None:
        """Tell the others that this worker lives and which runs it holds; before an attempt, never after."""
        with self._lock:
            self._beat += 1
            held = sorted({*self._starting, *self._attempts, *([starting] if starting else [])})
            body = {"beat": self._beat, "runs": held, "agents": sorted(self._runtime.agents), "at": time.time()}
        self._client.run(WORKERS.put(self.id, 1))
        self._client.run(_save_beat(self.id, body))

    def _alive(self, head: RunHead) -> bool:
        """Whether the worker of a run's attempt in progress is known to live and to work on it."""
        running = head.running
        assert running is not None
        if running.worker == self.id:
            held = self._attempts.get(head.run_id)
            return held is not None and held.fence.epoch == running.epoch
        return not self._stale(running.worker, self._client.run(_read_beats([running.worker])).get(running.worker))

    def _stale(self, worker: str, beat: dict[str, Any] | None) -> bool:
        now = time.monotonic()
        count = beat["beat"] if beat else -1
        peer = self._peers.get(worker)
        if peer is None or peer.beat != count:
            self._peers[worker] = _Peer(count, now)
            return False
        return now - peer.seen > self._timeout

    def _watch(self) -> None:
        """Beat, look after the other workers, and look for runs that nobody has scheduled."""
        interval = self._timeout / 4
        self._guarded(self._announce)
        while not self._stopping.wait(interval):
            self._guarded(self._round)

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except OutlastError as error:
            logger.warning("worker %s: %s", self.id, error)
        except Exception:
            logger.exception("worker %s: unexpected error; it goes on", self.id)

    def _round(self) -> None:
        with self._lock:
            holding = bool(self._attempts or self._starting)
        if holding:
            self._send_beat()
        self._check_cancelled()
        self._settle_failed()
        self._overtake_stale()
        self._finish_for_dead(self._timeout)

    def _announce(self) -> None:
        """On start: wake the runs that waited for an agent this worker has, and schedule those nobody did."""
        self._send_beat()
        self._finish_for_dead(0.0)

    def _check_cancelled(self) -> None:
        with self._lock:
            held = dict(self._attempts)
        for head in self._client.run(runs.read_many(list(held))) if held else []:
            if head.cancel:
                held[head.run_id].drain()

    def _settle_failed(self) -> None:
        """Give back runs whose attempt was lost to a failing store, once the store answers again."""
        with self._lock:
            unsettled = dict(self._unsettled)
        for run_id, head in unsettled.items():

            def give_back(now: RunHead, lost: RunHead = head) -> RunHead | None:
                return replace(now, status="accepted", running=None) if now.running == lost.running else None

            self._client.run(runs.change(run_id, give_back))
            with self._lock:
                self._unsettled.pop(run_id, None)
            self._runtime.wake(run_id)

    def _overtake_stale(self) -> None:
        others = [name for name in self._client.run(WORKERS.items()) if name != self.id]
        beats = self._client.run(_read_beats(others))
        for name in others:
            beat = beats.get(name)
            if not self._stale(name, beat):
                continue
            for run_id in beat["runs"] if beat else []:
                self._overtake(run_id, name)
            self._client.run(WORKERS.discard(name))
        for name in [name for name in self._peers if name not in others]:
            if time.monotonic() - self._peers[name].seen > 10 * self._timeout:
                del self._peers[name]

    def _overtake(self, run_id: str, worker: str) -> None:
        try:
            head = self._client.run(runs.read(run_id))
        except RunNotFoundError:
            return
        if head.ended or not head.running or head.running.worker != worker:
            return
        changed = self._client.run(runs.overtake(head))
        if changed:
            logger.warning("run %s: worker %s hangs; overtaken by workflow %s", run_id, worker, changed.instance)
            self._runtime.schedule(changed)

    def _finish_for_dead(self, age: float) -> None:
        """Do what a process that died left undone: start the workflows of accepted runs, wake those that may go on."""
        active = self._client.run(ACTIVE.items())
        now = time.monotonic()
        self._active = {name: self._active.get(name, now) for name in active}
        due = [name for name, seen in self._active.items() if now - seen >= age]
        if not due:
            return
        heads = {head.run_id: head for head in self._client.run(runs.read_many(due))}
        for name in due:
            head = heads.get(name)
            if head is None:
                if now - self._active[name] > _ORPHAN:
                    self._client.run(ACTIVE.discard(name))
                continue
            self._active[name] = now
            mine = head.agent in self._runtime.agents
            if head.ended or (head.status == "accepted" and mine):
                self._runtime.schedule(head)
            # Somebody died between what should end a wait and the wake-up; or this worker is new and has the agent.
            missed = head.status == "waiting" and (head.signals or head.cancel)
            if missed or self._has_turn(head) or (not age and mine and head.status in ("accepted", "running")):
                self._runtime.wake(head.run_id)

    def _has_turn(self, head: RunHead) -> bool:
        """Whether a queued run's thread is free for it by now."""
        if head.status != "queued":
            return False
        thread = self._client.run(ThreadLog(head.thread_id).read())
        return head.cancel or thread is None or thread.active in ("", head.run_id)


def _cancelled(now: RunHead) -> RunHead | None:
    return None if now.ended else replace(now, status="cancelled", running=None)


def _failed(now: RunHead, error: tuple[str, str]) -> RunHead | None:
    return None if now.ended else replace(now, status="failed", running=None, error=error)


def _queued(now: RunHead) -> RunHead | None:
    return replace(now, status="queued") if now.status == "accepted" else None


def describe(error: BaseException) -> tuple[str, str]:
    """Return the qualified type name and the message of an exception."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return name, str(error)


def _beat_key(worker: str) -> str:
    return f"w-{keys.digest(worker)}"


def _save_beat(worker: str, body: dict[str, Any]) -> Steps[None]:
    # Not a swap: nobody else writes this record.
    yield Save([(_beat_key(worker), records.encode(records.WORKER, body))])


def _read_beats(workers: list[str]) -> Steps[dict[str, dict[str, Any]]]:
    if not workers:
        return {}
    found = yield Get([_beat_key(worker) for worker in workers])
    beats: dict[str, dict[str, Any]] = {}
    for worker in workers:
        item = found[_beat_key(worker)]
        if item.data:
            beats[worker] = records.decode(_beat_key(worker), records.WORKER, item.data)
    return beats


def sdk_logging() -> LoggerOptions:
    """Return logger options that leave the Dapr SDK's records to the program's own handlers; it would print them."""
    return LoggerOptions(log_handler=logging.NullHandler())
