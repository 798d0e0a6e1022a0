"""How long a run stands still: from `kill -9` to the first step that somebody begins after it.

Four cases, on the embedded sidecar and on daprd, each so many times, each time with a new run that makes one step after
another: the only worker is killed and started again at once; a worker is killed while another replica lives; the
sidecar is killed and started again at once; the only worker and its sidecar are killed and started again at once.

A worker is started by forking a process that has the libraries imported, as a preforking server does; with --cold by
starting Python anew, which adds what importing LangGraph takes.

    make bench-recovery          or            python -m benchmarks.recovery --times 30
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from tests.acceptance.zygote import Zygote
from tests.harness.daprd import DaprCluster, Daprd
from tests.harness.procs import Child, free_ports, wait_for

STEPS = "STEPS_FILE"
_PATIENCE = 120.0
_STEP_SECONDS = 0.03
CASES = {
    "same process restarted": "the only worker is killed",
    "other replica alive": "one of two workers is killed",
    "sidecar killed": "the sidecar of the only worker is killed",
    "both killed": "the only worker and its sidecar are killed",
}


class State(TypedDict, total=False):
    """The state of the loop."""

    done: Annotated[int, operator.add]


def agent() -> Any:
    """A loop of one step, without end."""
    from langgraph.graph import START, StateGraph

    from outlast import durable, step

    @step
    def work(number: int) -> int:
        out = os.open(os.environ[STEPS], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(out, f"{time.time()} {os.getpid()}\n".encode())
        os.close(out)
        time.sleep(_STEP_SECONDS)
        return number

    def node(state: State) -> State:
        work(state.get("done", 0))
        return {"done": 1}

    builder = StateGraph(State)
    builder.add_node("node", node).add_edge(START, "node").add_edge("node", "node")
    return durable(builder.compile(), name="loop")


def work() -> None:
    """Child process: carry runs on until it is killed."""
    loop = agent()
    loop.runtime.start_worker()
    sys.stdout.write('"ready"\n')
    sys.stdout.flush()
    threading.Event().wait()


def _submit() -> None:
    """Child process: submit and cancel runs as stdin says."""
    loop = agent()
    handles: dict[str, Any] = {}
    for line in sys.stdin:
        do, run = line.split()
        if do == "start":
            config = {"configurable": {"thread_id": run}, "recursion_limit": 100_000}
            handles[run] = loop.start({"done": 0}, config, run_id=run)
        else:
            handles[run].cancel()
            while handles[run].status() not in ("cancelled", "failed"):
                time.sleep(0.02)
        sys.stdout.write("ok\n")
        sys.stdout.flush()


class EmbeddedSidecars:
    """`outlast sidecar` on one file: a process of its own, so that it can be killed alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._grpc, self._http = free_ports(2)
        self._child: Child | None = None

    @property
    def env(self) -> dict[str, str]:
        return {"DAPR_GRPC_PORT": str(self._grpc), "DAPR_HTTP_PORT": str(self._http)}

    def start(self) -> None:
        command = ["-m", "outlast.cli", "sidecar", "--json", "--path", str(self._folder / "outlast.db")]
        command += ["--grpc-port", str(self._grpc), "--http-port", str(self._http)]
        self._child = Child.python(*command, log=self._folder / "sidecar.log")
        self._child.wait_for_line("grpc_port", _PATIENCE)

    def kill(self) -> None:
        if self._child:
            self._child.kill()


@dataclass
class Place:
    """A sidecar for each of two replicas, workers, and what they have done.

    Attributes:
        sidecars: Those that can be killed.
        envs: What points each replica to its own.
    """

    folder: Path
    sidecars: list[EmbeddedSidecars | Daprd]
    envs: list[dict[str, str]]
    zygote: Zygote
    cold: bool
    workers: dict[int, Child] = field(default_factory=dict)
    submitter: Any = None
    _count: int = 0

    @property
    def steps(self) -> Path:
        return self.folder / "steps"

    def start_worker(self, replica: int, ready: bool = True) -> None:
        env = {**self.envs[replica], STEPS: str(self.steps)}
        log = self.folder / f"worker-{replica}.log"
        if self.cold:
            command = ["-m", "outlast.cli", "worker", "--json", "benchmarks.recovery:agent"]
            self.workers[replica] = Child.python(*command, log=log, env=env)
        else:
            self.workers[replica] = self.zygote.fork("benchmarks.recovery.work", log, env)
        if ready:
            self.workers[replica].wait_for_line('"ready"', _PATIENCE)

    def tell(self, order: str, run: str) -> None:
        self.submitter.stdin.write(f"{order} {run}\n".encode())
        self.submitter.stdin.flush()
        if self.submitter.stdout.readline() != b"ok\n":
            raise SystemExit("the process that submits ended")

    def lines(self) -> list[tuple[float, int]]:
        whole, _, _ = (self.steps.read_text() if self.steps.exists() else "").rpartition("\n")
        pairs = (line.split() for line in whole.splitlines())
        return [(float(at), int(pid)) for at, pid in pairs]

    def until_more(self, count: int) -> list[tuple[float, int]]:
        """Wait for one more step than `count`."""
        return wait_for(lambda: (found := self.lines())[count:] and found, _PATIENCE, "a step", every=0.001)

    def measure(self, case: str) -> float:
        """Let a run begin, kill, and return how long it stood still."""
        self._count += 1
        run = f"{case.split()[0]}-{os.getpid()}-{self._count}"
        self.tell("start", run)
        before = self.until_more(len(self.lines()) + 5)
        # Right after a step has begun: its outcome is not recorded yet, so none begins by itself.
        pid = self.until_more(len(before))[-1][1]
        replica = next((number for number, worker in self.workers.items() if worker.pid == pid), 0)
        if case != "sidecar killed":
            self.workers[replica].kill()
        if case in ("sidecar killed", "both killed"):
            self.sidecars[0].kill()
        at, count = time.time(), len(self.lines())
        if case in ("sidecar killed", "both killed"):
            self.sidecars[0].start()
        if case in ("same process restarted", "both killed"):
            self.start_worker(replica, ready=False)
        seconds = self.until_more(count)[count][0] - at
        if not self.workers[replica].alive:
            self.start_worker(replica)
        self.tell("cancel", run)
        return seconds


@contextmanager
def _embedded(folder: Path, case: str, *how: Any) -> Iterator[Place]:
    if case == "other replica alive":
        # Each process with its own sidecar inside, on one file: as they are when nothing is configured.
        env = {"OUTLAST_EMBEDDED_PATH": str(folder / "outlast.db")}
        yield Place(folder, [], [env, env], *how)
        return
    sidecar = EmbeddedSidecars(folder)
    sidecar.start()
    try:
        yield Place(folder, [sidecar], [sidecar.env, sidecar.env], *how)
    finally:
        sidecar.kill()


@contextmanager
def _on_daprd(folder: Path, case: str, *how: Any) -> Iterator[Place]:
    with DaprCluster(folder / "dapr") as cluster:
        first = cluster.start_daprd()
        replicas = [first] + ([cluster.start_daprd(first.app_id)] if case == "other replica alive" else [])
        yield Place(folder, [*replicas], [daprd.env for daprd in replicas], *how)


PLACES: dict[str, Callable[..., Any]] = {"embedded": _embedded, "daprd": _on_daprd}


def measure(where: str, case: str, times: int, cold: bool) -> list[float]:
    """Return the seconds that runs stood still."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        zygote = Zygote(folder)
        stack.callback(zygote.close)
        place: Place = stack.enter_context(PLACES[where](folder, case, zygote, cold))
        for replica in range(2 if case == "other replica alive" else 1):
            place.start_worker(replica)
        stack.callback(lambda: [worker.kill() for worker in place.workers.values()])
        place.submitter = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.recovery", "--submit"],
            env={**os.environ, **place.envs[-1], STEPS: str(place.steps), "OUTLAST_WORKER": "off"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(place.submitter.kill)
        found = []
        for number in range(times):
            found.append(place.measure(case))
            sys.stderr.write(f"{where}, {case}, {number + 1} of {times}: {found[-1]:.3f} s\n")
        return found


def p99(values: list[float]) -> float:
    """Return the 99th percentile, by nearest rank."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--on", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--cold", action="store_true", help="start Python anew for each worker")
    parser.add_argument("--json", action="store_true", help="print the raw figures")
    parser.add_argument("--submit", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.submit:
        _submit()
        return
    results = {
        f"{case}, {where}": measure(where, case, asked.times, asked.cold) for where in asked.on for case in asked.case
    }
    if asked.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    lines = ["| what is killed | times | median, s | p99, s |", "|---|---|---|---|"]
    for name, values in results.items():
        lines.append(f"| {name} | {len(values)} | {statistics.median(values):.3f} | {p99(values):.3f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
