"""`outlast worker`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.harness.procs import Child, wait_for, wait_for_lines

Start = Callable[..., Child]


def status(cli: Cli, run_id: str) -> str:
    found: str = cli.json("show", run_id)["status"]
    return found


@pytest.mark.acceptance
def test_it_carries_on_what_others_submit(cli: Cli, start: Start) -> None:
    worker = start("worker", "sample:agent", "sample:slow_agent")
    worker.wait_for_line("worker ready for sample, slow")
    cli.submit("sample/r-1/work", wait=False)

    wait_for(lambda: status(cli, "r-1") == "done", 30, "the run")
    worker.terminate()
    assert worker.wait() == 0


def test_it_carries_on_what_was_submitted_before_it_came(cli: Cli, start: Start) -> None:
    cli.submit("sample/r-1/work", wait=False)
    # Asked for by name, it works also where other programs are kept from it.
    start("worker", "sample:agent", OUTLAST_WORKER="off")

    wait_for(lambda: status(cli, "r-1") == "done", 30, "the run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.acceptance
def test_it_drains(cli: Cli, start: Start, tmp_path: Path, number: signal.Signals) -> None:
    """The superstep in progress is finished and committed; the next worker goes on with the one after it."""
    log = tmp_path / "steps.log"
    worker = start("worker", "sample:slow_agent", "--json", "--grace", "20")
    worker.wait_for_line('"ready"')
    cli.submit("slow/r-1/0", wait=False)
    wait_for_lines(log, 3)  # begin 0, end 0, begin 1
    os.kill(worker.pid, number)

    assert worker.wait() == 0
    events = [json.loads(line) for line in worker.output().splitlines() if line.startswith("{")]
    assert [event["event"] for event in events] == ["ready", "draining", "stopped"]
    assert all(event["agents"] == ["slow"] and event["pid"] == worker.pid for event in events)
    drained = log.read_text().splitlines()
    assert drained[-1].startswith("end")
    assert len(drained) < 12
    assert status(cli, "r-1") == "accepted"

    start("worker", "sample:slow_agent", name="second")
    wait_for(lambda: status(cli, "r-1") == "done", 30, "the run")
    assert log.read_text().splitlines() == [f"{what} {count}" for count in range(6) for what in ("begin", "end")]


def test_it_does_not_wait_longer_than_it_was_given(cli: Cli, start: Start, tmp_path: Path) -> None:
    cli.submit("slow/r-1/0", wait=False)
    worker = start("worker", "sample:slow_agent", "--grace", "0")
    wait_for_lines(tmp_path / "steps.log", 1)
    worker.terminate()

    assert worker.wait(5) == 0


def test_a_function_that_returns_an_agent(cli: Cli, start: Start) -> None:
    start("worker", "sample:make_agent").wait_for_line("worker ready for sample")


def test_it_logs_when_asked_to(cli: Cli, start: Start) -> None:
    start("worker", "sample:agent", "--verbose").wait_for_line(r"INFO outlast\.worker: worker .* takes work")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sample:plain", r"nothing has made durable: agent = durable(graph, name='…')"),
        ("sample:number", "sample:number is a builtins.int, no durable agent"),
        ("sample:nothing", "module 'sample' has no 'nothing'"),
        ("nowhere:agent", "there is no module 'nowhere'"),
        ("broken:agent", "importing broken failed: see above"),
    ],
)
def test_what_is_no_agent(cli: Cli, tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    cli.env["PYTHONPATH"] = f"{Path(__file__).parents[2]}:{tmp_path}"
    done = cli("worker", target)

    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert ("ZeroDivisionError" in done.stderr) == target.startswith("broken")


def test_agents_of_another_store_are_refused(cli: Cli) -> None:
    done = cli("worker", "sample:agent", "--store", "orders")

    assert done.returncode == 1
    assert "agent 'sample' is on the state store 'statestore', not 'orders'" in done.stderr
