"""What the acceptance tests share: a folder per scenario, the sidecar it runs on, and what its processes left there."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from tests.acceptance.zygote import Forked, Zygote
from tests.harness.procs import wait_for

T = TypeVar("T")

Replicas = list[Mapping[str, str]]
PATIENCE = 45


@dataclass
class Scenario:
    """One run of a story in its own folder: starts processes and reads what they left.

    Attributes:
        replicas: The settings of each replica of the app.
        folder: Shared with the processes, see `points`.
        env: More settings, for all processes.
    """

    zygote: Zygote
    replicas: Replicas
    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    processes: list[Forked] = field(default_factory=list)
    _orders: int = 0

    def fork(self, function: str, replica: int = 0, env: Mapping[str, str] | None = None, **arguments: Any) -> Forked:
        """Start a process of this scenario."""
        log = self.folder / f"log-{len(self.processes)}"
        settings = {"OUTLAST_HEARTBEAT_TIMEOUT": "60", **self.replicas[replica], **self.env, **(env or {})}
        process = self.zygote.fork(function, log, settings, folder=str(self.folder), **arguments)
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().split("\n")[:-1] if path.exists() else []

    @property
    def effects(self) -> Counter[str]:
        return Counter(self.lines("effects"))

    @property
    def trace(self) -> list[str]:
        return self.lines("trace")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def logs(self) -> str:
        return "\n".join(f"--- {process.command[0]}:\n{process.tail(6000)}" for process in self.processes)

    def at(self, what: str, point: str) -> None:
        """Arm `kill_at` or `hold_at`."""
        path = self.folder / what
        path.with_suffix(".new").write_text(point)
        path.with_suffix(".new").rename(path)

    def note(self, line: str) -> None:
        """Enter a line into the trace."""
        out = os.open(self.folder / "trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(out, line.encode() + b"\n")
        os.close(out)

    def until(self, condition: Callable[[], T | None], what: str) -> T:
        return wait_for(condition, PATIENCE, lambda: f"{what}; trace: {self.trace[-8:]}\n{self.logs()}")

    def until_traced(self, pattern: str) -> str:
        """Wait for a line of the trace that starts with `pattern`."""
        return self.until(lambda: next((line for line in self.trace if line.startswith(pattern)), None), pattern)

    # --- the process that obeys (see `roles.client`)

    def order(self, do: str, agent: str, **arguments: Any) -> int:
        """Tell the client process to do something; returns the number of the order."""
        self._orders += 1
        order = {"do": do, "agent": agent, "number": self._orders, **arguments}
        out = os.open(self.folder / "orders", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(out, json.dumps(order).encode() + b"\n")
        os.close(out)
        return self._orders

    def answer(self, number: int) -> Any:
        """Wait for what came of an order."""
        path = self.folder / f"answer-{number}"
        return json.loads(self.until(lambda: path.read_text() if path.exists() else None, f"order {number}"))

    def go(self) -> None:
        """Let processes go on that are held."""
        (self.folder / "go").touch()

    def ask(self, do: str, agent: str, **arguments: Any) -> Any:
        """Give an order and wait for what comes of it."""
        return self.answer(self.order(do, agent, **arguments))


def died(process: Forked) -> bool:
    """Whether a process was ended by SIGKILL."""
    return process.returncode == -signal.SIGKILL


@dataclass
class Stage:
    """Where scenarios are played: one or more apps, each with settings for its replicas, used one after another.

    Embedded, every scenario has a file of its own. On daprd the scenarios of one app share its store, one at a time.
    """

    zygote: Zygote
    root: Path
    apps: SimpleQueue[Replicas | None]
    _count: int = 0

    @contextmanager
    def scenario(self, name: str) -> Iterator[Scenario]:
        replicas = self.apps.get()
        folder = self.root / name
        folder.mkdir(parents=True)
        own = {"OUTLAST_EMBEDDED_PATH": str(folder / "outlast.db")}
        playing = Scenario(self.zygote, replicas or [own, own], folder)
        try:
            yield playing
        except BaseException as error:
            error.add_note(f"{playing.trace[-8:]}\n{playing.logs()}")
            raise
        finally:
            playing.close()
            self.apps.put(replicas)

    def play_all(self, stories: Mapping[str, Callable[[Scenario], None]]) -> dict[str, str]:
        """Play stories, as many at once as there are apps; returns what went wrong, by name."""

        def play(item: tuple[str, Callable[[Scenario], None]]) -> str:
            name, story = item
            with self.scenario(name) as scenario:
                try:
                    story(scenario)
                except Exception as error:
                    return f"{type(error).__name__}: {error}\n{scenario.logs()}"
            return ""

        with ThreadPoolExecutor(self.apps.qsize()) as pool:
            outcomes = dict(zip(stories, pool.map(play, stories.items()), strict=True))
        return {name: outcome for name, outcome in outcomes.items() if outcome}
