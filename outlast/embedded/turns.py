"""Applying what an orchestrator answered: one turn is one transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded import history, propagation, workflows
from outlast.embedded.errors import Refused
from outlast.embedded.history import Message
from outlast.embedded.workflows import Changes, Turn


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
            shown = propagation.assemble(connection, turn, task.scope, start.name, result.events[: task.produced])
            _schedule(connection, turn, task.event, shown)
        _drop_moot_timers(connection, turn)
        for timer in result.timers:
            connection.execute(
                "INSERT INTO timers (fire_at, iid, timer_id, event, waits_for) VALUES (?, ?, ?, ?, ?)",
                (timer.fire_at, turn.iid, timer.timer_id, timer.event.SerializeToString(), timer.waits_for),
            )
            changes.timer(timer.fire_at)
    else:
        workflows.drop_pending(connection, turn.iid)
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
        shown = propagation.assemble(connection, turn, message.scope, start.name, result.events[: message.produced])
        _send(connection, turn, message, changes, shown)
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


def _drop_moot_timers(connection: sqlite3.Connection, turn: Turn) -> None:
    """Each external event of this turn ends the oldest wait for it, and so the timer that guards that wait."""
    for event in turn.new_events:
        if event.HasField("eventRaised"):
            connection.execute(
                "DELETE FROM timers WHERE id = (SELECT min(id) FROM timers WHERE iid = ? AND waits_for = ?)",
                (turn.iid, event.eventRaised.name.upper()),
            )


def _schedule(
    connection: sqlite3.Connection, turn: Turn, event: pb.HistoryEvent, shown: pb.PropagatedHistory | None
) -> None:
    task = event.taskScheduled
    request = pb.ActivityRequest(
        name=task.name,
        version=history.optional(task, "version"),
        input=history.optional(task, "input"),
        workflowInstance=pb.WorkflowInstance(instanceId=turn.instance_id),
        taskId=event.eventId,
        taskExecutionId=task.taskExecutionId,
        parentTraceContext=history.optional(task, "parentTraceContext"),
        propagatedHistory=shown,
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
    incoming = propagation.forward(connection, turn, events[0].executionStarted.name)
    connection.execute("DELETE FROM history WHERE iid = ?", (turn.iid,))
    connection.execute("DELETE FROM timers WHERE iid = ?", (turn.iid,))
    connection.execute("DELETE FROM children WHERE iid = ?", (turn.iid,))
    # Results for operations of the old generation must not meet the same numbers in the new one.
    for seq, data in connection.execute("SELECT seq, event FROM inbox WHERE iid = ?", (turn.iid,)).fetchall():
        if pb.HistoryEvent.FromString(data).WhichOneof("eventType") in _RESOLUTIONS:
            connection.execute("DELETE FROM inbox WHERE seq = ?", (seq,))
    workflows.append_inbox(connection, turn.iid, workflows.RANK_START, events[0])
    for event in events[1:]:
        workflows.append_inbox(connection, turn.iid, workflows.RANK_CARRIED, event)
    now = time.time_ns()
    connection.execute(
        "UPDATE instances SET status = ?, hold = 0, generation = generation + 1, events = 0, start = ?,"
        " incoming = ?,"
        " custom_status = ?, patches = NULL, created = ?, started = ?, updated = ?, ready = 1, owner = NULL,"
        " token = NULL WHERE iid = ?",
        (
            pb.ORCHESTRATION_STATUS_RUNNING,
            events[0].SerializeToString(),
            incoming,
            custom_status,
            now,
            now,
            now,
            turn.iid,
        ),
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
        (pb.ORCHESTRATION_STATUS_STALLED, workflows.HOLD_STALLED, events, time.time_ns(), turn.iid),
    )


def _send(
    connection: sqlite3.Connection, turn: Turn, message: Message, changes: Changes, shown: pb.PropagatedHistory | None
) -> None:
    event = message.event
    if event.HasField("executionStarted"):
        try:
            workflows.create(connection, message.app, event, changes, shown)
        except Refused as refused:
            if event.executionStarted.HasField("parentInstance"):
                task_id = event.executionStarted.parentInstance.taskScheduledId
                failed = history.child_failed(task_id, "WorkflowInstanceAlreadyExists", str(refused))
                workflows.deliver(connection, turn.iid, failed, changes)
        return
    kind = event.WhichOneof("eventType")
    if kind in _RESOLUTIONS and not _still_waited_for(connection, turn, message):
        return
    try:
        workflows.add_event(connection, message.app, message.instance_id, event, changes)
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
            workflows.add_event(connection, app, child, history.new_event(executionTerminated=cascade), changes)
        except Refused:
            continue
