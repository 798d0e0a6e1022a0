"""`outlast runs`: all runs in a state store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from outlast.cli._console import (
    OUT,
    AsJson,
    Store,
    Verbose,
    iso,
    local,
    print_json,
    print_table,
    say,
    status_text,
)
from outlast.cli._store import opened
from outlast.recovery import runs
from outlast.recovery.runs import RunHead, Status


def _known(wanted: list[str] | None) -> list[str] | None:
    for status in wanted or ():
        if status not in get_args(Status):
            raise typer.BadParameter(f"{status!r} is none of {', '.join(get_args(Status))}")
    return wanted


def command(
    status: Annotated[
        list[str] | None, typer.Option(callback=_known, help=f"Repeatable: {', '.join(get_args(Status))}.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="The same as --status failed.")] = False,
    agent: Annotated[str | None, typer.Option(help="Only runs of this agent.")] = None,
    thread: Annotated[str | None, typer.Option(help="Only runs on this thread.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    store: Store = "statestore",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List runs, newest first.

    With --json, a list of objects: run_id, agent, thread_id, status, attempts, created, updated (ISO 8601, UTC) and
    error ({"type", "message"} or null).
    """
    statuses = {*(status or ()), *(["failed"] if failed else [])}
    with opened(store) as runtime:
        heads = runtime.client.run(runs.read_many(runtime.run_ids()))
    found = [
        head
        for head in heads
        if (not statuses or head.status in statuses)
        and (agent is None or head.agent == agent)
        and (thread is None or head.thread_id == thread)
    ]
    found.sort(key=lambda head: (head.created, head.run_id), reverse=True)
    if as_json:
        print_json([as_dict(head) for head in found[:limit]])
        return
    if not found:
        say("no such runs" if heads else "no runs yet")
        return
    print_table(_table(found[:limit]))
    if len(found) > limit:
        say(f"the newest {limit} of {len(found)}; --limit {len(found)} lists them all")


def as_dict(head: RunHead) -> dict[str, Any]:
    """Return what JSON says of a run."""
    return {
        "run_id": head.run_id,
        "agent": head.agent,
        "thread_id": head.thread_id,
        "status": head.status,
        "attempts": head.attempts,
        "created": iso(head.created),
        "updated": iso(head.updated),
        "error": {"type": head.error[0], "message": head.error[1]} if head.error else None,
    }


def _table(heads: Sequence[RunHead]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("run", "agent", "thread"):
        table.add_column(name, overflow="fold", min_width=6)
    table.add_column("status", no_wrap=True)
    table.add_column("attempts", justify="right")
    # A narrow terminal has room for one of the times.
    narrow = OUT.is_terminal and OUT.width < 110
    for name in ("updated",) if narrow else ("created", "updated"):
        table.add_column(name, no_wrap=True)
    failed = any(head.error for head in heads)
    if failed:
        table.add_column("error", overflow="fold", min_width=12)
    for head in heads:
        error = ": ".join(head.error).partition("\n")[0] if head.error else ""
        table.add_row(
            Text(head.run_id),
            Text(head.agent),
            Text(head.thread_id),
            status_text(head.status),
            str(head.attempts),
            *(local(time) for time in ((head.updated,) if narrow else (head.created, head.updated))),
            *([Text(error)] if failed else []),
        )
    return table
