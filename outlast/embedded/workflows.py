"""The life of workflow instances as rows: start, events, turns, timers, purge. Each function runs in a transaction."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded import history
from outlast.embedded.errors import Refused
from outlast.embedded.history import FINAL

NO_SUCH_INSTANCE = "no such instance exists"
NOT_COMPLETED = "orchestration has not yet completed"
# Why an instance is not run although its inbox has events.
HOLD_NONE, HOLD_START, HOLD_STALLED = 0, 1, 2
# The order in which a turn sees its inbox: the start, what a former generation carried over, then as it came.
RANK_START, RANK_CARRIED, RANK_NEW = 0, 1, 2

_FINAL_SQL = "(" + ",".join(str(int(status)) for status in sorted(FINAL)) + ")"


@dataclass
class Changes:
    """What a transaction did that others wait for."""

    touched: set[tuple[str, str]] = field(default_factory=set)
    work: bool = False
    timer_at: int | None = None

    def timer(self, fire_at: int) -> None:
        self.timer_at = fire_at if self.timer_at is None else min(self.timer_at, fire_at)


class Turn(NamedTuple):
    """A claimed orchestrator turn; `inbox` holds the row numbers it consumes, `incoming` the history shown to it."""

    token: str
    iid: int
    app: str
    instance_id: str
    generation: int
    events: int
    new_events: list[pb.HistoryEvent]
    inbox: list[int]
    incoming: bytes | None


class Task(NamedTuple):
    """A claimed activity."""

    token: str
    id: int
    request: bytes


def create(
    connection: sqlite3.Connection,
    app: str,
    event: pb.HistoryEvent,
    changes: Changes,
    incoming: pb.PropagatedHistory | None = None,
) -> None:
    """Create the instance that an ExecutionStarted event names, in place of a completed one of that id.

    Raises:
        Refused: ALREADY_EXISTS, an instance of that id is active, or children of the completed one are.
    """
    start = event.executionStarted
    instance_id = start.workflowInstance.instanceId
    row = connection.execute(
        "SELECT iid, status, start FROM instances WHERE app = ? AND id = ?", (app, instance_id)
    ).fetchone()
    if row is not None:
        iid, status, old = row
        if status not in FINAL:
            if _same_parent(old, start):
                return
            raise Refused("ALREADY_EXISTS", f"an active workflow with ID '{instance_id}' already exists")
        _require_final_children(connection, iid, instance_id)
        _forget(connection, iid)
    now = time.time_ns()
    start_at = history.nanoseconds(start.scheduledStartTimestamp) if start.HasField("scheduledStartTimestamp") else 0
    held = start_at > now
    iid = connection.execute(
        "INSERT INTO instances (app, id, name, status, hold, start, incoming, created, updated, ready)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            app,
            instance_id,
            start.name,
            pb.ORCHESTRATION_STATUS_PENDING,
            HOLD_START if held else HOLD_NONE,
            event.SerializeToString(),
            incoming.SerializeToString() if incoming is not None else None,
            now,
            now,
            not held,
        ),
    ).lastrowid
    assert iid is not None
    append_inbox(connection, iid, RANK_START, event)
    if held:
        connection.execute("INSERT INTO timers (fire_at, iid, timer_id) VALUES (?, ?, -1)", (start_at, iid))
        changes.timer(start_at)
    changes.touched.add((app, instance_id))
    changes.work = True


def _same_parent(old: bytes, start: pb.ExecutionStartedEvent) -> bool:
    if not start.HasField("parentInstance"):
        return False
    before = pb.HistoryEvent.FromString(old).executionStarted
    return (
        before.HasField("parentInstance")
        and before.parentInstance.taskScheduledId == start.parentInstance.taskScheduledId
        and before.parentInstance.workflowInstance.instanceId == start.parentInstance.workflowInstance.instanceId
    )


def _require_final_children(connection: sqlite3.Connection, iid: int, instance_id: str) -> None:
    active = connection.execute(
        "WITH RECURSIVE tree (iid, id, status) AS ("
        " SELECT i.iid, i.id, i.status FROM children c JOIN instances i ON i.app = c.app AND i.id = c.id"
        " WHERE c.iid = ?"
        " UNION SELECT i.iid, i.id, i.status FROM tree JOIN children c ON c.iid = tree.iid"
        " JOIN instances i ON i.app = c.app AND i.id = c.id)"
        f" SELECT id FROM tree WHERE status NOT IN {_FINAL_SQL} LIMIT 1",
        (iid,),
    ).fetchone()
    if active is not None:
        raise Refused(
            "ALREADY_EXISTS",
            f"cannot recreate workflow with ID '{instance_id}': child workflow '{active[0]}': {NOT_COMPLETED}",
        )


def append_inbox(connection: sqlite3.Connection, iid: int, rank: int, event: pb.HistoryEvent) -> None:
    connection.execute("INSERT INTO inbox (iid, rank, event) VALUES (?, ?, ?)", (iid, rank, event.SerializeToString()))


def deliver(connection: sqlite3.Connection, iid: int, event: pb.HistoryEvent, changes: Changes) -> None:
    append_inbox(connection, iid, RANK_NEW, event)
    connection.execute(f"UPDATE instances SET ready = 1 WHERE iid = ? AND hold = {HOLD_NONE}", (iid,))
    changes.work = True


def add_event(
    connection: sqlite3.Connection, app: str, instance_id: str, event: pb.HistoryEvent, changes: Changes
) -> None:
    """Put an event into an instance's inbox; a completed instance ignores it.

    Raises:
        Refused: There is no such instance, or it is stalled and the event is an external one.
    """
    row = connection.execute(
        "SELECT iid, status, hold FROM instances WHERE app = ? AND id = ?", (app, instance_id)
    ).fetchone()
    if row is None:
        raise Refused("UNKNOWN", NO_SUCH_INSTANCE)
    iid, status, hold = row
    if status in FINAL:
        return
    if hold == HOLD_STALLED and event.HasField("eventRaised"):
        raise Refused("UNKNOWN", "workflow is stalled")
    deliver(connection, iid, event, changes)
    changes.touched.add((app, instance_id))


def complete_task(connection: sqlite3.Connection, task: Task, response: pb.ActivityResponse, changes: Changes) -> bool:
    """Record an activity's result; False where its lease is lost or nobody waits for it any more."""
    row = connection.execute(
        "DELETE FROM tasks WHERE id = ? AND token = ? RETURNING iid, generation", (task.id, task.token)
    ).fetchone()
    if row is None:
        return False
    current = connection.execute("SELECT generation, status FROM instances WHERE iid = ?", (row[0],)).fetchone()
    if current is None or current[0] != row[1] or current[1] in FINAL:
        return False
    request = pb.ActivityRequest.FromString(task.request)
    if response.HasField("failureDetails"):
        failed = pb.TaskFailedEvent(
            taskScheduledId=request.taskId,
            taskExecutionId=request.taskExecutionId,
            failureDetails=response.failureDetails,
        )
        event = history.new_event(taskFailed=failed)
    else:
        completed = pb.TaskCompletedEvent(
            taskScheduledId=request.taskId,
            taskExecutionId=request.taskExecutionId,
            result=history.optional(response, "result"),
        )
        event = history.new_event(taskCompleted=completed)
    deliver(connection, row[0], event, changes)
    return True


def retry_stalled(connection: sqlite3.Connection, app: str) -> None:
    """Let stalled instances be tried again, by a worker that has just connected."""
    connection.execute(f"UPDATE instances SET hold = 0, ready = 1 WHERE app = ? AND hold = {HOLD_STALLED}", (app,))


def drop_pending(connection: sqlite3.Connection, iid: int) -> None:
    for table in ("tasks", "timers", "inbox"):
        connection.execute(f"DELETE FROM {table} WHERE iid = ?", (iid,))


def _forget(connection: sqlite3.Connection, iid: int) -> None:
    drop_pending(connection, iid)
    for table in ("history", "children", "instances"):
        connection.execute(f"DELETE FROM {table} WHERE iid = ?", (iid,))


def fire_timers(connection: sqlite3.Connection, changes: Changes, limit: int = 500) -> None:
    """Deliver the timers that are due, and start the instances whose scheduled time has come."""
    due = connection.execute(
        "SELECT id, iid, event FROM timers WHERE fire_at <= ? ORDER BY fire_at LIMIT ?", (time.time_ns(), limit)
    ).fetchall()
    for timer, iid, data in due:
        connection.execute("DELETE FROM timers WHERE id = ?", (timer,))
        if data is None:
            connection.execute("UPDATE instances SET hold = 0, ready = 1 WHERE iid = ?", (iid,))
            changes.work = True
            continue
        event = pb.HistoryEvent.FromString(data)
        event.timestamp.CopyFrom(history.stamp(time.time_ns()))
        deliver(connection, iid, event, changes)


def purge(
    connection: sqlite3.Connection, app: str, instance_id: str, *, recursive: bool, force: bool, changes: Changes
) -> int:
    """Delete a completed instance, with its children if `recursive`; returns how many were deleted.

    Raises:
        Refused: There is no such instance, or it or a child is not completed and `force` is not set.
    """
    row = connection.execute(
        "SELECT iid, status FROM instances WHERE app = ? AND id = ?", (app, instance_id)
    ).fetchone()
    if row is None:
        raise Refused("UNKNOWN", NO_SUCH_INSTANCE)
    iid, status = row
    if status not in FINAL and not force:
        stalled = status == pb.ORCHESTRATION_STATUS_STALLED
        raise Refused("UNKNOWN", "workflow is stalled" if stalled else NOT_COMPLETED)
    count = 0
    if recursive:
        for child_app, child in connection.execute("SELECT app, id FROM children WHERE iid = ?", (iid,)).fetchall():
            try:
                count += purge(connection, child_app, child, recursive=True, force=force, changes=changes)
            except Refused as refused:
                if str(refused) != NO_SUCH_INSTANCE:
                    raise
    _forget(connection, iid)
    changes.touched.add((app, instance_id))
    return count + 1


def state_of(connection: sqlite3.Connection, app: str, instance_id: str, *, payloads: bool) -> pb.WorkflowState | None:
    """What the API tells about an instance, or None."""
    row = connection.execute(
        "SELECT name, status, start, completed, custom_status, created, started, updated FROM instances"
        " WHERE app = ? AND id = ?",
        (app, instance_id),
    ).fetchone()
    if row is None:
        return None
    name, status, start_data, completed_data, custom_status, created, started_at, updated = row
    state = pb.WorkflowState(
        instanceId=instance_id,
        name=name,
        workflowStatus=status,
        createdTimestamp=history.stamp(created),
        lastUpdatedTimestamp=history.stamp(updated),
    )
    if started_at is not None:
        state.startedAt.CopyFrom(history.stamp(started_at))
    start = pb.HistoryEvent.FromString(start_data).executionStarted
    if start.HasField("parentInstance"):
        state.parentInstanceId.value = start.parentInstance.workflowInstance.instanceId
        state.parentAppId.value = start.parentInstance.appID
    if payloads:
        if start.HasField("input"):
            state.input.CopyFrom(start.input)
        if custom_status is not None:
            state.customStatus.value = custom_status
        if completed_data is not None:
            completed = pb.ExecutionCompletedEvent.FromString(completed_data)
            if completed.HasField("result"):
                state.output.CopyFrom(completed.result)
            if completed.HasField("failureDetails"):
                state.failureDetails.CopyFrom(completed.failureDetails)
    return state


def events_of(connection: sqlite3.Connection, iid: int, first: int = 0) -> list[pb.HistoryEvent]:
    """The committed history of an execution from its event number `first` on."""
    rows = connection.execute("SELECT event FROM history WHERE iid = ? AND seq >= ? ORDER BY seq", (iid, first))
    return [pb.HistoryEvent.FromString(data) for (data,) in rows]


def list_ids(connection: sqlite3.Connection, app: str, after: int, limit: int) -> tuple[list[str], int | None]:
    """A page of instance ids and where the next one starts, None at the end."""
    rows = connection.execute(
        "SELECT iid, id FROM instances WHERE app = ? AND iid > ? ORDER BY iid LIMIT ?", (app, after, limit)
    ).fetchall()
    return [row[1] for row in rows], (rows[-1][0] if len(rows) == limit else None)
