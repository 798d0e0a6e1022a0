"""The life of workflow instances as rows: start, events, turns, timers, purge. Each function runs in a transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded import history
from outlast.embedded.errors import Refused
from outlast.embedded.history import FINAL, Message

NO_SUCH_INSTANCE = "no such instance exists"
NOT_COMPLETED = "orchestration has not yet completed"
# Why an instance is not run although its inbox has events.
HOLD_NONE, HOLD_START, HOLD_STALLED = 0, 1, 2
# The order in which a turn sees its inbox: the start, what a former generation carried over, then as it came.
_RANK_START, _RANK_CARRIED, _RANK_NEW = 0, 1, 2

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
    """A claimed orchestrator turn; `inbox` holds the row numbers it consumes."""

    token: str
    iid: int
    app: str
    instance_id: str
    generation: int
    events: int
    new_events: list[pb.HistoryEvent]
    inbox: list[int]


class Task(NamedTuple):
    """A claimed activity."""

    token: str
    id: int
    request: bytes


def create(connection: sqlite3.Connection, app: str, event: pb.HistoryEvent, changes: Changes) -> None:
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
        "INSERT INTO instances (app, id, name, status, hold, start, created, updated, ready)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            app,
            instance_id,
            start.name,
            pb.ORCHESTRATION_STATUS_PENDING,
            HOLD_START if held else HOLD_NONE,
            event.SerializeToString(),
            now,
            now,
            not held,
        ),
    ).lastrowid
    assert iid is not None
    _append_inbox(connection, iid, _RANK_START, event)
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


def _append_inbox(connection: sqlite3.Connection, iid: int, rank: int, event: pb.HistoryEvent) -> None:
    connection.execute("INSERT INTO inbox (iid, rank, event) VALUES (?, ?, ?)", (iid, rank, event.SerializeToString()))


def _deliver(connection: sqlite3.Connection, iid: int, event: pb.HistoryEvent, changes: Changes) -> None:
    _append_inbox(connection, iid, _RANK_NEW, event)
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
    _deliver(connection, iid, event, changes)
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
    _deliver(connection, row[0], event, changes)
    return True


def apply_turn(connection: sqlite3.Connection, turn: Turn, response: pb.WorkflowResponse, changes: Changes) -> bool:
    """Apply all an orchestrator turn asks for; False where its lease is lost, and then nothing is changed.

    Raises:
        ValueError: The response holds an action that cannot be applied.
    """
    row = connection.execute(
        "SELECT start, status, patches FROM instances WHERE iid = ? AND token = ?", (turn.iid, turn.token)
    ).fetchone()
    if row is None:
        return False
    start = pb.HistoryEvent.FromString(row[0]).executionStarted
    result = history.plan(turn.app, turn.instance_id, start, list(response.actions))
    patches: list[str] = json.loads(row[2]) if row[2] else []
    applied = list(response.version.patches)
    changes.touched.add((turn.app, turn.instance_id))
    if result.stalled:
        name = response.version.name
        _stall(connection, turn, pb.VERSION_NOT_AVAILABLE, f"Version not available: {name}")
        return True
    if applied[: len(patches)] != patches:
        text = f"Patch mismatch. History patches: [{', '.join(patches)}], current patches: [{', '.join(applied)}]. "
        _stall(connection, turn, pb.PATCH_MISMATCH, text)
        return True
    connection.executemany("DELETE FROM inbox WHERE seq = ?", [(seq,) for seq in turn.inbox])
    custom_status = response.customStatus.value if response.HasField("customStatus") else None
    if result.continued is not None:
        _continue_as_new(connection, turn, result.continued, custom_status, changes)
        return True
    new_events = turn.new_events
    if response.HasField("version"):
        new_events[0].workflowStarted.version.CopyFrom(response.version)
        del new_events[0].workflowStarted.version.patches[:]
        new_events[0].workflowStarted.version.patches.extend(applied[len(patches) :])
    _append_history(connection, turn.iid, turn.events, [*new_events, *result.events])
    status = _status_after(row[1], new_events, result)
    if result.completed is None:
        for task in result.tasks:
            _schedule(connection, turn, task)
        for timer in result.timers:
            connection.execute(
                "INSERT INTO timers (fire_at, iid, timer_id, event) VALUES (?, ?, ?, ?)",
                (timer.fire_at, turn.iid, timer.timer_id, timer.event.SerializeToString()),
            )
            changes.timer(timer.fire_at)
    else:
        _drop_pending(connection, turn.iid)
    connection.execute(
        "UPDATE instances SET status = ?, hold = 0, events = ?, completed = ?, custom_status = ?, patches = ?,"
        " started = coalesce(started, ?), updated = ?, owner = NULL, token = NULL,"
        " ready = EXISTS (SELECT 1 FROM inbox WHERE inbox.iid = instances.iid) WHERE iid = ?",
        (
            status,
            turn.events + len(new_events) + len(result.events),
            result.completed.SerializeToString() if result.completed is not None else None,
            custom_status,
            json.dumps(applied) if applied else None,
            history.nanoseconds(new_events[0].timestamp),
            time.time_ns(),
            turn.iid,
        ),
    )
    changes.work = True
    for child in result.children:
        connection.execute("INSERT OR IGNORE INTO children VALUES (?, ?, ?)", (turn.iid, child.app, child.instance_id))
    for message in result.messages:
        _send(connection, turn, message, changes)
    if result.completed is not None:
        _terminate_children(connection, turn, changes)
    return True


def _status_after(before: int, new_events: list[pb.HistoryEvent], result: history.Turn) -> int:
    if result.completed is not None:
        return int(result.completed.workflowStatus)
    suspended = history.suspended_after(before == pb.ORCHESTRATION_STATUS_SUSPENDED, new_events)
    return int(pb.ORCHESTRATION_STATUS_SUSPENDED if suspended else pb.ORCHESTRATION_STATUS_RUNNING)


def _append_history(connection: sqlite3.Connection, iid: int, first: int, events: Iterable[pb.HistoryEvent]) -> None:
    connection.executemany(
        "INSERT INTO history (iid, seq, event) VALUES (?, ?, ?)",
        [(iid, first + index, event.SerializeToString()) for index, event in enumerate(events)],
    )


def _schedule(connection: sqlite3.Connection, turn: Turn, event: pb.HistoryEvent) -> None:
    task = event.taskScheduled
    request = pb.ActivityRequest(
        name=task.name,
        version=history.optional(task, "version"),
        input=history.optional(task, "input"),
        workflowInstance=pb.WorkflowInstance(instanceId=turn.instance_id),
        taskId=event.eventId,
        taskExecutionId=task.taskExecutionId,
        parentTraceContext=history.optional(task, "parentTraceContext"),
    )
    connection.execute(
        "INSERT INTO tasks (app, iid, generation, request) VALUES (?, ?, ?, ?)",
        (event.router.targetAppID or turn.app, turn.iid, turn.generation, request.SerializeToString()),
    )


def _continue_as_new(
    connection: sqlite3.Connection,
    turn: Turn,
    events: list[pb.HistoryEvent],
    custom_status: str | None,
    changes: Changes,
) -> None:
    connection.execute("DELETE FROM history WHERE iid = ?", (turn.iid,))
    connection.execute("DELETE FROM timers WHERE iid = ?", (turn.iid,))
    connection.execute("DELETE FROM children WHERE iid = ?", (turn.iid,))
    # Results for operations of the old generation must not meet the same numbers in the new one.
    for seq, data in connection.execute("SELECT seq, event FROM inbox WHERE iid = ?", (turn.iid,)).fetchall():
        if pb.HistoryEvent.FromString(data).WhichOneof("eventType") in _RESOLUTIONS:
            connection.execute("DELETE FROM inbox WHERE seq = ?", (seq,))
    _append_inbox(connection, turn.iid, _RANK_START, events[0])
    for event in events[1:]:
        _append_inbox(connection, turn.iid, _RANK_CARRIED, event)
    now = time.time_ns()
    connection.execute(
        "UPDATE instances SET status = ?, hold = 0, generation = generation + 1, events = 0, start = ?,"
        " custom_status = ?, patches = NULL, created = ?, started = ?, updated = ?, ready = 1, owner = NULL,"
        " token = NULL WHERE iid = ?",
        (pb.ORCHESTRATION_STATUS_RUNNING, events[0].SerializeToString(), custom_status, now, now, now, turn.iid),
    )
    changes.work = True


_RESOLUTIONS = frozenset(
    {"taskCompleted", "taskFailed", "timerFired", "childWorkflowInstanceCompleted", "childWorkflowInstanceFailed"}
)


def _stall(connection: sqlite3.Connection, turn: Turn, reason: pb.StalledReason.ValueType, description: str) -> None:
    """Keep the inbox and wait for a worker that can run this instance: one is tried whenever a worker connects."""
    last = connection.execute(
        "SELECT event FROM history WHERE iid = ? ORDER BY seq DESC LIMIT 1", (turn.iid,)
    ).fetchone()
    before = pb.HistoryEvent.FromString(last[0]).executionStalled if last else pb.ExecutionStalledEvent()
    events = turn.events
    if before.description != description:
        stalled = pb.ExecutionStalledEvent(reason=reason, description=description)
        _append_history(connection, turn.iid, events, [history.new_event(executionStalled=stalled)])
        events += 1
    connection.execute(
        "UPDATE instances SET status = ?, hold = ?, events = ?, updated = ?, ready = 0, owner = NULL, token = NULL"
        " WHERE iid = ?",
        (pb.ORCHESTRATION_STATUS_STALLED, HOLD_STALLED, events, time.time_ns(), turn.iid),
    )


def retry_stalled(connection: sqlite3.Connection, app: str) -> None:
    """Let stalled instances be tried again, by a worker that has just connected."""
    connection.execute(f"UPDATE instances SET hold = 0, ready = 1 WHERE app = ? AND hold = {HOLD_STALLED}", (app,))


def _send(connection: sqlite3.Connection, turn: Turn, message: Message, changes: Changes) -> None:
    event = message.event
    if event.HasField("executionStarted"):
        try:
            create(connection, message.app, event, changes)
        except Refused as refused:
            if event.executionStarted.HasField("parentInstance"):
                task_id = event.executionStarted.parentInstance.taskScheduledId
                failed = history.child_failed(task_id, "WorkflowInstanceAlreadyExists", str(refused))
                _deliver(connection, turn.iid, failed, changes)
        return
    kind = event.WhichOneof("eventType")
    if kind in _RESOLUTIONS and not _still_waited_for(connection, turn, message):
        return
    try:
        add_event(connection, message.app, message.instance_id, event, changes)
    except Refused:
        return  # the other instance is gone; daprd drops such a message too


def _still_waited_for(connection: sqlite3.Connection, turn: Turn, message: Message) -> bool:
    """Whether the parent is still the execution that created this child, not a later one of the same id."""
    row = connection.execute(
        "SELECT start FROM instances WHERE app = ? AND id = ?", (message.app, message.instance_id)
    ).fetchone()
    mine = connection.execute("SELECT start FROM instances WHERE iid = ?", (turn.iid,)).fetchone()
    if row is None:
        return False
    parent = pb.HistoryEvent.FromString(row[0]).executionStarted.workflowInstance
    child = pb.HistoryEvent.FromString(mine[0]).executionStarted.parentInstance.workflowInstance
    return not child.executionId.value or bool(child.executionId.value == parent.executionId.value)


def _terminate_children(connection: sqlite3.Connection, turn: Turn, changes: Changes) -> None:
    end = next((e.executionTerminated for e in turn.new_events if e.HasField("executionTerminated")), None)
    if end is None or not end.recurse:
        return
    cascade = pb.ExecutionTerminatedEvent(input=history.optional(end, "input"), recurse=True)
    for app, child in connection.execute("SELECT app, id FROM children WHERE iid = ?", (turn.iid,)).fetchall():
        try:
            add_event(connection, app, child, history.new_event(executionTerminated=cascade), changes)
        except Refused:
            continue


def _drop_pending(connection: sqlite3.Connection, iid: int) -> None:
    for table in ("tasks", "timers", "inbox"):
        connection.execute(f"DELETE FROM {table} WHERE iid = ?", (iid,))


def _forget(connection: sqlite3.Connection, iid: int) -> None:
    _drop_pending(connection, iid)
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
        _deliver(connection, iid, event, changes)


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
