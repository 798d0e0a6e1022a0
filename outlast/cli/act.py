"""`outlast retry`, `outlast cancel` and `outlast answer`: what a person does with a run."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from outlast.cli._console import CommandError, Store, Verbose, say
from outlast.cli._store import opened
from outlast.recovery import answers
from outlast.recovery.answers import Answer
from outlast.recovery.budget import LIMITS

Run = Annotated[str, typer.Argument(metavar="RUN", help="The id of the run.")]


def retry(run: Run, store: Store = "statestore", verbose: Verbose = False) -> None:
    """Let a failed run go on from where it failed. A worker that has its agent carries it on."""
    with opened(store) as runtime:
        head = runtime.retry(run)
    say(f"run {run} goes on from where it failed (time {head.retries}); `outlast show {run}` shows it")


def cancel(
    run: Run,
    compensate: Annotated[bool, typer.Option("--compensate", help="Undo its finished steps first.")] = False,
    store: Store = "statestore",
    verbose: Verbose = False,
) -> None:
    """Ask a run to end: at once where it waits, else at its next boundary."""
    with opened(store) as runtime:
        head = runtime.cancel(run, compensate)
    say(f"run {run} is {head.status}" + ("" if head.ended else " and is asked to end"))


def answer(
    run: Run,
    done: Annotated[
        str | None, typer.Option("--done", metavar="JSON", help="The step took effect: its result.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="The step is to be made again.")] = False,
    fail: Annotated[str | None, typer.Option("--fail", metavar="REASON", help="The step counts as failed.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="LIMIT=NUMBER", help="Raise a limit; repeatable.")
    ] = None,
    store: Store = "statestore",
    verbose: Verbose = False,
) -> None:
    """Answer what outlast asks of a waiting run: about a step in doubt, or a budget used up.

    Questions of the agent itself (interrupts, approvals) are answered by the program: `handle.resume(...)`.
    """
    given = _answer(done, again, fail, allow or [])
    with opened(store) as runtime:
        answers.give_plain_answer(runtime, run, given)
    say(f"run {run} has its answer")


def _answer(done: str | None, again: bool, fail: str | None, allow: list[str]) -> Answer:
    if (done is not None) + again + (fail is not None) + bool(allow) != 1:
        raise typer.BadParameter("give one of --done, --again, --fail and --allow")
    if done is not None:
        return answers.done(_json(done))
    if again:
        return answers.again()
    if fail is not None:
        return answers.fail(fail)
    return answers.allow(**dict(map(_limit, allow)))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"--done takes JSON, such as '{{\"id\": 7}}' or '\"text\"': {error}") from error


def _limit(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    if name not in LIMITS:
        raise typer.BadParameter(f"--allow {text}: the limits are {', '.join(LIMITS)}")
    try:
        return name, float(number)
    except ValueError:
        raise typer.BadParameter(f"--allow {text}: give a number, such as {name}=1000") from None
