"""`outlast demo`: kill an agent in the middle of its run and watch it finish by itself."""

from __future__ import annotations

import importlib.util
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import typer
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outlast.cli._console import OUT, AsJson, CommandError, Verbose, complain, print_json, print_table

if TYPE_CHECKING:
    from outlast.cli._survival import Report

_NEEDED: Final = ("langgraph", "langchain", "langchain_openai")
_STYLES: Final = {"command": "bold", "kill": "bold red", "event": ""}


def command(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Kill an agent with SIGKILL in the middle of its run and watch it finish by itself.

    The agent (examples/weather_agent.py) asks a model over HTTP, looks things up and books a hotel. Model and ledger
    are local processes that count. It takes a few seconds, needs no network and no Dapr, and leaves nothing behind.

    The exit status is 1 if the promise did not hold: the run did not finish, a committed superstep ran again, or a
    booking was doubled.

    With --json, an object: promise_held, failures, status, answer, killed_pid, attempts, supersteps ([{step, ran,
    committed: "before the kill" | "after the restart"}]), model_calls ({counted, undisturbed, in_flight_at_the_kill,
    repeated_for_committed_supersteps}), bookings ({counted, undisturbed}) and seconds ({restart_to_worker_ready,
    restart_to_first_new_step, total}).
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"the demo needs {' and '.join(missing)}: pip install 'outlast[demo]'")
    from outlast.cli import _survival

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # so that the processes of the demo are ended

    signal.signal(signal.SIGTERM, stop)
    began = time.monotonic()

    def tell(kind: str, text: str) -> None:
        if not as_json:
            clock = (f"{time.monotonic() - began:6.2f} s  ", "dim")
            prompt = "  " if kind == "event" else "$ "
            OUT.print(Text.assemble(clock, (f"{prompt}{text}", _STYLES[kind])), soft_wrap=True)

    with tempfile.TemporaryDirectory(prefix="outlast-demo-") as folder:
        report = _survival.play(Path(folder), tell)
    if as_json:
        print_json(_as_dict(report))
    else:
        _print(report)
    for failure in report.failures:
        complain(failure)
    if report.failures:
        raise typer.Exit(1)


def _as_dict(report: Report) -> dict[str, Any]:
    kept = len(report.before)
    return {
        "promise_held": not report.failures,
        "failures": report.failures,
        "status": report.run.status,
        "answer": report.answer,
        "killed_pid": report.pid,
        "attempts": report.run.attempts,
        "supersteps": [
            {
                "step": step.step,
                "ran": list(step.ran),
                "committed": "before the kill" if number < kept else "after the restart",
            }
            for number, step in enumerate(report.after)
        ],
        "model_calls": {
            "counted": sum(report.calls.values()),
            "undisturbed": report.calls_needed,
            "in_flight_at_the_kill": report.in_flight,
            "repeated_for_committed_supersteps": report.repeated,
        },
        "bookings": {"counted": report.bookings, "undisturbed": report.bookings_needed},
        "seconds": {
            "restart_to_worker_ready": round(report.ready, 3),
            "restart_to_first_new_step": round(report.resumed, 3),
            "total": round(report.seconds, 3),
        },
    }


def _print(report: Report) -> None:
    from outlast.cli._history import names

    OUT.print()
    steps = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    steps.add_column("superstep", justify="right")
    steps.add_column("ran")
    steps.add_column("")
    for number, step in enumerate(report.after):
        kept = number < len(report.before)
        told = Text("committed before the kill: kept", "green") if kept else Text("ran after the restart", "cyan")
        steps.add_row(str(step.step), Text(names(step.ran)), told)
    print_table(steps)

    OUT.print()
    counts = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    counts.add_column("counted by the servers")
    for name in ("undisturbed", "here"):
        counts.add_column(name, justify="right")
    counts.add_column("")
    counts.add_row("model calls", str(report.calls_needed), str(sum(report.calls.values())), _about_calls(report))
    counts.add_row("bookings", str(report.bookings_needed), str(report.bookings), "")
    print_table(counts)

    OUT.print()
    OUT.print(Text.assemble(("answer  ", "bold"), report.answer), soft_wrap=True)
    waited = report.resumed - report.ready
    OUT.print(
        Text.assemble(
            ("back    ", "bold"),
            f"{report.resumed:.2f} s from starting the process again to its first new step: {report.ready:.2f} s to\n"
            f"        load Python and the agent and to make the worker ready, and {max(waited, 0):.2f} s more",
        ),
        soft_wrap=True,
    )
    if not report.failures:
        said = "The run finished by itself. Nobody submitted it again, and nothing committed was done twice."
        OUT.print(Panel.fit(Text(said, "bold green"), border_style="green"))


def _about_calls(report: Report) -> str:
    if report.in_flight == 1:
        return "the one in flight at the kill was made again"
    return f"the {report.in_flight} in flight at the kill were made again" if report.in_flight else ""
