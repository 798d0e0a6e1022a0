"""Child processes of a trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import outlast
from outlast.errors import OutlastError

PATIENCE: Final = 120.0


class ChaosError(OutlastError):
    """A trial cannot be held; the message says what is missing."""


class Program:
    """A Python program in a process of its own, that says what it has to say in lines of JSON.

    Args:
        name: Of its log files.
        folder: For its log files.
        arguments: Of the interpreter.
        environment: The whole of it.
    """

    def __init__(self, name: str, folder: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        self._said = self._out.stat().st_size if self._out.exists() else 0
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], env=dict(environment), stdin=subprocess.PIPE, stdout=out, stderr=err
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def tell(self, order: Any) -> None:
        """Write a line of JSON to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, patience: float = PATIENCE) -> Any:
        """Return the next line of JSON that it says.

        Raises:
            ChaosError: If it ends before, or says nothing in time.
        """
        deadline = time.monotonic() + patience
        while True:
            ended = self.ended
            with self._out.open("rb") as file:
                file.seek(self._said)
                line = file.readline()
            if line.endswith(b"\n"):
                self._said += len(line)
                if line.startswith(b"{"):
                    return json.loads(line)
                continue
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"said nothing for {patience:g} seconds"
                raise ChaosError(f"the {self.name} process {why}. It printed:\n{self.output()}")
            time.sleep(0.005)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()

    def output(self) -> str:
        """Return the end of what it has printed."""
        return (self._out.read_text(errors="replace") + self._err.read_text(errors="replace"))[-3000:]


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without settings of outlast and Dapr, and with `extra`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("DAPR_", "OUTLAST_"))}
    no_proxy = ",".join(filter(None, [ours.get("NO_PROXY") or ours.get("no_proxy"), "127.0.0.1"]))
    root = str(Path(outlast.__file__).parents[1])
    if root != sysconfig.get_path("purelib"):
        # Run from its source folder: the children shall find it, too.
        ours["PYTHONPATH"] = os.pathsep.join(filter(None, [root, ours.get("PYTHONPATH")]))
    return {**ours, "NO_PROXY": no_proxy, "no_proxy": no_proxy, **extra}
