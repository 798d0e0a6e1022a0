"""Who holds which work item: claiming, giving back, and taking over from the dead. Runs in transactions."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded import history
from outlast.embedded.workflows import Task, Turn


def claim_turns(connection: sqlite3.Connection, app: str, owner: str, limit: int) -> list[Turn]:
    """Take up to `limit` orchestrator turns that nobody holds."""
    turns = []
    rows = connection.execute(
        "SELECT iid, id, generation, events, incoming FROM instances"
        " WHERE app = ? AND ready = 1 AND owner IS NULL ORDER BY iid LIMIT ?",
        (app, limit),
    ).fetchall()
    for iid, instance_id, generation, events, incoming in rows:
        inbox = connection.execute("SELECT seq, event FROM inbox WHERE iid = ? ORDER BY rank, seq", (iid,)).fetchall()
        if not inbox:
            connection.execute("UPDATE instances SET ready = 0 WHERE iid = ?", (iid,))
            continue
        token = secrets.token_hex(16)
        connection.execute("UPDATE instances SET owner = ?, token = ? WHERE iid = ?", (owner, token, iid))
        new_events = [history.new_event(workflowStarted=pb.WorkflowStartedEvent())]
        new_events += [pb.HistoryEvent.FromString(data) for _, data in inbox]
        numbers = [seq for seq, _ in inbox]
        turns.append(Turn(token, iid, app, instance_id, generation, events, new_events, numbers, incoming))
    return turns


def claim_tasks(connection: sqlite3.Connection, app: str, owner: str, limit: int) -> list[Task]:
    """Take up to `limit` activities that nobody holds."""
    tasks = []
    rows = connection.execute(
        "SELECT id, request FROM tasks WHERE app = ? AND owner IS NULL ORDER BY id LIMIT ?", (app, limit)
    ).fetchall()
    for number, request in rows:
        token = secrets.token_hex(16)
        connection.execute("UPDATE tasks SET owner = ?, token = ? WHERE id = ?", (owner, token, number))
        tasks.append(Task(token, number, request))
    return tasks


def has_free_work(connection: sqlite3.Connection, app: str, *, turns: bool = True, tasks: bool = True) -> bool:
    """Whether there is work of this app that nobody holds, of the kinds asked for."""
    row = connection.execute(
        "SELECT (?2 AND EXISTS (SELECT 1 FROM instances WHERE app = ?1 AND ready = 1 AND owner IS NULL))"
        " OR (?3 AND EXISTS (SELECT 1 FROM tasks WHERE app = ?1 AND owner IS NULL))",
        (app, turns, tasks),
    ).fetchone()
    return bool(row[0])


def give_back(connection: sqlite3.Connection, items: Iterable[Turn | Task]) -> None:
    """Free work items whose lease we still hold."""
    for item in items:
        if isinstance(item, Turn):
            connection.execute(
                "UPDATE instances SET owner = NULL, token = NULL WHERE iid = ? AND token = ?", (item.iid, item.token)
            )
        else:
            connection.execute(
                "UPDATE tasks SET owner = NULL, token = NULL WHERE id = ? AND token = ?", (item.id, item.token)
            )


def give_back_all(connection: sqlite3.Connection, owner: str) -> int:
    """Free all that a sidecar holds, which is gone; returns how many items."""
    count = 0
    for table in ("instances", "tasks"):
        count += connection.execute(f"UPDATE {table} SET owner = NULL, token = NULL WHERE owner = ?", (owner,)).rowcount
    return count


def owners(connection: sqlite3.Connection) -> set[str]:
    """The sidecars that hold work."""
    rows = connection.execute(
        "SELECT owner FROM instances WHERE owner IS NOT NULL UNION SELECT owner FROM tasks WHERE owner IS NOT NULL"
    )
    return {row[0] for row in rows}
