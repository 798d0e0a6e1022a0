"""What a worker does beside its attempts: beat, overtake workers that hang, finish what dead processes left undone."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from outlast.checkpointer import keys, records
from outlast.checkpointer.client import Get, Save, Steps
from outlast.checkpointer.registry import ACTIVE, WORKERS
from outlast.checkpointer.thread import ThreadLog
from outlast.errors import OutlastError, RunNotFoundError
from outlast.recovery import runs, turns
from outlast.recovery.attempt import Attempt
from outlast.recovery.ending import deadline
from outlast.recovery.runs import RunHead

if TYPE_CHECKING:
    from outlast.recovery.runtime import Runtime

logger = logging.getLogger("outlast.worker")

HEARTBEAT_TIMEOUT: Final = "OUTLAST_HEARTBEAT_TIMEOUT"
"""Environment variable: seconds without a heartbeat after which a worker counts as hung. Default 10."""
_ORPHAN: Final = 60.0
"""Seconds after which a name among the active runs that has no run is taken for a submission cut short."""


@dataclass
class Holdings:
    """The runs that a worker has in its hands."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _attempts: dict[str, Attempt] = field(default_factory=dict)
    _delivered: dict[str, int] = field(default_factory=dict)
    _lost: dict[str, RunHead] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._attempts or self._delivered)

    def delivered(self, run_id: str) -> None:
        """A delivery of `advance` has come."""
        with self._lock:
            self._delivered[run_id] = self._delivered.get(run_id, 0) + 1

    def answered(self, run_id: str) -> None:
        """A delivery is answered."""
        with self._lock:
            self._delivered[run_id] -= 1
            if not self._delivered[run_id]:
                del self._delivered[run_id]

    def begun(self, attempt: Attempt) -> None:
        """An attempt begins."""
        with self._lock:
            self._attempts[attempt.run_id] = attempt

    def over(self, attempt: Attempt) -> None:
        """An attempt is over, and what came of it written down."""
        with self._lock:
            if self._attempts.get(attempt.run_id) is attempt:
                del self._attempts[attempt.run_id]
        attempt.finished.set()

    def lost(self, head: RunHead) -> None:
        """An attempt broke off because the store failed; its run is still marked as running here."""
        with self._lock:
            self._lost[head.run_id] = head

    def attempt(self, run_id: str) -> Attempt | None:
        """Return the attempt in progress on a run."""
        return self._attempts.get(run_id)

    def in_progress(self) -> list[Attempt]:
        """Return the attempts in progress."""
        with self._lock:
            return list(self._attempts.values())

    def runs(self) -> list[str]:
        """Return the ids of all runs in hand."""
        with self._lock:
            return sorted({*self._delivered, *self._attempts})

    def all_lost(self) -> list[RunHead]:
        """Return the runs whose attempts broke off."""
        with self._lock:
            return list(self._lost.values())

    def given_back(self, head: RunHead) -> None:
        """A run whose attempt broke off is not marked as running here any more."""
        with self._lock:
            self._lost.pop(head.run_id, None)


@dataclass
class _Seen:
    """Something that ought to change, and since when, by this process's clock, it has not."""

    value: Any
    since: float


class Watch:
    """Looks after a worker's own runs and those of others.

    Args:
        runtime: The store and the agents of this process.
        worker: Id of the worker.
        held: What it has in its hands.
    """

    def __init__(self, runtime: Runtime, worker: str, held: Holdings) -> None:
        self._runtime = runtime
        self._client = runtime.client
        self._worker = worker
        self._held = held
        self._stopping = threading.Event()
        self._timeout = float(os.environ.get(HEARTBEAT_TIMEOUT, "10"))
        self._lock = threading.Lock()
        self._beats = 0
        self._peers: dict[str, _Seen] = {}
        self._overtaken: dict[str, _Seen] = {}
        self._active: dict[str, float] = {}
        self._pinged: dict[asyncio.AbstractEventLoop, float] = {}

    def run(self, stopping: threading.Event) -> None:
        """Work until `stopping` is set."""
        self._stopping = stopping
        self._guarded(self._announce)
        while not stopping.wait(self._timeout / 4):
            self._guarded(self._round)

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except Exception as error:
            if self._stopping.is_set():
                # The connection may be closed already; what is left is done by the next worker.
                logger.debug("worker %s stops: %s", self._worker, error)
            elif isinstance(error, OutlastError):
                logger.warning("worker %s: %s", self._worker, error)
            else:
                logger.exception("worker %s: unexpected error; it goes on", self._worker)

    def _announce(self) -> None:
        """On start: wake the runs that waited for an agent this worker has, and schedule those nobody did."""
        self.beat()
        self._finish_for_dead(0.0)

    def _round(self) -> None:
        if self._held:
            self.beat()
        self._drain_ending()
        self._abandon_hanging()
        self._give_back_lost()
        self._overtake_stale()
        self._finish_for_dead(self._timeout)

    # --- heartbeats

    def beat(self) -> None:
        """Tell the others that this worker lives and which runs it holds; before an attempt, never after."""
        with self._lock:
            self._beats += 1
            body = {"beat": self._beats, "runs": self._held.runs(), "agents": sorted(self._runtime.agents)}
        self._client.run(WORKERS.put(self._worker, 1))
        self._client.run(_save_beat(self._worker, {**body, "at": time.time()}))

    def alive(self, head: RunHead) -> bool:
        """Whether the worker of a run's attempt in progress is known to live and to work on it."""
        running = head.running
        assert running is not None
        if running.worker == self._worker:
            held = self._held.attempt(head.run_id)
            return held is not None and held.fence.epoch == running.epoch
        return not self._stale(running.worker, self._client.run(_read_beats([running.worker])).get(running.worker))

    def _stale(self, worker: str, beat: dict[str, Any] | None) -> bool:
        return self._unchanged(self._peers, worker, beat["beat"] if beat else -1)

    def _unchanged(self, seen: dict[str, _Seen], name: str, value: Any) -> bool:
        """Whether `value` has been what it is for longer than the timeout."""
        now = time.monotonic()
        with self._lock:
            last = seen.get(name)
            if last is None or last.value != value:
                seen[name] = _Seen(value, now)
                return False
            return now - last.since > self._timeout

    def _overtake_stale(self) -> None:
        others = [name for name in self._client.run(WORKERS.items()) if name != self._worker]
        beats = self._client.run(_read_beats(others))
        for name in others:
            beat = beats.get(name)
            if not self._stale(name, beat):
                continue
            stuck = [run_id for run_id in (beat["runs"] if beat else []) if self._overtake(run_id, name)]
            if not stuck:
                self._client.run(WORKERS.discard(name))
        gone = [name for name in self._peers if name not in others]
        for name in gone:
            if time.monotonic() - self._peers[name].since > 10 * self._timeout:
                del self._peers[name]

    def _overtake(self, run_id: str, worker: str) -> bool:
        """Overtake a run of a worker that hangs. Returns whether the run still is that worker's."""
        try:
            head = self._client.run(runs.read(run_id))
        except RunNotFoundError:
            return False
        if head.ended or not head.running or head.running.worker != worker:
            self._overtaken.pop(run_id, None)
            return False
        if run_id in self._overtaken and not self._unchanged(self._overtaken, run_id, head.instance):
            return True  # overtaken already: the new workflow has time to begin, unless it too went to the worker
        changed = self._client.run(turns.overtake(head))
        if changed:
            self._unchanged(self._overtaken, run_id, changed.instance)
            logger.warning("run %s: worker %s hangs; overtaken by workflow %s", run_id, worker, changed.instance)
            self._runtime.schedule(changed)
        return True

    # --- what others left undone

    def _drain_ending(self) -> None:
        """Let attempts end at their next boundary whose runs are cancelled, or have taken too long."""
        held = {attempt.run_id: attempt for attempt in self._held.in_progress()}
        for head in self._client.run(runs.read_many(list(held))) if held else []:
            if head.cancel or time.time() > deadline(head, held[head.run_id].policies):
                held[head.run_id].drain()

    def _abandon_hanging(self) -> None:
        """Give up attempts that hang: their event loop does not turn, or a timeout in it could not be served."""
        for attempt in self._held.in_progress():
            if attempt.overdue(self._timeout / 4) or self._blocked(attempt):
                logger.warning("run %s hangs in worker %s; it is taken over", attempt.run_id, self._worker)
                attempt.abandon()

    def _blocked(self, attempt: Attempt) -> bool:
        loop = attempt.loop
        if loop is None or loop.is_closed():
            return False
        since = self._pinged.get(loop)
        if since is None:
            self._pinged[loop] = time.monotonic()
            loop.call_soon_threadsafe(self._pinged.pop, loop, None)
            return False
        return time.monotonic() - since > self._timeout

    def _give_back_lost(self) -> None:
        """Give back runs whose attempt was lost to a failing store, once the store answers again."""
        for lost in self._held.all_lost():

            def give_back(now: RunHead, lost: RunHead = lost) -> RunHead | None:
                return replace(now, status="accepted", running=None) if now.running == lost.running else None

            self._client.run(runs.change(lost.run_id, give_back))
            self._held.given_back(lost)
            self._runtime.wake(lost.run_id)

    def _finish_for_dead(self, age: float) -> None:
        """Do what a process that died left undone: start the workflows of accepted runs, wake those that may go on."""
        active = self._client.run(ACTIVE.items())
        now = time.monotonic()
        self._active = {name: self._active.get(name, now) for name in active}
        due = [name for name, seen in self._active.items() if now - seen >= age]
        heads = {head.run_id: head for head in self._client.run(runs.read_many(due))} if due else {}
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
            missed = head.status == "waiting" and (not head.idle or head.cancel)
            if missed or self._has_turn(head) or (not age and mine and head.status in ("accepted", "running")):
                self._runtime.wake(head.run_id)

    def _has_turn(self, head: RunHead) -> bool:
        """Whether a queued run's thread is free for it by now."""
        if head.status != "queued":
            return False
        thread = self._client.run(ThreadLog(head.thread_id).read())
        return head.cancel or thread is None or thread.active in ("", head.run_id)


def _beat_key(worker: str) -> str:
    return f"w-{keys.digest(worker)}"


def _save_beat(worker: str, body: dict[str, Any]) -> Steps[None]:
    # Not a swap: nobody else writes this record.
    yield Save([(_beat_key(worker), records.encode(records.WORKER, body))])


def _read_beats(workers: list[str]) -> Steps[dict[str, dict[str, Any]]]:
    if not workers:
        return {}
    found = yield Get([_beat_key(worker) for worker in workers])
    return {
        worker: records.decode(_beat_key(worker), records.WORKER, found[_beat_key(worker)].data)
        for worker in workers
        if found[_beat_key(worker)].data
    }
