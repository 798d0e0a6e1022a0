"""`outlast demo`, whole; and what it says when the promise does not hold."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from outlast.cli._history import Superstep
from outlast.cli._survival import Report
from outlast.recovery.runs import RunHead
from tests.cli.conftest import Cli


@pytest.mark.kill
def test_the_agent_survives(empty: Cli) -> None:
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        shown = empty.json("demo", TMPDIR=folder)
        assert list(Path(folder).iterdir()) == []

    assert shown["promise_held"]
    assert shown["failures"] == []
    assert shown["status"] == "done"
    assert shown["attempts"] == 2
    assert shown["answer"].startswith("It is sunny in Lisbon")
    when = [step["committed"] for step in shown["supersteps"]]
    assert when == sorted(when, reverse=True)
    assert {"before the kill", "after the restart"} == set(when)
    calls = shown["model_calls"]
    assert calls["counted"] == calls["undisturbed"] + calls["in_flight_at_the_kill"]
    assert calls["repeated_for_committed_supersteps"] == 0
    assert shown["bookings"] == {"counted": 1, "undisturbed": 1}
    assert 0 < shown["seconds"]["restart_to_first_new_step"] < shown["seconds"]["total"]


@pytest.mark.kill
def test_what_it_prints(empty: Cli) -> None:
    done = empty("demo")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"\$ python weather_agent\.py", done.stdout)
    assert re.search(r"\$ kill -9 \d+", done.stdout)
    assert re.search(r"\$ outlast worker weather_agent:agent", done.stdout)
    assert re.search(r"^ +2 +tools ×2 +committed before the kill: kept$", done.stdout, re.M)
    assert re.search(r"^bookings +1 +1$", done.stdout, re.M)
    assert "The run finished by itself." in done.stdout


def step(number: int, node: str) -> Superstep:
    return Superstep(f"c{number}", "", number, "loop", (node,), (), "", "r")


GOOD = Report(
    run=RunHead("r", "weather", "weekend", "", "", status="done"),
    runs=1,
    answer="",
    pid=1,
    before=[step(1, "model"), step(2, "tools")],
    after=[step(1, "model"), step(2, "tools"), step(3, "model")],
    calls={0: 1, 1: 2},
    calls_before=2,
    calls_needed=2,
    bookings=1,
    bookings_needed=1,
    ready=1,
    resumed=1,
    seconds=5,
)


def test_a_promise_that_held() -> None:
    assert GOOD.failures == []
    assert GOOD.in_flight == 1
    assert GOOD.repeated == 0


@pytest.mark.parametrize(
    ("broken", "failure"),
    [
        (replace(GOOD, run=replace(GOOD.run, status="failed")), "the run did not finish: it is failed"),
        (replace(GOOD, runs=2), "there are 2 runs, not 1"),
        (replace(GOOD, bookings=2), "2 bookings, not 1"),
        (replace(GOOD, calls={0: 2, 1: 1}), "a committed superstep was lost or ran again"),
        (replace(GOOD, after=GOOD.after[1:]), "a committed superstep was lost or ran again"),
        (replace(GOOD, after=[*GOOD.after, step(2, "tools")]), "a committed superstep was lost or ran again"),
        (replace(GOOD, before=[]), "nothing was committed when the process was killed, so that nothing was shown"),
        (replace(GOOD, calls={0: 1}), "model calls are missing"),
    ],
)
def test_a_promise_that_did_not_hold(broken: Report, failure: str) -> None:
    assert broken.failures == [failure]
