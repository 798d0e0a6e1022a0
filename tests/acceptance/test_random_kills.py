"""Two replicas killed at random while ten runs are in flight: every run ends, and nothing recorded is done again.

The number of kills and the seed are options: `pytest tests/acceptance/test_random_kills.py --kills 200 --seed 7`.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from outlast.testing import Reply
from tests.acceptance.calls import ROUNDS, TOOLS
from tests.acceptance.scenario import Scenario, Stage
from tests.acceptance.world import World, answer, around
from tests.acceptance.zygote import Forked

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(3000)]

IN_FLIGHT = 10
AGENTS = ["rounds-sync", "rounds-async", "trio"]
PATIENCE = 150.0


def _slowly(request: Mapping[str, Any], answered: int) -> Reply:
    """Answers take a moment, so that most kills find some in flight."""
    return Reply(**{**vars(answer(request, answered)), "delay": 0.05})


@dataclass
class _Run:
    name: str
    agent: str
    order: int = 0

    @property
    def input(self) -> Any:
        if self.agent == "trio":
            return {"messages": [("user", f"{self.name} trip")]}
        return {"name": self.name, "log": []}

    @property
    def model_calls(self) -> set[str]:
        if self.agent == "trio":
            return {f"{self.name} trip", f"{self.name} trip after tool"}
        words = ("outline", "check", "polish")
        return {f"{self.name} {word} {number}" for word in words for number in range(ROUNDS)}

    @property
    def tool_calls(self) -> Counter[str]:
        if self.agent == "trio":
            return Counter(["search", "price", "book"])
        return Counter({"book": 2 * ROUNDS, "price": ROUNDS, "search": ROUNDS})

    def check_result(self, out: Any) -> None:
        if self.agent == "trio":
            said = [message[1] for message in out["messages"]]
            used = ["search of Rome", "price of Rome", "book of Rome"]
            assert said == [f"{self.name} trip", f"{self.name} trip!", *used, f"{self.name} trip after tool!"]
            return
        used = [f"{'book' if name == 'again' else name} of {self.name}" for name in TOOLS]
        for number, line in enumerate(out["log"]):
            first = [f"{self.name} {word} {number}!" for word in ("outline", "check")]
            assert line == "; ".join([*first, *used, f"{self.name} polish {number}!"])
        assert len(out["log"]) == ROUNDS


@dataclass
class _Fleet:
    """Two workers, killed and started again; and the runs that they are given."""

    scenario: Scenario
    rng: random.Random
    prefix: str
    workers: dict[int, Forked] = field(default_factory=dict)
    runs: list[_Run] = field(default_factory=list)
    kills: int = 0

    def keep_alive(self) -> None:
        for replica in {0, 1} - self.workers.keys():
            self.workers[replica] = self.scenario.fork("serve", replica, agent_names=AGENTS)

    def kill(self) -> None:
        """Kill a worker that serves, now and then both."""
        for replica in self.rng.choice([[0], [0], [0], [1], [1], [1], [0, 1]]):
            worker = self.workers[replica]
            worker.wait_for_line("serving", 60)
            time.sleep(self.rng.uniform(0, 0.8))
            assert worker.alive, worker.tail()
            worker.kill()
            del self.workers[replica]
            self.kills += 1

    def keep_in_flight(self) -> None:
        for _ in range(IN_FLIGHT - len(self.unfinished())):
            run = _Run(f"{self.prefix}-{len(self.runs)}", self.rng.choice(AGENTS))
            names = {"thread": run.name, "run_id": run.name}
            how = {"is_async": run.agent != "rounds-sync"}
            assert "status" in self.scenario.ask("start", run.agent, input=run.input, **names, **how)
            run.order = self.scenario.order("result", run.agent, run_id=run.name, patience=3000)
            self.runs.append(run)

    def unfinished(self) -> list[_Run]:
        return [run for run in self.runs if not (self.scenario.folder / f"answer-{run.order}").exists()]

    def until_all_ended(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := self.unfinished():
            assert time.monotonic() < deadline, f"runs that do not end: {[run.name for run in left]}"
            time.sleep(0.1)


def test_runs_survive_random_kills(replicated: Stage, request: pytest.FixtureRequest) -> None:
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--seed")
    seed = secrets.randbits(32) if seed is None else seed
    print(f"--kills {kills} --seed {seed}")  # noqa: T201
    with replicated.scenario("random") as scenario, around(scenario, _slowly) as world:
        fleet = _Fleet(scenario, random.Random(seed), secrets.token_hex(3))
        scenario.fork("client")
        while fleet.kills < kills:
            fleet.keep_alive()
            fleet.keep_in_flight()
            fleet.kill()
        fleet.keep_alive()
        fleet.until_all_ended()
        again = _check(fleet, world)
        attempts = sum(again["attempts"])
        print(  # noqa: T201
            f"{fleet.kills} kills, {len(fleet.runs)} runs, {attempts} attempts; "
            f"{len(world.model.requests())} model calls, {again['model']} of them made again; "
            f"{len(world.ledger.calls())} tool calls, {again['tool']} of them made again, none booked twice"
        )


def _check(fleet: _Fleet, world: World) -> dict[str, Any]:
    """Every run came to its result; what was made again had not been recorded."""
    asked: dict[str, list[float]] = defaultdict(list)
    for call in world.model.requests():
        asked[call["request"]["messages"][0]["content"] + _turn(call["request"])].append(call["time"])
    for call in world.ledger.calls():
        asked[call["key"]].append(call["time"])
    tool_of = {call["key"]: call["request"]["tool"] for call in world.ledger.calls()}
    booked = Counter(call["key"] for call in world.ledger.bookings())
    assert set(booked.values()) == {1}
    seen: dict[str, Any] = {"model": 0, "tool": 0, "attempts": []}
    recorded: set[str] = set()
    for run in fleet.runs:
        outcome = fleet.scenario.answer(run.order)
        assert "out" in outcome, (run, outcome)
        run.check_result(outcome["out"])
        steps = fleet.scenario.ask("steps", run.agent, run_id=run.name)["steps"]
        assert {step["kind"] for step in steps} == {"result"}
        names = [step["of"] for step in steps]
        assert len(set(names)) == len(names), f"recorded twice in {run.name}"
        recorded.update(names)
        models = {step["of"] for step in steps if step["type"] == "model"}
        assert models == run.model_calls
        tools = [tool_of[step["of"]] for step in steps if step["type"] == "tool"]
        assert Counter(tools) == run.tool_calls
        for step in steps:
            assert max(asked[step["of"]]) < step["ended"], f"{step} was made again after it was recorded"
            seen[step["type"]] += len(asked[step["of"]]) - 1
        seen["attempts"].append(max(step["attempt"] for step in steps))
    assert set(asked) == recorded, "calls that no run has recorded"
    return seen


def _turn(request: Mapping[str, Any]) -> str:
    return " after tool" if request["messages"][-1]["role"] == "tool" else ""
