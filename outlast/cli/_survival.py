"""The demo's scenario: an agent is killed in the middle of its run, its process comes back, and outsiders count.

Everything that is killed or counts is a process of its own. Nothing here is told to wait a while: the agent is killed
when the model has its next call and has not answered it, and what is reported was read from the servers' logs and from
the state store.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import ProxyHandler, Request, build_opener

import outlast
from outlast.checkpointer.sidecar import Address
from outlast.cli import _history
from outlast.cli._console import CommandError
from outlast.cli._history import Superstep
from outlast.embedded import EmbeddedSidecar
from outlast.recovery import runs
from outlast.recovery.runs import RunHead
from outlast.recovery.runtime import Runtime
from outlast.testing.scripts import WEATHER_REPLIES

_PATIENCE: Final = 60.0
_EVERY: Final = 0.005
_MODEL_NODE: Final = "model"

Tell = Callable[[str, str], None]
"""Is told of each thing that happens, by kind (`command`, `event`, `kill`) and text."""


@dataclass(frozen=True)
class Report:
    """What happened.

    Attributes:
        run: The run at the end.
        runs: How many runs there are in the store.
        answer: The agent's last message.
        pid: The process that was killed.
        before: The supersteps that were committed when it was dead.
        after: All supersteps, at the end.
        calls: Model calls for each of the model's turns in the conversation, counted at the model's server.
        calls_before: How many of these were made by the process that was killed.
        calls_needed, bookings_needed: What a run takes that nothing disturbs.
        bookings: Bookings, counted at the ledger.
        ready: Seconds from the start of the new process until its worker was ready.
        resumed: Seconds from the start of the new process until it asked a server for something.
        seconds: How long all of it took.
    """

    run: RunHead
    runs: int
    answer: str
    pid: int
    before: list[Superstep]
    after: list[Superstep]
    calls: dict[int, int]
    calls_before: int
    calls_needed: int
    bookings: int
    bookings_needed: int
    ready: float
    resumed: float
    seconds: float

    @property
    def repeated(self) -> int:
        """How many calls were made again for a superstep that was committed before the kill."""
        committed = sum(step.ran.count(_MODEL_NODE) for step in self.before)
        return sum(self.calls.get(turn, 0) - 1 for turn in range(committed))

    @property
    def in_flight(self) -> int:
        """How many model calls were in flight at the kill."""
        return self.calls_before - sum(step.ran.count(_MODEL_NODE) for step in self.before)

    @property
    def failures(self) -> list[str]:
        """What of the promise did not hold."""
        ids = [step.checkpoint_id for step in self.after]
        numbers = Counter((step.namespace, step.step) for step in self.after)
        kept = ids[: len(self.before)] == [step.checkpoint_id for step in self.before] and max(numbers.values()) == 1
        checks = {
            f"the run did not finish: it is {self.run.status}": self.run.status == "done",
            f"there are {self.runs} runs, not 1": self.runs == 1,
            "nothing was committed when the process was killed, so that nothing was shown": bool(self.before),
            "a committed superstep was lost or ran again": kept and self.repeated == 0,
            f"{self.bookings} bookings, not {self.bookings_needed}": self.bookings == self.bookings_needed,
            "model calls are missing": sum(self.calls.values()) >= self.calls_needed,
        }
        return [text for text, held in checks.items() if not held]


def play(folder: Path, tell: Tell) -> Report:
    """Play the scenario in an empty folder.

    Raises:
        CommandError: If a process does not do its part.
    """
    began = time.monotonic()
    shutil.copy(_example(), folder / "weather_agent.py")
    store = folder / ".outlast" / "outlast.db"
    with ExitStack() as stack:
        model = stack.enter_context(
            _server(folder, "model", "outlast.testing.model_server", "--script", "outlast.testing.scripts:weather")
        )
        ledger = stack.enter_context(_server(folder, "ledger", "outlast.testing.ledger"))
        middle = len(WEATHER_REPLIES) // 2
        _post(f"{model.url}/_control/faults", {"kind": "hang", "at_call": middle})
        watch = _Watch(model, ledger, tell)
        environment = _environment(
            {"OPENAI_BASE_URL": f"{model.url}/v1", "OPENAI_API_KEY": "scripted", "LEDGER_URL": ledger.url}
        )

        first = stack.enter_context(_Program(folder, "program", ["weather_agent.py"], environment))
        tell("command", f"python weather_agent.py   (process {first.pid})")
        watch.until(lambda: len(watch.calls) > middle, first, "the agent's model calls")
        first.kill()
        tell("kill", f"kill -9 {first.pid}   (the model has not answered yet)")
        calls_before = len(watch.look().calls)
        with _reading(store) as runtime:
            before = _steps(runtime, _the_run(runtime))

        started = time.time()
        worker = ["-m", "outlast.cli", "worker", "--json", "weather_agent:agent"]
        second = stack.enter_context(_Program(folder, "worker", worker, environment))
        tell("command", f"outlast worker weather_agent:agent   (process {second.pid}; submits nothing)")
        done = len(watch.calls) + len(watch.bookings)
        watch.until(lambda: len(watch.calls) + len(watch.bookings) > done, second, "the run to go on")
        resumed = min(record["time"] for record in [*watch.calls[calls_before:], *watch.bookings]) - started
        with _reading(store) as runtime:
            run = _the_run(runtime)
            watch.until(lambda: runtime.client.run(runs.read(run.run_id)).ended, second, "the run to end")
            tell("event", "the run has ended")
            run = _the_run(runtime)
            after, answer, count = _steps(runtime, run), _answer(runtime, run), len(runtime.run_ids())
        watch.until(lambda: bool(_lines(second.log)), second, "the worker to say that it is ready")
        ready = _lines(second.log)[0]["time"] - started
        second.terminate()
        watch.look()
        booking = [call.name for reply in WEATHER_REPLIES for call in reply.tool_calls].count("book_hotel")
        return Report(
            run=run,
            runs=count,
            answer=answer,
            pid=first.pid,
            before=before,
            after=after,
            calls=dict(Counter(_turn(record["request"]) for record in watch.calls)),
            calls_before=calls_before,
            calls_needed=len(WEATHER_REPLIES),
            bookings=len(watch.bookings),
            bookings_needed=booking,
            ready=ready,
            resumed=resumed,
            seconds=time.monotonic() - began,
        )


def _example() -> Path:
    """Return the file of the agent: in a wheel beside this one, in the repository among the examples."""
    places = [Path(__file__).parent, Path(outlast.__file__).parents[1] / "examples"]
    for place in places:
        if (place / "weather_agent.py").exists():
            return place / "weather_agent.py"
    raise CommandError("the demo's agent, weather_agent.py, is missing from this installation; install outlast again")


# --- what is in the store


@contextmanager
def _reading(store: Path) -> Iterator[Runtime]:
    """Open the agent's store from this process, without a worker."""
    with EmbeddedSidecar(store) as sidecar:
        runtime = Runtime(address=Address("127.0.0.1", sidecar.grpc_port, embedded=True))
        try:
            yield runtime
        finally:
            runtime.close()


def _the_run(runtime: Runtime) -> RunHead:
    return runtime.client.run(runs.read(runtime.run_ids()[0]))


def _steps(runtime: Runtime, run: RunHead) -> list[Superstep]:
    """Return the supersteps in which nodes ran."""
    found = _history.supersteps(_history.reader(runtime.client), run.thread_id)
    return [step for step in found if step.ran]


def _answer(runtime: Runtime, run: RunHead) -> str:
    if run.status != "done":
        return ""
    result = _history.strict().loads_typed(runtime.client.run(runs.read_typed(run.run_id, run.result)))
    return str(result["messages"][-1].text)


# --- what the servers have counted


class _Watch:
    """The calls that the servers have logged, told of as they come."""

    def __init__(self, model: _Server, ledger: _Server, tell: Tell) -> None:
        self.calls: list[dict[str, Any]] = []
        self.bookings: list[dict[str, Any]] = []
        self._model = model
        self._ledger = ledger
        self._tell = tell

    def look(self) -> _Watch:
        """Read the logs."""
        calls, bookings = _lines(self._model.log), _lines(self._ledger.log)
        for number, record in enumerate(calls[len(self.calls) :], len(self.calls) + 1):
            turn = _turn(record["request"])
            again = any(_turn(earlier["request"]) == turn for earlier in calls[: number - 1])
            self._tell("event", f"model call {number} (the model's turn {turn + 1}{', again' if again else ''})")
        for booking in bookings[len(self.bookings) :]:
            self._tell("event", f"booking {booking['id']}: {booking['request']['hotel']}")
        self.calls, self.bookings = calls, bookings
        return self

    def until(self, happened: Callable[[], bool], program: _Program, what: str) -> None:
        """Look until something has happened.

        Raises:
            CommandError: If the program ends before, or it takes too long.
        """
        deadline = time.monotonic() + _PATIENCE
        while not happened():
            self.look()
            if program.ended or time.monotonic() > deadline:
                why = "its process ended" if program.ended else f"not within {_PATIENCE:.0f} seconds"
                raise CommandError(f"the demo waited for {what}, but {why}. It printed:\n{program.output()}")
            time.sleep(_EVERY)


def _turn(request: Mapping[str, Any]) -> int:
    """Return how many turns the model had had when it was asked this."""
    return sum(message["role"] == "assistant" for message in request["messages"])


def _lines(log: Path) -> list[dict[str, Any]]:
    whole, _, _half_written = log.read_bytes().rpartition(b"\n") if log.exists() else (b"", b"", b"")
    return [json.loads(line) for line in whole.splitlines()]


# --- processes


class _Program:
    """A Python program in its own process; killed at the end, whatever happens."""

    def __init__(self, folder: Path, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.log = folder / f"{name}.out"
        self._errors = folder / f"{name}.err"
        with self.log.open("wb") as out, self._errors.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, and SIGKILL for one that does not end."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def output(self) -> str:
        """The end of what it has printed."""
        return (self.log.read_text(errors="replace") + self._errors.read_text(errors="replace"))[-3000:]


@dataclass(frozen=True)
class _Server:
    url: str
    log: Path


@contextmanager
def _server(folder: Path, name: str, module: str, *arguments: str) -> Iterator[_Server]:
    """Run one of the testing servers."""
    log = folder / f"{name}.jsonl"
    with _Program(folder, name, ["-m", module, "--log", str(log), *arguments], _environment({})) as program:
        deadline = time.monotonic() + _PATIENCE
        while not (said := _lines(program.log)):
            if program.ended or time.monotonic() > deadline:
                raise CommandError(f"the demo's {name} server does not start. It printed:\n{program.output()}")
            time.sleep(_EVERY)
        yield _Server(said[0]["url"], log)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without what would lead the demo elsewhere, and with `extra`."""
    elsewhere = ("DAPR_", "LANGCHAIN_", "LANGSMITH_", "OPENAI_", "OUTLAST_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(elsewhere)}
    no_proxy = ",".join(filter(None, [ours.get("NO_PROXY") or ours.get("no_proxy"), "127.0.0.1"]))
    root = str(Path(outlast.__file__).parents[1])
    if root != sysconfig.get_path("purelib"):
        # Run from its source folder: the children, which run elsewhere, shall find it, too.
        ours["PYTHONPATH"] = os.pathsep.join(filter(None, [root, ours.get("PYTHONPATH")]))
    return {**ours, "NO_PROXY": no_proxy, "no_proxy": no_proxy, **extra}


def _post(url: str, body: Any) -> None:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    build_opener(ProxyHandler({})).open(request, timeout=10).close()
