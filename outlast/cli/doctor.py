"""`outlast doctor`: is the state store fit to hold runs, and is what it holds whole?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from outlast.checkpointer.client import StateClient
from outlast.checkpointer.sidecar import configured, locate
from outlast.cli._console import ERR, AsJson, CommandError, Store, Verbose, print_json, print_line, say
from outlast.doctor import Check, Examination, Repairs, examine, repair
from outlast.embedded import default_path

_MARKS = {"ok": ("ok      ", "green"), "warning": ("warning ", "yellow"), "failed": ("FAILED  ", "bold red")}
_LEVELS = ("none", "at-least-once", "exactly-once")


def _known(guarantee: str) -> str:
    if guarantee not in _LEVELS[1:]:
        raise typer.BadParameter(f"{guarantee!r} is none of {', '.join(_LEVELS[1:])}")
    return guarantee


def command(
    store: Store = "statestore",
    guarantee: Annotated[
        str, typer.Option(callback=_known, help="What must hold for exit status 0: exactly-once, at-least-once.")
    ] = "exactly-once",
    workflow: Annotated[bool, typer.Option("--workflow", help="Also run a small workflow.")] = False,
    mend: Annotated[
        bool, typer.Option("--repair", help="Then look through all threads and runs, and mend what a crash left.")
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop", help="With --repair: remove checkpoints that cannot be read any more.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --repair: only tell what would be mended.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Examine the sidecar and a state store, and say which guarantee holds and what to change.

    It writes, races and reads records of its own, and deletes them. Exit status 0 if the guarantee holds (and with
    --repair nothing is left that could not be mended), else 1.

    With --json, one object: sidecar, versions, store, quirks, checks (name, status, detail, mend), guarantee, good, and
    with --repair repairs (threads, checkpoints, runs, findings: kind, where, detail, mended).
    """
    if (drop or dry_run) and not mend:
        raise typer.BadParameter("--drop and --dry-run go with --repair")
    if mend and not configured() and not default_path().exists():
        raise CommandError(
            f"there is nothing to repair here: the embedded store {default_path()} does not exist. Go to the folder "
            "your program runs in, or name its file with OUTLAST_EMBEDDED_PATH, or a Dapr sidecar with DAPR_GRPC_PORT"
        )
    address = locate()
    found = examine(store, address, workflow=workflow, on_check=None if as_json else _print_check)
    good = _LEVELS.index(found.guarantee) >= _LEVELS.index(guarantee) and _sound(found, guarantee)
    if not as_json:
        _print_guarantee(found)
    repairs: Repairs | None = None
    if mend and found.guarantee != "none":
        repairs = _repaired(StateClient(store, address, guarantee="at-least-once"), drop, dry_run, as_json)
        good = good and not repairs.left
    if as_json:
        body: dict[str, Any] = {**asdict(found), "good": good}
        print_json({**body, "repairs": repairs.as_dict()} if repairs else body)
    if not good:
        raise typer.Exit(1)


def _sound(found: Examination, guarantee: str) -> bool:
    # Who asks for less than exactly-once has accepted what is between the two.
    return not found.failed or guarantee != "exactly-once"


def _print_check(check: Check) -> None:
    mark, style = _MARKS[check.status]
    print_line(Text.assemble((mark, style), (f"{check.name}: ", "bold"), check.detail))
    if check.mend and check.status != "ok":
        print_line(Text(f"        → {check.mend}"))


def _print_guarantee(found: Examination) -> None:
    say(", ".join(f"{name} {version}" for name, version in found.versions.items()))
    style = "bold green" if found.guarantee == "exactly-once" else "bold red"
    print_line(Text.assemble("guarantee: ", (found.guarantee, style)))


def _repaired(client: StateClient, drop: bool, dry_run: bool, quiet: bool) -> Repairs:
    try:
        with ERR.status("looking through the store …") as status:
            found = repair(
                client,
                drop=drop,
                dry_run=dry_run,
                on_progress=lambda now: status.update(f"{now.threads} threads, {now.checkpoints} checkpoints …"),
            )
    finally:
        client.close()
    if quiet:
        return found
    for finding in found.findings:
        mark, style = ("mended  ", "green") if finding.mended else ("found   ", "bold red")
        text = Text.assemble((mark, style), (f"{finding.kind}: ", "bold"), f"{finding.where}: {finding.detail}")
        print_line(text)
    print_line(
        f"{found.threads} threads, {found.checkpoints} checkpoints, {found.runs} runs looked through: "
        f"{len(found.findings) - len(found.left)} mended, {len(found.left)} left"
    )
    return found
