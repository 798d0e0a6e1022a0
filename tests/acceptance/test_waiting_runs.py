"""Runs that wait for a person hold no worker, no thread and no memory of one; all go on when they are answered.

`--waiting 1000` for as many; `-s` shows what the worker took.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.acceptance.scenario import Scenario, Stage
from tests.acceptance.zygote import Forked

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(1800)]

AGENT = "questions-1"
FRUGAL = {"OUTLAST_CONCURRENCY": "4", "MALLOC_ARENA_MAX": "1"}
"""Four places at once: more runs than that can only wait if they hold none. And no memory lost to malloc's arenas."""
WARM = 50
"""Runs before the first measurement: pools and caches have about their size by then."""


def _taken(worker: Forked) -> tuple[int, int]:
    """Resident memory in KB, and threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), int(status["Threads"])


def _submit(scenario: Scenario, count: int) -> tuple[Forked, Path]:
    """Submit runs and wait until all of them wait; returns their submitter, and what makes it answer them."""
    prefix = secrets.token_hex(3)
    submitter = scenario.fork("call_roles.submit_waiting", agent=AGENT, prefix=prefix, count=count)
    submitter.wait_for_line('"waiting"', 800)
    return submitter, scenario.folder / f"answer-{prefix}"


def test_runs_that_wait_hold_nothing(stage: Stage, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--waiting")
    with stage.scenario("waiting") as scenario:
        worker = scenario.fork("serve", 0, FRUGAL, agent_names=[AGENT])
        worker.wait_for_line("serving")
        first = _submit(scenario, WARM)
        memory, threads = _taken(worker)
        second = _submit(scenario, count)
        more_memory, more_threads = _taken(worker)
        print(f"{count} waiting: {memory} KB, {threads} threads before; {more_memory} KB, {more_threads} threads with")  # noqa: T201
        assert more_threads <= threads + 10, "a waiting run takes a thread of its worker"
        assert more_memory - memory < 4096 + 8 * count, "a waiting run takes memory of its worker"
        for submitter, go in (first, second):
            go.touch()
            submitter.wait_for_line('"ended"', 800)
            submitter.check()
        assert sum(scenario.effects.values()) == len(scenario.effects) == WARM + count
        assert worker.alive
