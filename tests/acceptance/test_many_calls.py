"""A run of a hundred model calls that is killed at the 99th makes 101 at most in all."""

from __future__ import annotations

import secrets

import pytest

from tests.acceptance.scenario import Stage, died
from tests.acceptance.world import around

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.timeout(120)]

CALLS = 100


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("agent", ["parts", "loop"], ids=["in-one-node", "one-a-superstep"])
def test_a_run_killed_at_the_99th_call_of_100_makes_101_at_most(stage: Stage, agent: str, when: str) -> None:
    with stage.scenario("hundred") as scenario, around(scenario) as world:
        unique = secrets.token_hex(4)
        order = {"agent": f"{agent}-{CALLS}", "is_async": False, "thread": unique, "run_id": unique}
        scenario.at("kill_at", f"model part 98 {when}")
        first = scenario.fork("call_roles.submit", **order)
        first.wait(60)
        assert died(first)
        scenario.fork("call_roles.recover", **order).check(60)
        result = scenario.json("result")
        assert result["status"] == "done"
        assert result["out"]["log"] == [f"part {number}!" for number in range(CALLS)]
        again = {"part 98": 2} if when != "before" else {}
        assert world.model_calls == {f"part {number}": 1 for number in range(CALLS)} | again
