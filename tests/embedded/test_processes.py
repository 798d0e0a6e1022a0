"""Several processes over one file, with real kills."""

from __future__ import annotations

import collections
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dapr.ext.workflow import DaprWorkflowClient, WorkflowState, WorkflowStatus

from outlast.embedded import EmbeddedSidecar
from tests.harness.procs import Child, wait_for, wait_for_lines

pytestmark = pytest.mark.kill


class Machine:
    """One file and the processes that share it; this one has a sidecar without a worker."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "outlast.db"
        self.log = folder / "log"
        self.children: list[Child] = []
        self.sidecar = EmbeddedSidecar(self.path).start()
        self.client = DaprWorkflowClient(host="127.0.0.1", port=str(self.sidecar.grpc_port))

    def worker(self) -> Child:
        child = self.spawn("tests.embedded.worker")
        wait_for(lambda: ["ready", str(child.pid)] in self.lines(), 30, lambda: f"the worker; {child.tail()}")
        return child

    def spawn(self, module: str) -> Child:
        number = len(self.children)
        child = Child.python("-m", module, self.path, self.log, log=self.log.with_name(f"child-{number}"))
        self.children.append(child)
        return child

    def lines(self) -> list[list[str]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [line.split() for line in text.rpartition("\n")[0].splitlines()]

    def starts(self, key: str) -> list[str]:
        """The processes that started an activity, in order."""
        return [line[1] for line in self.lines() if line[0] == "start" and line[2] == key]

    def start(self, name: str, argument: Any, instance_id: str) -> None:
        self.client.schedule_new_workflow(name, input=argument, instance_id=instance_id)

    def finish(self, instance_id: str) -> WorkflowState:
        state = self.client.wait_for_workflow_completion(instance_id, timeout_in_seconds=30)
        assert state is not None
        assert state.runtime_status == WorkflowStatus.COMPLETED, state
        return state

    def close(self) -> None:
        for child in self.children:
            child.kill()
        self.client.close()
        self.sidecar.stop()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def held_at_once(lines: list[list[str]]) -> list[str]:
    """The activities that two executions overlapped in."""
    running: dict[str, str] = {}
    wrong = []
    for line in lines:
        if line[0] == "start":
            if line[2] in running:
                wrong.append(line[2])
            running[line[2]] = line[1]
        elif line[0] == "end":
            running.pop(line[2], None)
    return wrong


def test_a_live_process_takes_a_dead_ones_activity_over_at_once(machine: Machine) -> None:
    workers = {str(child.pid): child for child in (machine.worker(), machine.worker())}
    machine.start("steps", {"count": 1, "seconds": 1.5}, "wf")
    wait_for(lambda: machine.starts("wf/0"))
    victim = machine.starts("wf/0")[0]
    before = time.monotonic()
    workers[victim].kill()
    wait_for(lambda: len(machine.starts("wf/0")) == 2, every=0.002)
    taken = time.monotonic() - before
    assert machine.starts("wf/0")[1] != victim
    assert taken < 0.5, f"{taken:.3f} s"
    assert json.loads(machine.finish("wf").serialized_output) == 1
    assert len(machine.starts("wf/0")) == 2


def test_a_worker_that_comes_back_resumes_by_itself(machine: Machine) -> None:
    first = machine.worker()
    machine.start("steps", {"count": 3, "seconds": 0.3}, "wf")
    wait_for(lambda: machine.starts("wf/1"))
    first.kill()
    machine.worker()
    machine.finish("wf")
    assert [len(machine.starts(f"wf/{n}")) for n in range(3)] == [1, 2, 1]


def test_all_processes_die_and_one_comes_back(machine: Machine) -> None:
    machine.start("fan", {"count": 4, "seconds": 0.4}, "wf")
    machine.start("sleeper", 0.5, "timer")
    machine.client.close()
    machine.sidecar.stop()
    machine.worker().kill()
    machine.worker()
    machine.sidecar = EmbeddedSidecar(machine.path).start()
    machine.client = DaprWorkflowClient(host="127.0.0.1", port=str(machine.sidecar.grpc_port))
    assert json.loads(machine.finish("wf").serialized_output) == 4
    assert json.loads(machine.finish("timer").serialized_output) == "awake"


def test_the_timers_of_a_dead_process_fire_in_a_live_one(machine: Machine) -> None:
    first = machine.worker()
    machine.start("sleeper", 1.5, "wf")
    machine.client.wait_for_workflow_start("wf", timeout_in_seconds=10)
    machine.worker()
    first.kill()
    before = time.monotonic()
    machine.finish("wf")
    assert time.monotonic() - before < 3


def test_no_activity_runs_twice_while_all_live(machine: Machine) -> None:
    pids = {str(machine.worker().pid) for _ in range(3)}
    for number in range(6):
        machine.start("fan", {"count": 20, "seconds": 0.05}, f"wf{number}")
    for number in range(6):
        machine.finish(f"wf{number}")
    started = [line[2] for line in machine.lines() if line[0] == "start"]
    assert len(started) == 120
    assert [key for key, count in collections.Counter(started).items() if count > 1] == []
    used = {line[1] for line in machine.lines() if line[0] == "start"}
    assert used == pids, "the work was not shared"


def test_no_activity_is_held_by_two_while_processes_die(machine: Machine) -> None:
    workers = [machine.worker() for _ in range(3)]
    for number in range(8):
        machine.start("steps", {"count": 8, "seconds": 0.03}, f"wf{number}")
    for victim in (0, 1):
        time.sleep(0.3)
        workers[victim].kill()
        dead = str(workers[victim].pid)
        with machine.log.open("a") as log:  # what the dead one had begun has ended with it
            running = {line[2] for line in machine.lines() if line[:2] == ["start", dead]}
            done = {line[2] for line in machine.lines() if line[:2] == ["end", dead]}
            for key in running - done:
                log.write(f"end {dead} {key}\n")
    for number in range(8):
        machine.finish(f"wf{number}")
    executions = collections.Counter(line[2] for line in machine.lines() if line[0] == "start")
    assert len(executions) == 64
    assert sum(executions.values()) <= 64 + 2 * 8  # only what was in flight at a kill runs again


def test_a_frozen_process_does_not_stop_the_others(machine: Machine) -> None:
    first = machine.worker()
    machine.start("steps", {"count": 1, "seconds": 30}, "held")
    wait_for(lambda: machine.starts("held/0"))
    first.freeze()
    try:
        machine.worker()
        before = time.monotonic()
        machine.start("steps", {"count": 5, "seconds": 0}, "free")
        machine.finish("free")
        assert time.monotonic() - before < 3
        assert len(machine.starts("held/0")) == 1  # its lease is its own while it lives
    finally:
        first.thaw()


def test_a_wait_sees_what_another_process_completes_at_once(machine: Machine) -> None:
    machine.worker()
    took = []
    for number in range(10):
        machine.start("steps", {"count": 1, "seconds": 0}, f"wf{number}")
        before = time.monotonic()
        machine.finish(f"wf{number}")
        took.append(time.monotonic() - before)
    assert sorted(took)[5] < 0.2, took


def test_every_acknowledged_write_survives_kills(machine: Machine) -> None:
    acknowledged = 0
    for _ in range(4):
        pair = [machine.spawn("tests.embedded.appender") for _ in range(2)]
        acknowledged = wait_for_lines(machine.log, acknowledged + 120)
        for child in pair:
            assert child.alive, child.tail()
            child.kill()
    acknowledged_keys = [line[0] for line in machine.lines()]
    connection = sqlite3.connect(machine.path)
    stored = {key: bytes(value).decode() for key, value in connection.execute("SELECT key, value FROM state")}
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    assert [key for key in acknowledged_keys if key not in stored] == []
    assert len(acknowledged_keys) > 400
    # Transactions are whole: both halves or none, acknowledged or not.
    halves = [key for key in stored if key[-1] in "ab"]
    assert all(key[:-1] + ("b" if key[-1] == "a" else "a") in stored for key in halves)
