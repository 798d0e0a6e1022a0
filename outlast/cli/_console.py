"""What the commands print, and the options several of them have."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from outlast.errors import OutlastError

OUT: Final = Console(highlight=False)
"""For data."""
ERR: Final = Console(stderr=True, highlight=False)
"""For everything else."""

STATUS_STYLES: Final = {"done": "green", "failed": "red", "rejected": "red", "running": "cyan", "waiting": "yellow"}


class CommandError(OutlastError):
    """A command cannot do what it was asked; the message names the mend."""


def set_up_logging(verbose: bool) -> bool:
    """Log to stderr: warnings, and with `verbose` also what outlast does."""
    if ERR.is_terminal:
        handler: logging.Handler = RichHandler(console=ERR, show_path=False, log_time_format="%X")
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("outlast").setLevel(logging.DEBUG if verbose else logging.WARNING)
    return verbose


Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=set_up_logging, help="Log to stderr what outlast does.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Store = Annotated[str, typer.Option("--store", help="Name of the Dapr state store component.")]


def print_line(text: str | Text) -> None:
    """Print one line of data as it is, however long."""
    OUT.print(text, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table; where it does not go to a terminal, as wide as it is."""
    if OUT.is_terminal:
        OUT.print(table)
        return
    wide = Console(width=10_000, highlight=False)
    with wide.capture() as captured:
        wide.print(table)
    for line in captured.get().splitlines():
        print_line(line.rstrip())


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout; `indent=None` on one line, at once."""
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Tell the user something that is not data."""
    ERR.print(text, markup=False, soft_wrap=True)


def complain(message: str) -> None:
    """Print an error."""
    ERR.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def iso(seconds: float) -> str:
    """Return a Unix time as JSON has it: ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def local(seconds: float) -> str:
    """Return a Unix time as a person reads it."""
    return datetime.fromtimestamp(seconds).strftime("%m-%d %H:%M:%S")


def status_text(status: str) -> Text:
    """Return a run's status in its colour."""
    return Text(status, STATUS_STYLES.get(status, ""))
