"""`outlast migrate`: copies threads between checkpointers."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from outlast.checkpointer.sidecar import configured
from outlast.cli._console import ERR, AsJson, CommandError, Verbose, print_json, print_line, say
from outlast.embedded import default_path

if TYPE_CHECKING:
    from outlast.migrate import ThreadReport

_ENDS = "postgres://…, sqlite:PATH, redis://… or the name of a Dapr state store"


def command(
    source: Annotated[str, typer.Option("--from", metavar="SOURCE", help=f"{_ENDS}.")],
    target: Annotated[str, typer.Option("--to", metavar="TARGET", help=f"The same, but not redis://… ({_ENDS}).")],
    thread: Annotated[list[str] | None, typer.Option(help="Only this thread; repeatable. [all]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be copied.")] = False,
    encrypted: Annotated[
        bool, typer.Option("--encrypted", help="Values are encrypted with LANGGRAPH_AES_KEY (EncryptedSerializer).")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Copy threads with all checkpoints, pending writes and metadata to another checkpointer, and verify the copy.

    The source is never changed. Cut short or called again, it goes on and brings over what has come since; what is in
    the target already is compared and not written again. Exit status 1 if a thread could not be copied completely.

    With --json, one line for each thread (thread_id, checkpoints, writes, copied, present, problem), and a last one
    with the totals.
    """
    try:
        from outlast.migrate import migrate
        from outlast.migrate.opening import is_dapr, is_redis, opened
    except ModuleNotFoundError as error:
        raise CommandError(
            f"this needs LangGraph ({error.name} is missing): pip install 'outlast[langgraph]'"
        ) from error
    if source == target:
        raise CommandError("source and target are the same")
    new = not configured() and not default_path().exists()
    if new and is_dapr(source):
        raise CommandError(
            f"there is nothing to copy here: the embedded store {default_path()} does not exist. Go to the folder your "
            "program runs in, or name its file with OUTLAST_EMBEDDED_PATH, or a Dapr sidecar with DAPR_GRPC_PORT"
        )
    verbatim = not is_redis(source)
    started = time.monotonic()
    totals = {"threads": 0, "checkpoints": 0, "writes": 0, "copied": 0, "present": 0, "problems": 0}
    with ExitStack() as stack:
        origin = stack.enter_context(opened(source, encrypted=encrypted, verbatim=verbatim))
        absent = dry_run and (new if is_dapr(target) else not _exists(target))
        destination = None
        if not absent:
            end = opened(target, target=not dry_run, encrypted=encrypted, verbatim=verbatim)
            destination = stack.enter_context(end)
        bar = stack.enter_context(_progress())
        total = len(thread) if thread else None
        task = bar.add_task("", total=total, checkpoints="")

        def show(report: ThreadReport) -> None:
            done = totals["copied"] + totals["present"] + report.copied + report.present
            rate = done / max(time.monotonic() - started, 0.001)
            bar.update(task, description=report.thread_id[:40], checkpoints=f"{done} checkpoints ({rate:.0f}/s)")

        if total is None:
            # A pass over the names only, so that the bar has an end.
            bar.update(task, total=sum(1 for _ in origin.threads()))
        for report in migrate(origin, destination, threads=thread, dry_run=dry_run, on_progress=show):
            totals["threads"] += 1
            for name in ("checkpoints", "writes", "copied", "present"):
                totals[name] += getattr(report, name)
            totals["problems"] += bool(report.problem)
            show(report)
            bar.advance(task)
            if as_json:
                print_json(asdict(report), indent=None)
            elif report.problem:
                print_line(f"{report.thread_id}: {report.problem}")
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        print_json({**totals, "seconds": seconds}, indent=None)
    else:
        print_line(
            f"{totals['threads']} threads, {totals['checkpoints']} checkpoints: {totals['copied']} "
            f"{'to be copied' if dry_run else 'copied and verified'}, {totals['present']} there already"
        )
        say(f"{seconds:.1f} s")
    if totals["problems"]:
        say(f"{totals['problems']} threads could not be copied completely; the others are")
        raise typer.Exit(1)


def _exists(target: str) -> bool:
    from outlast.migrate.opening import path_of

    return not target.startswith("sqlite:") or path_of(target).exists()


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[checkpoints]}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=ERR,
        transient=True,
    )
