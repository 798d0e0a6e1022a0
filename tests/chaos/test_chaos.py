"""`outlast chaos` on real agents: it breaks things, tells what holds, and tells of a tool that books twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from outlast.chaos import SCENARIOS, Options, Trial
from outlast.testing import LedgerServer, ScriptedModelServer
from outlast.testing.scripts import weather
from tests.chaos import agents
from tests.harness.procs import REPOSITORY, clean_env

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def ledger() -> Iterator[LedgerServer]:
    with LedgerServer() as server:
        yield server


def _chaos(ledger: LedgerServer, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outlast.cli", "chaos", *arguments, "--json"],
        env=clean_env({"LEDGER_URL": ledger.url, "OPENAI_API_KEY": "scripted", "NO_PROXY": "127.0.0.1", **env}),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_agent_that_does_as_it_should_keeps_the_promise(ledger: LedgerServer) -> None:
    with ScriptedModelServer(agents.script) as model:
        done = _chaos(
            ledger, "all", "tests.chaos.agents:careful", "--input", "Book my trip", "--times", "1",
            OPENAI_BASE_URL=model.base_url,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["promise_held"]
    assert {trial["scenario"] for trial in told["trials"]} == set(SCENARIOS)
    assert not told["skipped"]
    assert all(trial["ended"] == "done" for trial in told["trials"])
    # Each run books each thing once, whatever befalls it: as the ledger says, whom nobody asked.
    runs = len(told["trials"]) + told["undisturbed"]["runs"]
    booked = Counter(call["request"]["what"] for call in ledger.bookings())
    assert booked == {"train": runs, "hotel": runs, "museum": runs}


def test_a_tool_that_books_twice_is_told_of(ledger: LedgerServer) -> None:
    # Each of the three points of its one step: before the call, after it, and when it is recorded.
    done = _chaos(ledger, "kill-worker", "tests.chaos.agents:careless", "--input", '{"said": "shoes"}', "--times", "3")
    assert done.returncode == 1
    trials = json.loads(done.stdout)["trials"]
    assert len(trials) == 3
    by_place = {trial["what"]: trial for trial in trials}
    doubled = by_place.pop("worker killed after tool buy (not recorded yet)")
    assert doubled["doubled"] == ["buy"]
    assert "idempotency_key" in doubled["failures"][0]
    assert all(trial["held"] for trial in by_place.values()), by_place
    # It is right: two undisturbed, three disturbed, and one of these twice.
    assert len(ledger.bookings()) == 2 + 3 + 1


def test_the_ledger_decides_and_harmless_tools_may_run_twice(
    ledger: LedgerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY / "examples")
    monkeypatch.setenv("LEDGER_URL", ledger.url)
    monkeypatch.setenv("OPENAI_API_KEY", "scripted")
    question = {"messages": [["user", "Paris or Lisbon?"]]}
    with ScriptedModelServer(weather) as model:
        options = Options("weather_agent:agent", question, model.base_url, ledger=f"{ledger.url}/bookings")
        with Trial(options) as trial:
            trial.run_calm(2)

            def after(name: str) -> int:
                return next(n for n, point in enumerate(trial.points) if (point.what, point.name) == ("end", name))

            # The ledger knows no weather, so asking for it twice is nothing.
            asked_twice = trial.disturb("kill-worker", after("get_weather"))
            assert asked_twice.doubled == ["get_weather"]
            assert asked_twice.ledger == (1, 1)
            assert asked_twice.held, asked_twice.failures
            bookings = len(ledger.bookings())
            booked = trial.disturb("kill-worker", after("book_hotel"))
            assert booked.ledger == (1, len(ledger.bookings()) - bookings)
            assert booked.held == (booked.ledger[1] == 1)


def test_a_tool_that_hangs_for_ever_is_told_of(ledger: LedgerServer) -> None:
    done = _chaos(ledger, "hang-tool", "tests.chaos.agents:careless", "--input", '{"said": "shoes"}', "--calm", "1")
    assert done.returncode == 1
    (trial,) = json.loads(done.stdout)["trials"]
    assert "buy has no timeout" in trial["failures"][0]


def test_a_scenario_that_needs_a_model_says_so(ledger: LedgerServer) -> None:
    done = _chaos(ledger, "rate-limit", "tests.chaos.agents:careless", "--input", '{"said": "shoes"}', "--calm", "1")
    assert done.returncode == 1
    assert "OPENAI_BASE_URL" in done.stderr
    assert not done.stdout


def test_an_agent_that_cannot_be_loaded_is_an_error_without_a_traceback(ledger: LedgerServer) -> None:
    done = _chaos(ledger, "kill-worker", "no_such_module:agent", "--input", "Hello")
    assert done.returncode == 1
    assert "there is no module 'no_such_module'" in done.stderr
    assert "Traceback" not in done.stderr
