"""A trial: a durable agent in worker processes of its own, run undisturbed, then disturbed, and compared."""

from __future__ import annotations

import json
import random
import secrets
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from outlast.chaos import events, faults
from outlast.chaos.events import Event
from outlast.chaos.processes import PATIENCE, ChaosError, Program, environment
from outlast.chaos.proxy import Misbehaviour, ModelProxy
from outlast.chaos.verdict import Seen, Verdict, judge, varying

_EVERY: Final = 0.002
_QUIET: Final = 1.0
"""Seconds without an event after which nothing more is expected of a worker that was overtaken."""
_WORKERS: Final = 2

SCENARIOS: Final = tuple(faults.FAULTS)
"""What `play` can play."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to try, and how.

    Attributes:
        target: MODULE:ATTR of the durable agent.
        input: What it is run with.
        model_url: Base URL of its model.
        store: Name of its state store.
        sidecar: Settings of the Dapr sidecar to use; a scratch one if empty.
        seed: Of what is drawn at random.
        tool: Name of the tool that is to hang.
        harmless: See `judge`.
        ledger: URL that gives a JSON list, or a file with a line of JSON each: the effects so far.
        timeout: Seconds a run may take.
        heartbeat: Seconds after which a frozen worker counts as hung.
        failures: How many model calls in a row fail.
        retry_after: What a rate limit says.
        replay: See ModelProxy.
    """

    target: str
    input: Any
    model_url: str
    store: str = "statestore"
    sidecar: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    tool: str = ""
    harmless: tuple[str, ...] = ()
    ledger: str = ""
    timeout: float = 120.0
    heartbeat: float = 3.0
    failures: int = 2
    retry_after: float = 1.0
    replay: bool = True


class Trial:
    """Runs the agent. A context manager: everything it starts ends with it."""

    def __init__(self, options: Options, tell: Tell = lambda text: None) -> None:
        self.options = options
        self.calm: list[Seen] = []
        self.workers: list[Program] = []
        self._tell = tell
        self._stack = ExitStack()
        self._count = 0
        self._token = secrets.token_hex(3)

    def __enter__(self) -> Self:
        try:
            self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="outlast-chaos-")))
            self.proxy = self._stack.enter_context(ModelProxy(self.options.model_url, self.options.replay))
            self.sidecar = None if self.options.sidecar else self._scratch_sidecar()
            self.submitter = self._program("submitter", "submit")
            self.workers += [self._program(f"worker-{number}", "work") for number in range(_WORKERS)]
            for each in (self.submitter, *self.workers):
                self._ready(each)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- processes

    def _scratch_sidecar(self) -> Program:
        with socket.socket() as grpc, socket.socket() as http:
            for each in (grpc, http):
                each.bind(("127.0.0.1", 0))
            self._ports = [str(each.getsockname()[1]) for each in (grpc, http)]
        return self.start_sidecar()

    def start_sidecar(self) -> Program:
        """Start the scratch sidecar, on the file and the ports it had before if it is not the first."""
        arguments = ["-m", "outlast.cli", "sidecar", "--json", "--path", str(self.folder / "outlast.db")]
        arguments += ["--grpc-port", self._ports[0], "--http-port", self._ports[1], "--store", self.options.store]
        self.sidecar = Program("sidecar", self.folder, arguments, environment({}))
        self._stack.callback(self.sidecar.kill)
        self.sidecar.hear()
        return self.sidecar

    def _program(self, name: str, role: str) -> Program:
        dapr = dict(self.options.sidecar) or {"DAPR_GRPC_PORT": self._ports[0], "DAPR_HTTP_PORT": self._ports[1]}
        url = self.proxy.url
        settings = {
            "OPENAI_BASE_URL": url,
            "OPENAI_API_BASE": url,
            "OUTLAST_HEARTBEAT_TIMEOUT": str(self.options.heartbeat),
        }
        if role == "submit":
            settings["OUTLAST_WORKER"] = "off"
        arguments = ["-m", "outlast.chaos.child", role, self.options.target, str(self.folder)]
        program = Program(name, self.folder, arguments, environment({**settings, **dapr}))
        self._stack.callback(program.kill)
        return program

    def _ready(self, program: Program) -> None:
        said = program.hear()
        if "failed" in said:
            raise ChaosError(f"the agent cannot be loaded: {said['failed']}")
        if said["store"] != self.options.store:
            raise ChaosError(f"the agent is on the state store {said['store']!r}: --store {said['store']}")

    def replace_worker(self, worker: Program) -> None:
        """Start a worker in the place of one that was killed."""
        number = self.workers.index(worker)
        self.workers[number] = self._program(worker.name, "work")
        self._ready(self.workers[number])

    def worker(self, pid: int) -> Program:
        """Return the worker with this pid."""
        return next(each for each in self.workers if each.pid == pid)

    # --- runs

    def events(self, run: str) -> list[Event]:
        """Return what the workers wrote down of a run so far."""
        return [event for event in events.read(self.folder / "events") if event.run == run]

    def until(self, found: Callable[[], Any], patience: float) -> Any:
        """Return what `found` returns, as soon as it returns something true; None if it does not in time."""
        deadline = time.monotonic() + patience
        while True:
            value = found()
            if value or time.monotonic() > deadline:
                return value or None
            time.sleep(_EVERY)

    def new_run(self) -> str:
        """Return an id."""
        self._count += 1
        return f"chaos-{self._token}-{self._count}"

    def submit(self, run: str) -> None:
        """Submit a run.

        Raises:
            ChaosError: If it is not accepted.
        """
        self.submitter.tell({"run": run, "input": self.options.input})
        said = self.submitter.hear()
        if "error" in said:
            raise ChaosError(f"the agent does not take the input: {said['error']}")

    def seen(self, run: str, effects: int | None) -> Seen:
        """Wait for a run's end, and return what was seen of it."""
        self.submitter.tell({"run": run, "timeout": self.options.timeout})
        said = self.submitter.hear(self.options.timeout + PATIENCE)
        self._settle(run)
        now = self.effects()
        new = None if effects is None or now is None else now - effects
        return Seen(run, self.events(run), self.proxy.calls, said.get("result"), said["ended"], new)

    def _settle(self, run: str) -> None:
        """Wait until nothing more comes of a run."""
        count, since = len(self.events(run)), time.monotonic()
        while time.monotonic() - since < (_QUIET if self.calm else 0.1):
            time.sleep(0.05)
            if len(self.events(run)) != count:
                count, since = len(self.events(run)), time.monotonic()

    def effects(self) -> int | None:
        """Return how many effects the ledger has."""
        where = self.options.ledger
        if not where:
            return None
        if where.startswith(("http://", "https://")):
            with urllib.request.urlopen(where, timeout=30) as reply:
                entries = json.load(reply)
        else:
            entries = [json.loads(line) for line in Path(where).read_text().splitlines() if line.strip()]
        return sum(not (isinstance(entry, dict) and entry.get("duplicate")) for entry in entries)

    def run_calm(self, times: int) -> None:
        """Run the agent undisturbed.

        Raises:
            ChaosError: If it does not end well even so.
        """
        for _ in range(times):
            run, before = self.new_run(), self.effects()
            self.proxy.begin()
            self.submit(run)
            seen = self.seen(run, before)
            if seen.ended not in ("done", "waiting"):
                raise ChaosError(f"undisturbed the run does not end well: {seen.ended}")
            self.calm.append(seen)
            self._tell(f"undisturbed: {seen.ended}, {len(seen.calls.made)} model calls, {seen.steps} steps")

    @property
    def uncompared(self) -> list[str]:
        """Places of the state that differ between undisturbed runs."""
        return varying([seen.state for seen in self.calm])

    @property
    def points(self) -> list[Event]:
        """Where an undisturbed run can be disturbed."""
        return list(events.points(list(self.calm[0].events), self.calm[0].run))

    # --- disturbing

    def impossible(self, scenario: str) -> str:
        """Return why a scenario cannot be played with this agent; empty if it can."""
        return faults.impossible(self, scenario)

    def play(self, scenario: str, times: int) -> Iterator[Verdict]:
        """Disturb `times` runs, each at another place, and judge each."""
        places = faults.places(self, scenario)
        chosen = random.Random(f"{self.options.seed} {scenario}").sample(places, min(times, len(places)))
        for place in chosen:
            yield self.disturb(scenario, place)

    def disturb(self, scenario: str, place: int) -> Verdict:
        """Disturb a run at a place (see `faults.places`) and judge it."""
        run, before = self.new_run(), self.effects()
        disturbance = faults.FAULTS[scenario](self, run, place)
        seen = self.seen(run, before)
        faults.mend(self)
        verdict = judge(self.calm, seen, disturbance, self.options.harmless)
        self._tell(f"{scenario}: {verdict.what}: {'held' if verdict.held else 'NOT HELD'}")
        return verdict

    def misbehave(self, kind: Any, place: int) -> None:
        """Have the model fail from its call number `place` of the next run on."""
        self.proxy.begin(Misbehaviour(kind, place, self.options.failures, self.options.retry_after))
