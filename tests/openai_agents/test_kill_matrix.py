"""A run of everything at once, killed by SIGKILL at every boundary: same result, and nothing recorded is done again."""

from __future__ import annotations

import functools
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from outlast.testing import ScriptedModelServer
from tests.acceptance.points import claimed
from tests.acceptance.scenario import Scenario, Stage, died
from tests.openai_agents import desk, workshop
from tests.openai_agents.roles import MODEL_URL

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(1500)]


@contextmanager
def _models(scenario: Scenario) -> Iterator[ScriptedModelServer]:
    """The models; while one is asked its caller may be killed."""
    asked: Counter[str] = Counter()

    def on_call(call: dict[str, Any]) -> None:
        name = call["request"]["model"]
        asked[name] += 1
        point = f"model {name} #{asked[name]} during"
        scenario.note(point)
        if claimed(scenario.folder, "kill_at", point):
            scenario.processes[-1].kill()

    with ScriptedModelServer(desk.script, on_call=on_call) as server:
        scenario.env[MODEL_URL] = server.base_url
        yield server


def _calls(server: ScriptedModelServer) -> Counter[str]:
    return Counter(call["request"]["model"] for call in server.requests())


def _undisturbed(stage: Stage, order: dict[str, str]) -> tuple[Any, list[str]]:
    with stage.scenario("undisturbed") as scenario, _models(scenario) as server:
        scenario.fork("tests.openai_agents.roles.submit", run_id=f"run-{secrets.token_hex(4)}", **order).check()
        assert scenario.effects == desk.EFFECTS
        assert _calls(server) == desk.MODELS
        result = scenario.json("result")
        assert result["status"] == "done"
        assert result["output"] == {"text": "40 are on their way", "refunded": 40}
        assert result["context"]["refunded"] == 40
        return result, scenario.trace


def _killed_at(point: str, expected: Any, order: dict[str, str], scenario: Scenario) -> None:
    """Play the story of one kill."""
    names = {"run_id": f"run-{secrets.token_hex(4)}", **order}
    with _models(scenario) as server:
        scenario.at("kill_at", point)
        first = scenario.fork("tests.openai_agents.roles.submit", **names)
        first.wait()
        if not died(first):
            # What runs in the background did not come to this point this time: then the run was undisturbed.
            assert first.returncode == 0
            assert (scenario.folder / "kill_at").exists()
        else:
            before, asked = scenario.effects, _calls(server)
            accepted = "Create r #1 after" in scenario.trace
            scenario.fork("tests.openai_agents.roles.recover", **names).check(60)
            assert not (accepted and "resubmitted" in scenario.trace), "an accepted run was not there"
            recorded = Counter(name for kind, name, key in scenario.json("recorded"))
            recorded["to_refunds"] = recorded["transfer_to_refunds"]
            for name, count in scenario.effects.items():
                in_flight = max(0, before[name] - recorded[name])
                assert count <= desk.EFFECTS[name] + in_flight, f"{name} took place {count} times"
            for name, count in _calls(server).items():
                in_flight = max(0, asked[name] - recorded[name])
                assert count <= desk.MODELS[name] + in_flight, f"model {name} was asked {count} times"
        assert set(scenario.effects) == set(desk.EFFECTS)
        result = scenario.json("result")
        if order["mode"] == "streamed" and died(first):
            # The reader that came back is told what there is; what the dead one was told is lost with it.
            assert sorted(set(result["told"])) == result["told"], "a run item was told twice"
        # A tool that was in flight is called again; what it had changed in the context until then may be known from
        # another tool that ended meanwhile.
        log = Counter(result["context"]["log"]) - Counter(expected["context"]["log"])
        assert all(scenario.effects[name] > desk.EFFECTS[name] for name in log), log
        result["context"]["log"] = expected["context"]["log"]
        for name in expected:
            assert result[name] == expected[name], name


@pytest.mark.parametrize(
    ("mode", "session"), [("run", "sqlite"), ("streamed", "sqlite"), ("run", "dapr")], ids=["run", "streamed", "dapr"]
)
def test_a_run_survives_a_kill_at_every_boundary(stage: Stage, mode: str, session: str, sidecar: str) -> None:
    order = {"mode": mode, "session": session}
    expected, trace = _undisturbed(stage, order)
    points = [point for point in dict.fromkeys(trace) if point.endswith((" before", " after", " during"))]
    assert len(points) > 80, points
    own = [point for point in points if not point.startswith(("Save", "Create", "Swap", "Delete", "advance", "wake"))]
    others = [point for point in points if point not in own]
    # The store's part is the same code for every mode, and as slow as it is on daprd.
    step = 1 if (mode, session, sidecar) == ("run", "sqlite", "embedded") else 4
    points = [point for point in [*own, *others[::step]] if os.environ.get("POINTS", "") in point]
    stories = {point.replace(" ", "-"): functools.partial(_killed_at, point, expected, order) for point in points}
    wrong = stage.play_all(stories)
    report = "\n\n".join(f"=== killed at {name}: {what[:600]}\n...\n{what[-3000:]}" for name, what in wrong.items())
    assert not wrong, f"{len(wrong)} of {len(points)} kills: {', '.join(wrong)}\n{report}"


_STEPS = {
    "mcp": "tool/ask_mcp", "shell": "tool/shell", "local shell": "tool/local_shell", "custom": "tool/custom",
    "patch": "tool/apply_patch.create_file", "click": "tool/computer.click", "shot": "tool/computer.screenshot",
    "marked": "tool/nested/call-nested/function/marked", "nested": "tool/nested", "fails": "tool/fails",
    "slow": "tool/slow",
}  # fmt: skip


def _is_of(key: str, name: str) -> bool:
    """Whether a recorded step is that of an effect."""
    if name.startswith("model "):
        return key == f"m{name.removeprefix('model ')}"
    if name == "helper":
        return key.startswith("tool/nested/") and key.endswith("/m0")
    step = _STEPS[name]
    return key.startswith(f"{step}/") and (name == "marked") == ("/function/" in key) and not key.endswith("/m0")


def _worked(point: str, expected: Any, mode: str, scenario: Scenario) -> None:
    names = {"run_id": f"run-{secrets.token_hex(4)}", "mode": mode}
    scenario.env[MODEL_URL] = "http://127.0.0.1:9/v1"
    scenario.at("kill_at", point)
    first = scenario.fork("tests.openai_agents.roles.work", again=False, **names)
    first.wait()
    if died(first):
        before = scenario.effects
        scenario.fork("tests.openai_agents.roles.work", again=True, **names).check(60)
        recorded = [key for _, _, key in scenario.json("recorded")]
        for name in workshop.EFFECTS:
            done = any(_is_of(key, name) for key in recorded)
            limit = 1 if done or not before[name] else 2
            assert 1 <= scenario.effects[name] <= limit, f"{name} took place {scenario.effects[name]} times"
    assert scenario.json("result") == expected


@pytest.mark.parametrize("mode", ["run", "streamed"])
def test_every_kind_of_tool_survives_a_kill_before_and_after(stage: Stage, mode: str) -> None:
    with stage.scenario("undisturbed") as scenario:
        scenario.env[MODEL_URL] = "http://127.0.0.1:9/v1"
        run_id = f"run-{secrets.token_hex(4)}"
        scenario.fork("tests.openai_agents.roles.work", run_id=run_id, mode=mode, again=False).check()
        counted = {name: count for name, count in scenario.effects.items() if not name.startswith("hook ")}
        assert counted == workshop.EFFECTS
        expected = scenario.json("result")
        points = [point for point in dict.fromkeys(scenario.trace) if point.startswith("node ")]
    stories = {point.replace(" ", "-"): functools.partial(_worked, point, expected, mode) for point in points}
    wrong = stage.play_all(stories)
    report = "\n\n".join(f"=== killed at {name}: {what[:600]}\n...\n{what[-3000:]}" for name, what in wrong.items())
    assert not wrong, f"{len(wrong)} of {len(points)} kills: {', '.join(wrong)}\n{report}"
