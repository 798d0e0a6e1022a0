"""Workers with different agents, workers that come and go, and runs that live long."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.roles import INPUT
from tests.acceptance.scenario import Scenario, Stage
from tests.acceptance.zygote import Forked
from tests.harness.procs import count_lines

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


@pytest.fixture
def scenario(replicated: Stage) -> Iterator[Scenario]:
    with replicated.scenario("elsewhere") as playing:
        playing.fork("client")
        yield playing


@pytest.fixture
def unique() -> str:
    return secrets.token_hex(4)


def _worker(scenario: Scenario, replica: int, *agents: str, **env: str) -> Forked:
    worker = scenario.fork("serve", replica, env, agent_names=list(agents))
    worker.wait_for_line("serving")
    return worker


def _start(scenario: Scenario, agent: str, run_id: str, **more: Any) -> Any:
    return scenario.ask("start", agent, **{"input": {"log": [run_id]}, "thread": run_id, "run_id": run_id, **more})


def test_a_worker_never_fails_the_runs_of_agents_it_lacks(scenario: Scenario, unique: str) -> None:
    _worker(scenario, 0, "line-ab")
    _worker(scenario, 1, "line-cd")
    names = {f"{unique}-{number}-{agent}": agent for number in range(3) for agent in ("line-ab", "line-cd")}
    for name, agent in names.items():
        assert "error" not in _start(scenario, agent, name)
    for name, agent in names.items():
        assert scenario.ask("result", agent, run_id=name)["out"]["log"] == [name, *agent.partition("-")[2]]
    assert scenario.effects == {
        f"{name}:{node}": 1 for name, agent in names.items() for node in agent.partition("-")[2]
    }


def test_a_run_waits_for_a_worker_that_has_its_agent(scenario: Scenario, unique: str) -> None:
    stranger = _worker(scenario, 0, "line-ab")
    _start(scenario, "line-cd", unique)
    # The stranger is at work, and leaves that run alone.
    _start(scenario, "line-ab", f"{unique}-own")
    assert "out" in scenario.ask("result", "line-ab", run_id=f"{unique}-own")
    assert scenario.ask("status", "line-cd", run_id=unique) == {"status": "accepted"}
    _worker(scenario, 1, "line-cd")
    assert scenario.ask("result", "line-cd", run_id=unique)["out"]["log"] == [unique, "c", "d"]
    assert stranger.alive
    assert scenario.effects[f"{unique}:c"] == scenario.effects[f"{unique}:d"] == 1


def test_a_run_submitted_while_no_worker_lives_goes_on_when_one_comes(scenario: Scenario, unique: str) -> None:
    _start(scenario, "line-cd", unique)
    assert scenario.ask("status", "line-cd", run_id=unique) == {"status": "accepted"}
    assert not scenario.effects
    _worker(scenario, 1, "line-cd")
    assert scenario.ask("result", "line-cd", run_id=unique)["out"]["log"] == [unique, "c", "d"]
    assert scenario.effects == {f"{unique}:c": 1, f"{unique}:d": 1}


def test_a_stopped_worker_ends_its_attempt_at_a_superstep_and_another_goes_on(scenario: Scenario, unique: str) -> None:
    """SIGTERM while a node runs: that node is done and committed, the next one runs elsewhere; nothing runs twice."""
    scenario.at("hold_at", f"node {unique}:b after")
    first = _worker(scenario, 0, "line-abcd")
    _start(scenario, "line-abcd", unique)
    scenario.until_traced("held")
    second = _worker(scenario, 1, "line-abcd")
    first.terminate()
    first.wait_for_line("draining")
    scenario.go()
    first.check()
    assert scenario.ask("result", "line-abcd", run_id=unique)["out"]["log"] == [unique, *"abcd"]
    assert scenario.effects == {f"{unique}:{node}": 1 for node in "abcd"}
    assert second.alive
    by = dict(line.split()[1:3] for line in scenario.trace if line.startswith("by "))
    assert by[f"{unique}:b"] == str(first.pid)
    assert by[f"{unique}:c"] == str(second.pid)


def test_a_worker_stopped_while_nobody_else_lives_leaves_the_run_to_the_next(scenario: Scenario, unique: str) -> None:
    scenario.at("hold_at", f"node {unique}:a after")
    first = _worker(scenario, 0, "line-abc")
    _start(scenario, "line-abc", unique)
    scenario.until_traced("held")
    first.terminate()
    first.wait_for_line("draining")
    scenario.go()
    first.check()
    assert scenario.effects == {f"{unique}:a": 1}
    _worker(scenario, 0, "line-abc")
    assert scenario.ask("result", "line-abc", run_id=unique)["out"]["log"] == [unique, *"abc"]
    assert scenario.effects == {f"{unique}:{node}": 1 for node in "abc"}


def test_the_history_of_a_run_of_many_turns_stays_small(scenario: Scenario, unique: str) -> None:
    """40 questions, each answered when it is asked; the workflow continues as new, so its history does not grow."""
    questions = 40
    agent = f"questions-{questions}"
    _worker(scenario, 0, agent)
    _start(scenario, agent, unique)
    sizes = []
    for number in range(questions):
        asked = scenario.ask("result", agent, run_id=unique)
        assert "__interrupt__" in asked["out"], asked
        sizes.append(scenario.ask("events", agent, run_id=unique)["events"])
        assert scenario.ask("resume", agent, run_id=unique, value=f"{number}") == {}
    out = scenario.ask("result", agent, run_id=unique)["out"]
    assert out["log"] == [unique, *map(str, range(questions))]
    assert scenario.effects == {f"{unique}:answer-{number}": 1 for number in range(questions)}
    assert max(sizes[20:]) <= max(sizes[:20]), sizes
    assert max(sizes) < 150, sizes


def test_a_plain_program_that_makes_its_agent_durable_and_waits_is_enough(stage: Stage, unique: str) -> None:
    """Nobody asks for the run after the restart; the process only makes the agent durable."""
    with stage.scenario("idle") as scenario:
        scenario.at("kill_at", "node model before")
        names = {"thread": unique, "run_id": unique}
        client = scenario.fork("client")
        assert client.alive
        first = scenario.fork("serve", agent_names=["trip"])
        first.wait_for_line("serving")
        scenario.ask("start", "trip", input=INPUT, **names)
        assert "__interrupt__" in scenario.ask("result", "trip", run_id=unique)["out"]
        scenario.ask("resume", "trip", run_id=unique, value="yes")
        first.wait()
        client.kill()
        scenario.fork("only_durable", agent_names=["trip"])
        effects = scenario.folder / "effects"
        scenario.until(lambda: count_lines(effects, "finish"), "the run to end by itself")
        assert scenario.effects["finish"] == scenario.effects["plan"] == scenario.effects["ask"] == 1
