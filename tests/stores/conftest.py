"""Runs the tests of this directory on each store that `STORE` names: `STORE=redis`, `STORE=redis,mysql`, `STORE=all`.

Without `STORE` nothing here is collected: see `make test-stores`. With `RECORD=1` the outcomes are written to
`results.json`, from which `docs/stores.md` is generated.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import StateClient
from outlast.checkpointer.sidecar import Address
from tests.harness.daprd import STATE_STORE
from tests.stores import sidecar
from tests.stores.servers import STORES, CannotStart, Store

RESULTS = Path(__file__).with_name("results.json")
CHOSEN = [name for name in os.environ.get("STORE", "").replace("all", ",".join(STORES)).split(",") if name]
if not CHOSEN:
    collect_ignore_glob = ["test_*.py"]


@dataclass
class Running:
    """A store that runs, with a sidecar in front of it."""

    name: str
    store: Store
    component: sidecar.Component
    sidecar: sidecar.StateSidecar | sidecar.Embedded
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.sidecar.grpc_port)

    def client(self) -> StateClient:
        return StateClient(STATE_STORE, self.address, guarantee="exactly-once" if self.store.sound else "at-least-once")

    def saver(self) -> DaprSaver:
        return DaprSaver(client=self.client())


_STARTED: dict[str, Running] = {}
_FAILED: dict[str, str] = {}
_BROKEN: dict[str, str] = {}
_OUTCOMES: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="session", params=CHOSEN)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Each chosen store in turn. One that cannot be started is skipped, and the reason is said."""
    name: str = request.param
    if name not in STORES:
        pytest.fail(f"STORE={name!r} is none of {', '.join(STORES)}")
    store, home = STORES[name], tmp_path_factory.mktemp(name)
    component: sidecar.Component | None = None
    with contextlib.ExitStack() as stack:
        if name not in _FAILED and name not in _BROKEN:
            try:
                component = stack.enter_context(store.start(home))
            except CannotStart as error:
                _FAILED[name] = str(error)
        if name in _FAILED:
            pytest.skip(f"{name} cannot be started: {_FAILED[name]}")
        if name in _BROKEN:
            pytest.fail(_BROKEN[name], pytrace=False)
        assert component is not None
        for attempt in range(3):
            try:
                started = sidecar.start(home / "daprd", component) if store.daprd else sidecar.Embedded(component)
            except AssertionError as error:
                # A cold server may be too slow for what a component sets up at its start.
                if attempt == 2:
                    _BROKEN[name] = f"daprd does not start on {name}: {_cause(str(error))}"
                    pytest.fail(_BROKEN[name], pytrace=False)
            else:
                break
        stack.callback(started.kill)
        _STARTED[name] = Running(name, store, component, started)
        yield _STARTED[name]


def _cause(said: str) -> str:
    fatal = [line for line in said.splitlines() if "level=fatal" in line]
    return (fatal or [said])[-1][-1500:]


@pytest.fixture
def sound(running: Running) -> Running:
    """A store with a sound compare-and-swap."""
    if not running.store.sound:
        pytest.skip(f"{running.name} has no sound compare-and-swap")
    return running


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    name = getattr(item, "callspec", None) and item.callspec.params.get("running")  # type: ignore[attr-defined]
    if not name or (report.when != "call" and report.passed):
        return
    test = getattr(item, "originalname", item.name).removeprefix("test_")
    entry = _OUTCOMES.setdefault(name, {"tests": {}, "seconds": 0.0})
    entry["tests"][test] = report.outcome
    entry["seconds"] = round(entry["seconds"] + report.duration, 1)


def pytest_sessionfinish() -> None:
    if not os.environ.get("RECORD"):
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, entry in _OUTCOMES.items():
        started = _STARTED.get(name)
        if started is None:
            results.setdefault(name, {"server": STORES[name].server, "skipped": _FAILED.get(name, "not started")})
            continue
        # A run of some of the tests replaces what it ran, and nothing else.
        before = results.get(name, {})
        results[name] = {
            "component": started.component.kind,
            "version": started.component.version,
            "server": started.store.server,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": entry["seconds"],
            "tests": {**before.get("tests", {}), **entry["tests"]},
            "measured": {**before.get("measured", {}), **started.measured},
        }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, reason in _FAILED.items():
        terminalreporter.write_line(f"NOT TESTED {name}: {reason}", yellow=True)
