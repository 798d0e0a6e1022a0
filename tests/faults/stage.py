"""Runs in flight on two replicas, what their user sees meanwhile, and what the servers they talk to have counted."""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast import OutlastError, Runtime
from outlast.checkpointer.sidecar import Address
from outlast.recovery.runs import read as read_run
from outlast.testing import LedgerServer, ScriptedModelServer
from tests.faults import agent as trips
from tests.harness.procs import Child, clean_env, wait_for

LOOPBACK = "127.0.0.1"
RESULTS = Path(__file__).with_name("results.json")
PATIENCE = 150
_EVERY = 0.25


@dataclass
class World:
    """The model and the ledger, which count what they are asked."""

    model: ScriptedModelServer
    ledger: LedgerServer

    @property
    def env(self) -> dict[str, str]:
        """What points an agent here."""
        return {
            "OPENAI_BASE_URL": self.model.base_url,
            "OPENAI_API_KEY": "scripted",
            "LEDGER_URL": self.ledger.url,
            "NO_PROXY": LOOPBACK,
        }

    def asked(self, run: str) -> list[int]:
        """The turns at which a run asked the model, in the order of time."""
        found = (trips.of_request(record["request"]) for record in self.model.requests())
        return [turn for name, turn in found if name == run]

    def bookings(self, run: str) -> list[dict[str, Any]]:
        return [call for call in self.ledger.calls() if call["request"]["run"] == run]


@contextmanager
def world() -> Iterator[World]:
    with ScriptedModelServer(trips.script) as model, LedgerServer(delay=0.02) as ledger:
        yield World(model, ledger)


def start_worker(folder: Path, name: str, env: Mapping[str, str], inside: list[str] | None = None) -> Child:
    """Start `outlast worker` and wait until it takes work. `inside` is what it is started with."""
    command = [*(inside or []), sys.executable, "-u", "-m", "outlast.cli", "worker", "--json", "--verbose"]
    child = Child([*command, "tests.faults.agent:agent"], log=folder / f"{name}.log", env=clean_env(env))
    child.wait_for_line('"ready"', 60)
    return child


@dataclass
class Sight:
    """One look of the user at a run: when, how long it took, and what came of it."""

    at: float
    seconds: float
    error: str = ""


@dataclass
class User:
    """Submits runs to the sidecar of one replica and looks at them all the time, as a program or a person would."""

    address: Address
    world: World
    sights: list[Sight] = field(default_factory=list)
    submitted: list[Sight] = field(default_factory=list)
    handles: dict[str, Any] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime = Runtime(address=self.address)
        self.agent = trips.make(self.runtime)
        self.began = time.monotonic()

    def submit(self, run: str) -> None:
        """Submit a run until it is accepted; again with the same id is the same run."""
        while not self._stop.is_set():
            sight = Sight(time.monotonic() - self.began, 0.0)
            try:
                config = {"configurable": {"thread_id": run}}
                self.handles[run] = self.agent.start({"messages": [("user", run)]}, config, run_id=run)
            except OutlastError as error:
                sight.error = f"{type(error).__name__}: {error}"
                time.sleep(_EVERY)
            sight.seconds = time.monotonic() - self.began - sight.at
            self.submitted.append(sight)
            if not sight.error:
                return

    def submit_aside(self, run: str) -> None:
        """Submit a run on a thread of its own, as the sidecar may not answer now."""
        self._begin(lambda: self.submit(run))

    def look(self) -> None:
        """Begin to look at the first run, again and again."""
        handle = next(iter(self.handles.values()))

        def body() -> None:
            while not self._stop.wait(_EVERY):
                sight = Sight(time.monotonic() - self.began, 0.0)
                try:
                    handle.status()
                except OutlastError as error:
                    sight.error = f"{type(error).__name__}: {error}"
                sight.seconds = time.monotonic() - self.began - sight.at
                self.sights.append(sight)

        self._begin(body)

    def _begin(self, body: Callable[[], None]) -> None:
        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self.runtime.close()


def _logs(workers: list[Child]) -> str:
    return "\n".join(f"--- {worker.log.name}:\n{worker.tail(5000)}" for worker in workers)


def play(
    name: str,
    world: World,
    user: User,
    workers: list[Child],
    fault: Callable[[], None],
    *,
    count: int = 6,
    stale: int = 0,
    afterwards: Callable[[], None] = lambda: None,
) -> None:
    """Submit runs, let the fault happen while all are in flight, wait for all to end, and check what was counted.

    Args:
        fault: Returns when what it broke is whole again.
        stale: See `check`.
        afterwards: Returns when nothing more is to come that could do harm.
    """
    tag = f"{name}-{secrets.token_hex(3)}"
    runs = [f"{tag}-{number}" for number in range(count)]
    for run in runs:
        user.submit(run)
    user.look()

    def under_way() -> bool:
        return all(len(world.asked(run)) >= 2 for run in runs)

    wait_for(under_way, PATIENCE, lambda: f"all runs to be under way\n{_logs(workers)}", every=0.02)
    broken = time.monotonic()
    threading.Timer(1.0, user.submit_aside, [f"{tag}-during"]).start()
    runs.append(f"{tag}-during")
    fault()
    whole = time.monotonic()

    def ended() -> bool:
        try:
            return all(run in user.handles and user.handles[run].status() == "done" for run in runs)
        except OutlastError:
            return False

    def state() -> str:
        said = {run: run in user.handles and user.handles[run].status() for run in runs}
        return f"all runs to be done: {said}\n{_logs(workers)}"

    wait_for(ended, PATIENCE, state, every=0.1)
    ended_at = time.monotonic()
    afterwards()
    for run in runs:
        check(world, user, run, stale)
    assert all(worker.alive for worker in workers), _logs(workers)
    _note(name, world, user, runs, whole - broken, ended_at - whole)


def check(world: World, user: User, run: str, stale: int = 0) -> None:
    """Fail unless a run's state is whole, and nothing that was recorded was done again.

    Args:
        stale: How many requests of each kind may arrive late that a worker had sent while it was cut off from
            everything: no worker can know there that it was overtaken.
    """
    result = user.handles[run].result(10)
    assert [message.text for message in result["messages"]] == trips.conversation(run)
    # The model is asked for the next turn once the one before is recorded: none is asked for after a later one.
    turns = world.asked(run)
    again = [turn for number, turn in enumerate(turns) if any(before > turn for before in turns[:number])]
    assert len(again) <= stale, f"{run}: the model was asked for a recorded turn again: {turns}"
    calls = world.bookings(run)
    by_item: dict[tuple[int, str], set[str]] = {}
    for call in calls:
        by_item.setdefault((call["request"]["turn"], call["request"]["item"]), set()).add(call["key"])
    wanted = {(turn, item) for turn in range(trips.TURNS) for item in trips.ITEMS}
    assert set(by_item) == wanted
    assert all(len(keys) == 1 for keys in by_item.values()), "a booking was asked for with two idempotency keys"
    assert sum(not call["duplicate"] for call in calls) == len(wanted)
    late = [call for call in calls if call["time"] > _first_asked(world, run, call["request"]["turn"] + 1)]
    assert len(late) <= stale, f"{run}: recorded bookings were asked for again: {late}"
    steps = user.handles[run].steps()
    recorded = Counter((step.key, step.slot) for step in steps if step.kind == "result")
    assert set(recorded.values()) == {1}
    assert len(recorded) == trips.TURNS + 1 + len(wanted)


def _first_asked(world: World, run: str, turn: int) -> float:
    times = [record["time"] for record in world.model.requests() if trips.of_request(record["request"]) == (run, turn)]
    return min(times)


def repeats(world: World, run: str) -> tuple[int, int]:
    """How many calls of the model and of the tools were made again, because they were in flight."""
    calls = world.bookings(run)
    return len(world.asked(run)) - trips.TURNS - 1, len(calls) - trips.TURNS * len(trips.ITEMS)


def _note(name: str, world: World, user: User, runs: list[str], broken: float, back: float) -> None:
    """Keep what the user saw, for docs/faults.md; RECORD=1 writes it down."""
    during = [sight for sight in user.sights if sight.error or sight.seconds > 1]
    late = [sight for sight in user.submitted if sight.error or sight.seconds > 1]
    attempts = [user.runtime.client.run(read_run(run)).attempts for run in runs]
    seen = {
        "runs": len(runs),
        "broken for, s": round(broken, 1),
        "all done after it was whole, s": round(back, 1),
        "attempts": sorted(attempts),
        "calls made again: model": sum(repeats(world, run)[0] for run in runs),
        "calls made again: tools": sum(repeats(world, run)[1] for run in runs),
        "looks": len(user.sights),
        "looks that failed": sum(bool(sight.error) for sight in user.sights),
        "longest look, s": round(max((sight.seconds for sight in user.sights), default=0), 1),
        "submissions that failed": sum(bool(sight.error) for sight in user.submitted),
        "longest submission, s": round(max(sight.seconds for sight in user.submitted), 1),
        "errors": sorted({sight.error[:200] for sight in (*during, *late) if sight.error}),
    }
    if os.environ.get("RECORD"):
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**found, name: seen}, indent=1) + "\n")
