"""A run_id is one run, a thread serves one run at a time, and nobody waits for ever."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.scenario import Scenario, Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

ROUNDS = 50


@pytest.fixture
def scenario(stage: Stage) -> Iterator[Scenario]:
    """A worker with the agents of these tests, and a client that obeys."""
    with stage.scenario("submission") as playing:
        playing.fork("client")
        yield playing


@pytest.fixture
def unique() -> str:
    return secrets.token_hex(4)


def _worker(scenario: Scenario, *agents: str) -> Any:
    worker = scenario.fork("serve", agent_names=list(agents))
    worker.wait_for_line("serving")
    return worker


def test_two_processes_submit_one_run_id_at_the_same_instant(replicated: Stage, unique: str) -> None:
    with replicated.scenario("together") as scenario:
        both = [
            scenario.fork("submit_together", replica, prefix=unique, me=replica, rounds=ROUNDS) for replica in (0, 1)
        ]
        for process in both:
            process.wait_for_line('"done"', 100)
        scenario.go()
        for process in both:
            process.check()
        assert scenario.effects == {f"{unique}-{number}:{node}": 1 for number in range(ROUNDS) for node in "ab"}


def test_an_ended_run_submitted_again_is_the_same_run(scenario: Scenario, unique: str) -> None:
    _worker(scenario, "line-ab")
    run = {"input": {"log": [unique]}, "thread": unique, "run_id": unique}
    scenario.ask("start", "line-ab", **run)
    first = scenario.ask("result", "line-ab", run_id=unique)
    history = scenario.ask("history", "line-ab", thread=unique)
    assert first["out"]["log"] == [unique, "a", "b"]
    assert scenario.ask("start", "line-ab", **run) == {"status": "done"}
    assert scenario.ask("result", "line-ab", run_id=unique) == first
    # The thread is at rest: another run on it shows that the second submission left nothing behind.
    other = f"{unique}-other"
    scenario.ask("start", "line-ab", input={"log": [other]}, thread=unique, run_id=other)
    after = scenario.ask("result", "line-ab", run_id=other)
    assert after["out"]["log"] == [unique, "a", "b", other, "a", "b"]
    assert scenario.ask("history", "line-ab", thread=unique)["history"][: len(history["history"])] == history["history"]
    assert scenario.effects == {f"{unique}:a": 2, f"{unique}:b": 2}  # the second run's log also begins with the first


def test_a_run_id_with_another_submission_is_refused(scenario: Scenario, unique: str) -> None:
    _worker(scenario, "line-ab", "line-c")
    run = {"input": {"log": [unique]}, "thread": unique, "run_id": unique}
    scenario.ask("start", "line-ab", **run)
    result = scenario.ask("result", "line-ab", run_id=unique)
    for agent, change in (
        ("line-ab", {"input": {"log": ["another"]}}),
        ("line-ab", {"thread": f"{unique}-another"}),
        ("line-c", {}),
    ):
        refused = scenario.ask("start", agent, **{**run, **change})
        assert refused["error"] == "RunConflictError"
        assert unique in refused["message"]
    assert scenario.ask("result", "line-ab", run_id=unique) == result
    assert scenario.effects == {f"{unique}:a": 1, f"{unique}:b": 1}
    assert scenario.ask("history", "line-ab", thread=f"{unique}-another") == {"history": []}


def test_runs_on_one_thread_take_turns_in_the_order_of_submission(scenario: Scenario, unique: str) -> None:
    names = [f"{unique}-{number}" for number in range(5)]
    scenario.at("hold_at", f"node {names[0]}:a before")
    _worker(scenario, "line-ab")
    for name in names:
        scenario.ask("start", "line-ab", input={"log": [name]}, thread=unique, run_id=name)
    scenario.until_traced("held")
    scenario.go()
    outs = [scenario.ask("result", "line-ab", run_id=name)["out"]["log"] for name in names]
    log: list[str] = []
    for name, out in zip(names, outs, strict=True):
        log += [name, "a", "b"]
        assert out == log


def test_a_rejected_run_leaves_nothing_behind(scenario: Scenario, unique: str) -> None:
    scenario.at("hold_at", f"node {unique}:a before")
    _worker(scenario, "line-ab")
    scenario.ask("start", "line-ab", input={"log": [unique]}, thread=unique, run_id=unique)
    scenario.until_traced("held")
    other = {"input": {"log": ["other"]}, "thread": unique, "run_id": f"{unique}-other"}
    refused = scenario.ask("start", "line-ab", **other, if_busy="reject")
    assert refused["error"] == "ThreadBusyError"
    assert unique in refused["message"]
    scenario.go()
    assert scenario.ask("result", "line-ab", run_id=unique)["out"]["log"] == [unique, "a", "b"]
    assert scenario.effects == {f"{unique}:a": 1, f"{unique}:b": 1}
    # The same id may ask again when the thread is free.
    scenario.until(lambda: _accepted(scenario, {**other, "if_busy": "reject"}), "the thread to be free")
    assert scenario.ask("result", "line-ab", run_id=other["run_id"])["out"]["log"][3:] == ["other", "a", "b"]


def _accepted(scenario: Scenario, order: dict[str, Any]) -> bool:
    return "status" in scenario.ask("start", "line-ab", **order)


def test_new_input_supersedes_a_run_that_waits(scenario: Scenario, unique: str) -> None:
    _worker(scenario, "questions-1")
    waiting, new = f"{unique}-waiting", f"{unique}-new"
    scenario.ask("start", "questions-1", input={"log": [unique]}, thread=unique, run_id=waiting)
    assert "__interrupt__" in scenario.ask("result", "questions-1", run_id=waiting)["out"]
    scenario.ask("start", "questions-1", input={"log": ["new"]}, thread=unique, run_id=new)
    assert scenario.ask("result", "questions-1", run_id=waiting)["error"] == "RunCancelledError"
    assert scenario.ask("status", "questions-1", run_id=waiting) == {"status": "superseded"}
    assert scenario.ask("resume", "questions-1", run_id=waiting, value="late")["error"] == "RunStateError"
    # The new input counts as the one answer, so the new run asks once more.
    assert "__interrupt__" in scenario.ask("result", "questions-1", run_id=new)["out"]
    scenario.ask("resume", "questions-1", run_id=new, value="yes")
    assert scenario.ask("result", "questions-1", run_id=new)["out"]["log"] == [unique, "new", "yes"]
    assert scenario.effects == {f"{unique}:answer-yes": 1}
    assert scenario.ask("workflow", "questions-1", run_id=waiting) == {"workflow": "COMPLETED"}


def test_a_run_queued_behind_one_that_waits_gets_its_turn_when_that_is_superseded(
    scenario: Scenario, unique: str
) -> None:
    _worker(scenario, "questions-1", "line-ab")
    first, second, third = (f"{unique}-{number}" for number in range(3))
    scenario.at("hold_at", f"node {unique}:a before")
    # While `holder` runs, the others queue up: one that will wait, and one behind it.
    scenario.ask("start", "line-ab", input={"log": [unique]}, thread=unique, run_id=f"{unique}-holder")
    scenario.until_traced("held")
    scenario.ask("start", "questions-1", input={"log": ["q"]}, thread=unique, run_id=first)
    scenario.ask("start", "line-ab", input={"log": ["second"]}, thread=unique, run_id=second)
    scenario.go()
    assert scenario.ask("result", "line-ab", run_id=f"{unique}-holder")["out"]["log"] == [unique, "a", "b"]
    # `log` has 4 entries now, more than the agent asks for: it asks once and is answered by nobody.
    assert "__interrupt__" in scenario.ask("result", "questions-1", run_id=first)["out"]
    scenario.ask("start", "line-ab", input={"log": ["third"]}, thread=unique, run_id=third)
    assert scenario.ask("result", "line-ab", run_id=second)["out"]["log"][-3:] == ["second", "a", "b"]
    assert scenario.ask("result", "line-ab", run_id=third)["out"]["log"][-3:] == ["third", "a", "b"]
    assert scenario.ask("status", "questions-1", run_id=first) == {"status": "superseded"}


def test_a_cancelled_run_frees_its_thread(scenario: Scenario, unique: str) -> None:
    _worker(scenario, "questions-1")
    run, other = f"{unique}-run", f"{unique}-other"
    scenario.ask("start", "questions-1", input={"log": [unique]}, thread=unique, run_id=run)
    assert "__interrupt__" in scenario.ask("result", "questions-1", run_id=run)["out"]
    scenario.ask("cancel", "questions-1", run_id=run)
    scenario.until(
        lambda: scenario.ask("status", "questions-1", run_id=run)["status"] == "cancelled", "the run to be cancelled"
    )
    assert scenario.ask("result", "questions-1", run_id=run)["error"] == "RunCancelledError"
    assert scenario.ask("workflow", "questions-1", run_id=run) == {"workflow": "COMPLETED"}
    scenario.ask("start", "questions-1", input={"log": []}, thread=unique, run_id=other)
    assert "__interrupt__" in scenario.ask("result", "questions-1", run_id=other)["out"]
