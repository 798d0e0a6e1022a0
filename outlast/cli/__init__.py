"""The command line: `outlast demo`, `chaos`, `worker`, `sidecar`, `runs`, `show`, `answer`, `retry`, `cancel`, …

Data goes to stdout, everything else to stderr. Exit status: 0 all right, 1 an error (with a message that names the
mend), 2 wrong usage.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from outlast.cli import act
from outlast.cli._console import complain, print_line
from outlast.cli.chaos import command as chaos
from outlast.cli.demo import command as demo
from outlast.cli.doctor import command as doctor
from outlast.cli.migrate import command as migrate
from outlast.cli.runs import command as list_runs
from outlast.cli.show import command as show
from outlast.cli.sidecar import command as sidecar
from outlast.cli.worker import command as worker
from outlast.embedded import EmbeddedStoreError
from outlast.errors import OutlastError

app = typer.Typer(
    name="outlast",
    help="Durable LangGraph and OpenAI Agents runs on Dapr: kill the process, the run goes on by itself.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo)
app.command("chaos")(chaos)
app.command("worker")(worker)
app.command("sidecar")(sidecar)
app.command("runs")(list_runs)
app.command("show")(show)
app.command("answer")(act.answer)
app.command("retry")(act.retry)
app.command("cancel")(act.cancel)
app.command("migrate")(migrate)
app.command("doctor")(doctor)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = metadata.version("outlast")
    except metadata.PackageNotFoundError:
        version = "(not installed: runs from its source folder)"
    print_line(f"outlast {version}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Run the command line of this process."""
    try:
        app()
    except (OutlastError, EmbeddedStoreError) as error:
        complain(str(error))
        sys.exit(1)
