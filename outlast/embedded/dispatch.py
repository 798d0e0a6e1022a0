"""Moves work between the file and the connected workers, and wakes whoever waits for an instance."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded import leases, state, turns, workflows
from outlast.embedded.database import Database
from outlast.embedded.liveness import Presence
from outlast.embedded.streams import Streams, WorkerStream
from outlast.embedded.waiters import Waiters
from outlast.embedded.workflows import Changes, Task, Turn

logger = logging.getLogger("outlast.embedded")

# While others share the file, take work in small bites, with a pause in which they get their part.
_BITE = 8
_BITE_PAUSE = 0.003
_TICK_SECONDS = 1.0
_REAP_SECONDS = 30.0

T = TypeVar("T")


class Dispatcher:
    """Runs every workflow transaction of one sidecar.

    A transaction that makes work also claims it for the workers connected here, so that a step costs one commit.
    What is left is for the other sidecars, which are pinged.
    """

    def __init__(self, database: Database, app: str, lock_folder: Path) -> None:
        self._database = database
        self._app = app
        self._streams = Streams()
        self.waiters = Waiters(database)
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._mutex = threading.Lock()
        self._returned: list[Turn | Task] = []
        self._unsaved: list[Callable[[], object]] = []
        self._dead: set[str] = set()
        self._new_stream = False
        self._next_timer: int | None = 0
        self._presence = Presence(lock_folder, self._on_ping, self._on_death)
        self._pump = threading.Thread(target=self._run, name="outlast-dispatch", daemon=True)

    @property
    def connected_workers(self) -> int:
        return len(self._streams)

    def start(self) -> None:
        """Meet the other sidecars, take over from those that are gone, and begin to work."""
        with self._database.read() as connection:
            owners = leases.owners(connection)
        self._presence.start()
        alive = self._presence.rescan()
        self._dead |= owners - alive
        self._pump.start()

    def stop(self) -> None:
        """Close all streams, give everything back, and leave. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        for stream in self._streams.all():
            self._streams.remove(stream)
        self.waiters.wake_all()
        self._wake.set()
        if self._pump.is_alive():
            self._pump.join(timeout=5)
        with contextlib.suppress(sqlite3.Error):
            self._database.write(lambda c: leases.give_back_all(c, self._presence.id), durable=False)
        self._presence.ping()
        self._presence.close()

    def transact(
        self, work: Callable[[sqlite3.Connection, Changes], T], *, durable: bool = True, bite: bool = False
    ) -> T:
        """Run `work` in a transaction, claim what the local workers can take in the same one, and hand it out.

        Args:
            bite: Take a bite more even if the workers here are busy and others may want the work too.

        Raises:
            Refused: `work` refused the request.
            sqlite3.Error: Nothing was written.
        """
        changes = Changes()
        claimed: list[Turn | Task] = []
        left = False

        def run(connection: sqlite3.Connection) -> T:
            nonlocal left
            result = work(connection, changes)
            if changes.work:
                claimed.extend(self._claim(connection, bite=bite))
                left = leases.has_free_work(connection, self._app)
            return result

        result = self._database.write(run, durable=durable)
        self._publish(changes, claimed, left)
        return result

    def _publish(self, changes: Changes, claimed: list[Turn | Task], left: bool) -> None:
        for item in claimed:
            self._hand_out(item)
        self.waiters.wake(changes.touched)
        if changes.timer_at is not None and self._expect_timer(changes.timer_at):
            self._wake.set()
        if left and len(self._streams):
            self._wake.set()
        if self._presence.has_peers and (changes.touched or changes.work):
            self._presence.ping()

    def _expect_timer(self, fire_at: int | None) -> bool:
        """Remember the earliest timer known; True if this one is."""
        with self._mutex:
            if fire_at is None or (self._next_timer is not None and self._next_timer <= fire_at):
                return False
            self._next_timer = fire_at
            return True

    def _claim(self, connection: sqlite3.Connection, *, bite: bool) -> list[Turn | Task]:
        free_turns, free_tasks = self._streams.room()
        if self._presence.has_peers:
            turns_held, tasks_held = self._streams.held() if not bite else (0, 0)
            free_turns = min(free_turns, max(0, _BITE - turns_held))
            free_tasks = min(free_tasks, max(0, _BITE - tasks_held))
        if (not free_turns and not free_tasks) or self._stopped.is_set():
            return []
        owner = self._presence.id
        return [
            *leases.claim_turns(connection, self._app, owner, free_turns),
            *leases.claim_tasks(connection, self._app, owner, free_tasks),
        ]

    def _hand_out(self, item: Turn | Task) -> None:
        stream = self._streams.assign(item)
        if stream is None:
            self._return([item])
            return
        try:
            if isinstance(item, Task):
                request = pb.ActivityRequest.FromString(item.request)
                stream.send(pb.WorkItem(activityRequest=request, completionToken=item.token))
            else:
                stream.send(pb.WorkItem(workflowRequest=self._turn_request(stream, item), completionToken=item.token))
        except sqlite3.Error:
            logger.exception("cannot read the history of an instance; its turn is given back")
            if isinstance(item, Turn):
                self._streams.take_turn(item.token)
            self._return([item])

    def _turn_request(self, stream: WorkerStream, turn: Turn) -> pb.WorkflowRequest:
        request = pb.WorkflowRequest(instanceId=turn.instance_id, newEvents=turn.new_events)
        if turn.incoming is not None:
            request.propagatedHistory.ParseFromString(turn.incoming)
        first = 0
        known = stream.cached.get(turn.instance_id)
        if stream.keeps_history:
            stream.cached[turn.instance_id] = (turn.iid, turn.generation, turn.events)
            if known is not None and known[:2] == (turn.iid, turn.generation) and 0 < known[2] <= turn.events:
                first = known[2]
                request.cachedHistory.eventCount = first
        if turn.events > first:
            with self._database.read() as connection:
                request.pastEvents.extend(workflows.events_of(connection, turn.iid, first))
        return request

    def open_stream(self, *, keeps_history: bool) -> WorkerStream:
        """Register a worker; close it with `close_stream`."""
        stream = WorkerStream(keeps_history=keeps_history)
        self._streams.add(stream)
        if self._stopped.is_set():
            stream.close()
        with self._mutex:
            self._new_stream = True
        self._wake.set()
        return stream

    def close_stream(self, stream: WorkerStream) -> None:
        """Forget a worker that is gone; what it held goes to others at once. Never blocks."""
        self._return(self._streams.remove(stream))

    def _return(self, items: list[Turn | Task]) -> None:
        if not items:
            return
        with self._mutex:
            self._returned.extend(items)
        self._wake.set()

    def complete_turn(self, response: pb.WorkflowResponse) -> None:
        """Apply a turn's response; one whose lease is lost is ignored.

        Raises:
            ValueError: The response cannot be applied.
            sqlite3.Error: Nothing was written yet; the answer is kept and written when that works again.
        """
        held = self._streams.take_turn(response.completionToken)
        if held is None:
            logger.info("ignoring the completion of a turn that is not held any more")
            return
        stream, turn = held
        if any(action.HasField("completeWorkflow") for action in response.actions):
            stream.cached.pop(turn.instance_id, None)
        try:
            self._save(lambda: self.transact(lambda c, changes: turns.apply_turn(c, turn, response, changes)))
        except ValueError:
            self._return([turn])
            raise

    def complete_task(self, response: pb.ActivityResponse) -> None:
        """Record an activity's result; one whose lease is lost is ignored.

        Raises:
            sqlite3.Error: Nothing was written yet; the result is kept and written when that works again.
        """
        task = self._streams.take_task(response.completionToken)
        if task is None:
            logger.info("ignoring the completion of an activity that is not held any more")
            return
        self._save(lambda: self.transact(lambda c, changes: workflows.complete_task(c, task, response, changes)))

    def _save(self, save: Callable[[], object]) -> None:
        """Save an answer; while the disk is full it is kept, for doing the work again could cost more than waiting."""
        try:
            save()
        except sqlite3.Error:
            with self._mutex:
                self._unsaved.append(save)
            raise

    def _save_the_unsaved(self) -> None:
        with self._mutex:
            unsaved, self._unsaved = self._unsaved, []
        while unsaved:
            try:
                unsaved[0]()
            except sqlite3.Error:
                with self._mutex:
                    self._unsaved = unsaved + self._unsaved
                raise
            except ValueError:
                logger.exception("an answer that was kept cannot be applied")
            unsaved.pop(0)

    def _on_ping(self) -> None:
        self.waiters.look()
        if len(self._streams):
            with self._database.read() as connection:
                work = self._could_take_more(connection)
            if work:
                self._wake.set()
        if self._presence.unmet():
            self._wake.set()

    def _on_death(self, owner: str) -> None:
        logger.info("sidecar %s is gone; taking its work over", owner)
        with self._mutex:
            self._dead.add(owner)
        self._expect_timer(0)  # its timers are ours now
        self._wake.set()

    def _run(self) -> None:
        next_reap = 0.0
        failures = 0
        while not self._stopped.is_set():
            try:
                more = self._round()
                if time.monotonic() >= next_reap:
                    next_reap = time.monotonic() + _REAP_SECONDS
                    self._reap()
            except Exception:
                if self._stopped.is_set():
                    return
                if not failures:
                    logger.exception("the dispatcher could not use the database; it goes on trying")
                more = False
                self._stopped.wait(min(2.0, 0.1 * 2**failures))
                failures = min(failures + 1, 10)
            else:
                failures = 0
            if more:
                time.sleep(_BITE_PAUSE)
                continue
            timeout = _TICK_SECONDS
            if self._next_timer is not None:
                timeout = min(timeout, max(0.0, self._next_timer / 1e9 - time.time()))
            if self._wake.wait(timeout):
                self._wake.clear()
            else:
                self._tick()

    def _tick(self) -> None:
        """The slow look that nothing depends on while everybody is healthy."""
        self._expect_timer(0)
        try:
            self._presence.rescan()
            if self._presence.has_peers:
                self.waiters.look()
        except (OSError, sqlite3.Error):
            logger.exception("could not look for other sidecars")

    def _round(self) -> bool:
        """Do what is due; True if there is more work to claim."""
        with self._mutex:
            returned, self._returned = self._returned, []
            dead, self._dead = self._dead, set()
            new_stream, self._new_stream = self._new_stream, False
            due = self._next_timer is not None and self._next_timer <= time.time_ns()
        try:
            if self._unsaved:
                self._save_the_unsaved()
            if self._presence.unmet():
                self._presence.rescan()
            if returned or dead or new_stream or due or len(self._streams):
                return self._settle(returned, dead, new_stream=new_stream)
        except BaseException:
            with self._mutex:
                self._returned.extend(returned)
                self._dead |= dead
                self._new_stream = self._new_stream or new_stream
            raise
        return False

    def _settle(self, returned: list[Turn | Task], dead: set[str], *, new_stream: bool) -> bool:
        with self._mutex:
            self._next_timer = None  # what comes meanwhile is kept by `_expect_timer`
        following: int | None = 0
        try:
            with self._database.read() as connection:
                following = _next_timer(connection)
                due = following is not None and following <= time.time_ns()
                if not (returned or dead or new_stream or due or self._could_take_more(connection)):
                    return False

            def work(connection: sqlite3.Connection, changes: Changes) -> int | None:
                leases.give_back(connection, returned)
                for owner in dead:
                    leases.give_back_all(connection, owner)
                if new_stream:
                    workflows.retry_stalled(connection, self._app)
                if due:
                    workflows.fire_timers(connection, changes)
                changes.work = True
                return _next_timer(connection)

            following = self.transact(work, durable=due, bite=True)
        finally:
            self._expect_timer(following)
        with self._database.read() as connection:
            return self._could_take_more(connection)

    def _could_take_more(self, connection: sqlite3.Connection) -> bool:
        free_turns, free_tasks = self._streams.room()
        return leases.has_free_work(connection, self._app, turns=free_turns > 0, tasks=free_tasks > 0)

    def _reap(self) -> None:
        with self._database.read() as connection:
            expired = connection.execute("SELECT 1 FROM state WHERE expires <= ? LIMIT 1", (time.time(),)).fetchone()
        if expired:
            self._database.write(state.reap, durable=False)


def _next_timer(connection: sqlite3.Connection) -> int | None:
    fire_at: int | None = connection.execute("SELECT min(fire_at) FROM timers").fetchone()[0]
    return fire_at
