"""History that a workflow shows to its activities and children, where it asks for that."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import dapr.ext.workflow._durabletask.internal.protos as pb

from outlast.embedded.workflows import Turn

_NONE = pb.HISTORY_PROPAGATION_SCOPE_NONE


def assemble(
    connection: sqlite3.Connection,
    turn: Turn,
    scope: pb.HistoryPropagationScope.ValueType,
    name: str,
    produced: Iterable[pb.HistoryEvent],
) -> pb.PropagatedHistory | None:
    """What a workflow passes on: its own events so far, behind those it was shown itself if the scope is lineage.

    Args:
        name: The workflow's name.
        produced: The events of this turn up to the one that asks; the committed ones are read here.
    """
    if scope == _NONE:
        return None
    result = pb.PropagatedHistory(scope=scope)
    if scope == pb.HISTORY_PROPAGATION_SCOPE_LINEAGE and turn.incoming is not None:
        result.chunks.extend(pb.PropagatedHistory.FromString(turn.incoming).chunks)
    rows = connection.execute(
        "SELECT event FROM history WHERE iid = ? AND seq < ? ORDER BY seq", (turn.iid, turn.events)
    )
    events = [row[0] for row in rows]
    events += [event.SerializeToString(deterministic=True) for event in (*turn.new_events, *produced)]
    result.chunks.add(appId=turn.app, instanceId=turn.instance_id, workflowName=name, rawEvents=events)
    return result


def forward(connection: sqlite3.Connection, turn: Turn, name: str) -> bytes | None:
    """What the next generation of a workflow is shown: the same chain, with this generation's events, or nothing."""
    if turn.incoming is None:
        return None
    scope = pb.PropagatedHistory.FromString(turn.incoming).scope
    history = assemble(connection, turn, scope, name, ())
    return None if history is None else history.SerializeToString()
