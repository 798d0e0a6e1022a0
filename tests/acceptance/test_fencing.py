"""A worker that hangs is overtaken; woken up late, it commits nothing and goes on to serve."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3

import pytest

from tests.acceptance.roles import INPUT
from tests.acceptance.scenario import Scenario, Stage
from tests.acceptance.zygote import Forked

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.timeout(120)]

QUICK = {"OUTLAST_HEARTBEAT_TIMEOUT": "2"}


def _line(scenario: Scenario, thread: str, worker: str = "") -> list[str]:
    """Run the line agent undisturbed and return its log."""
    run_id = f"{thread}-{secrets.token_hex(4)}"
    scenario.ask("start", "line-abc", input={"log": [thread]}, thread=thread, run_id=run_id)
    log: list[str] = scenario.ask("result", "line-abc", run_id=run_id)["out"]["log"]
    return log


def _held(scenario: Scenario, workers: list[Forked]) -> Forked:
    """Wait until one of the workers is held in a node, and return that one."""
    pid = int(scenario.until_traced("held").split()[1])
    return next(worker for worker in workers if worker.pid == pid)


def _freeze(scenario: Scenario, worker: Forked) -> None:
    """SIGSTOP a worker, but not in the middle of a write to a SQLite file that it shares: that would stop everybody."""
    worker.freeze()
    path = scenario.folder / "outlast.db"
    while path.exists():
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            worker.thaw()
            worker.freeze()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_frozen_worker_is_overtaken_and_commits_nothing(replicated: Stage, is_async: bool) -> None:
    with replicated.scenario("frozen") as scenario:
        unique = secrets.token_hex(4)
        scenario.fork("client")
        agents = ["trip", "line-abc"]
        workers = [scenario.fork("serve", replica, QUICK, agent_names=agents, is_async=is_async) for replica in (0, 1)]
        for worker in workers:
            worker.wait_for_line("serving")

        def start(name: str) -> None:
            scenario.ask("start", "trip", input=INPUT, thread=name, run_id=name, is_async=is_async)

        # What an undisturbed run looks like.
        start(f"{unique}-calm")
        calm = scenario.ask("result", "trip", run_id=f"{unique}-calm")
        calm_history = scenario.ask("history", "trip", thread=f"{unique}-calm")
        before = scenario.effects

        scenario.at("hold_at", "node left before")
        start(unique)
        frozen = _held(scenario, workers)
        _freeze(scenario, frozen)
        waiting = scenario.ask("result", "trip", run_id=unique)
        assert waiting == calm
        history = scenario.ask("history", "trip", thread=unique)
        assert history == calm_history

        # Woken, it runs the node to its end and wants to commit.
        scenario.go()
        frozen.thaw()
        frozen.wait_for_line("another attempt has taken over")
        assert frozen.alive
        done = scenario.effects - before
        assert done == {"plan": 1, "left": 2, "right": done["right"], "inner_first": 1, "inner_second": 1}
        assert done["right"] <= 2
        assert scenario.ask("history", "trip", thread=unique) == history
        scenario.ask("resume", "trip", run_id=unique, value="yes")
        assert scenario.ask("result", "trip", run_id=unique)["out"]["log"][-1] == "booked Rome"
        assert (scenario.effects - before)["finish"] == 1

        # It is unharmed: alone again, it serves the next run.
        other = next(worker for worker in workers if worker is not frozen)
        other.terminate()
        other.check()
        assert _line(scenario, f"{unique}-after") == [f"{unique}-after", "a", "b", "c"]
        frozen.terminate()
        frozen.check()


def test_a_worker_frozen_between_nodes_does_not_even_begin_the_next(replicated: Stage) -> None:
    """Held after its node's effect, so that its next act is a commit."""
    with replicated.scenario("between") as scenario:
        unique = secrets.token_hex(4)
        scenario.fork("client")
        workers = [scenario.fork("serve", replica, QUICK, agent_names=["line-abc"]) for replica in (0, 1)]
        for worker in workers:
            worker.wait_for_line("serving")
        scenario.at("hold_at", f"node {unique}:b after")
        scenario.ask("start", "line-abc", input={"log": [unique]}, thread=unique, run_id=unique)
        frozen = _held(scenario, workers)
        _freeze(scenario, frozen)
        assert scenario.ask("result", "line-abc", run_id=unique)["out"]["log"] == [unique, "a", "b", "c"]
        history = scenario.ask("history", "line-abc", thread=unique)
        scenario.go()
        frozen.thaw()
        frozen.wait_for_line("another attempt has taken over")
        assert scenario.effects == {f"{unique}:a": 1, f"{unique}:b": 2, f"{unique}:c": 1}
        assert scenario.ask("history", "line-abc", thread=unique) == history
        assert frozen.alive
        assert scenario.ask("workflow", "line-abc", run_id=unique) == {"workflow": "COMPLETED"}
