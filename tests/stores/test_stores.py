"""Each real store, through daprd: conformance, eight writers at once, killed writers, sizes; and refusals."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.conformance import checkpointer_test, validate

from outlast.checkpointer import DaprSaver
from outlast.checkpointer import client as client_module
from outlast.checkpointer.client import StateClient
from outlast.errors import UnsupportedStoreError
from tests.harness.daprd import STATE_STORE
from tests.harness.procs import Child, wait_for_lines
from tests.stores.conftest import Running
from tests.stores.facade import SyncFacade

pytestmark = pytest.mark.timeout(300)


def put(saver: Any, thread_id: str, value: Any, parent: Any = None, step: int = 0) -> Any:
    """Commit a checkpoint whose one channel is `value`; returns its config."""
    checkpoint = empty_checkpoint()
    version = f"{step + 1:032}.0"
    checkpoint["id"] = str(uuid6(clock_seq=-2))
    checkpoint["channel_values"] = {"value": value}
    checkpoint["channel_versions"] = {"value": version}
    config = parent or {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    return saver.put(config, checkpoint, {"source": "loop", "step": step, "parents": {}}, {"value": version})


def value_of(saver: Any, config: Any) -> Any:
    found = saver.get_tuple(config)
    assert found is not None
    return found.checkpoint["channel_values"]["value"]


def ids_of(saver: Any, thread_id: str) -> set[str]:
    listed = saver.list({"configurable": {"thread_id": thread_id}})
    return {item.config["configurable"]["checkpoint_id"] for item in listed}


async def conform(name: str, make: Any) -> int:
    @checkpointer_test(name=name)
    async def saver() -> AsyncIterator[Any]:
        yield make()

    report = await validate(saver)
    failures = [failure for result in report.results.values() for failure in result.failures]
    assert not failures, "\n".join(map(str, failures))
    assert len(report.results) == 8
    assert all(result.detected and result.passed for result in report.results.values())
    return sum(result.tests_passed for result in report.results.values())


async def test_conformance_async(running: Running) -> None:
    started = time.monotonic()
    passed = await conform(f"{running.name} async", running.saver)
    running.measured["conformance"] = passed
    running.measured["conformance_seconds"] = round(time.monotonic() - started, 1)


async def test_conformance_sync(running: Running) -> None:
    passed = await conform(f"{running.name} sync", lambda: SyncFacade(running.saver()))
    assert passed == running.measured.get("conformance", passed)


def test_eight_writers_lose_nothing(sound: Running) -> None:
    """Eight savers with a connection each create one thread at the same time, and put checkpoints into it."""
    thread_id = f"shared-{secrets.token_hex(4)}"
    start = threading.Barrier(8)
    put_there: list[tuple[Any, str]] = []
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            saver = sound.saver()
            saver.client.capabilities  # noqa: B018
            start.wait()
            for step in range(10):
                value = f"{number}/{step}"
                put_there.append((put(saver, thread_id, value, step=step), value))
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors, errors
    saver = sound.saver()
    listed = ids_of(saver, thread_id)
    assert listed == {config["configurable"]["checkpoint_id"] for config, _ in put_there}
    assert len(listed) == 80
    for config, value in put_there:
        assert value_of(saver, config) == value


def test_a_killed_writer_loses_no_acknowledged_put(running: Running, tmp_path: Any) -> None:
    """SIGKILL in the middle of putting, three times on one thread: what was acknowledged is there, and it goes on."""
    thread_id = f"killed-{secrets.token_hex(4)}"
    log = tmp_path / "acknowledged"
    for kill in range(3):
        env = {**running.sidecar.env, "GUARANTEE": running.client().guarantee}
        with Child.python("-m", "tests.stores.putter", thread_id, log, log=tmp_path / f"putter-{kill}.log", env=env):
            wait_for_lines(log, 15 * (kill + 1), timeout=90)
            time.sleep(secrets.randbelow(50) / 1000)
    lines = [line.split() for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert len(lines) >= 45
    saver = running.saver()
    listed = ids_of(saver, thread_id)
    for checkpoint_id, value in lines:
        assert checkpoint_id in listed
        config = {"configurable": {"thread_id": thread_id, "checkpoint_ns": "", "checkpoint_id": checkpoint_id}}
        assert value_of(saver, config) == value
    assert put(saver, thread_id, "goes on") is not None


def test_values_around_the_limit_and_far_above(running: Running) -> None:
    """What is larger than the store takes is cut into chunks; bytes come back as they went in."""
    limit = running.client().capabilities.quirks.max_value
    thread_id = f"sizes-{secrets.token_hex(4)}"
    saver = running.saver()
    written: list[tuple[Any, bytes]] = []
    for step, size in enumerate((0, 1, limit - 40, limit - 1, limit, limit + 1, 2 * limit + 17, 20_000_000)):
        value = os.urandom(size)
        written.append((put(saver, thread_id, value, step=step), value))
    fresh = running.saver()
    for config, value in written:
        assert value_of(fresh, config) == value
    running.measured["largest_value"] = 20_000_000
    fresh.delete_thread(thread_id)
    assert fresh.get_tuple({"configurable": {"thread_id": thread_id}}) is None


def test_long_unicode_thread_ids_stay_apart(running: Running) -> None:
    """Names of 300 characters of any kind, which stores that fold case, accents or spaces would take for one."""
    base = secrets.token_hex(4) + "Ünïcödé-線-🧵-" * 30
    names = [base[:299] + end for end in ("a", "A", "á", " ", "/", "|", "\x00", "🧵")]
    assert all(len(name) == 300 for name in names)
    saver = running.saver()
    for name in names:
        put(saver, name, f"of {name}")
    fresh = running.saver()
    for name in names:
        assert value_of(fresh, {"configurable": {"thread_id": name}}) == f"of {name}"


def test_refused_unless_opted_in(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A store without a sound compare-and-swap is refused by an error that names it, its fault and the choices."""
    client = StateClient(STATE_STORE, running.address)
    if running.store.sound:
        assert client.capabilities.guarantee == "exactly-once"
        return
    with pytest.raises(UnsupportedStoreError, match=r"at-least-once") as refused:
        DaprSaver(client=client).get_tuple({"configurable": {"thread_id": "any"}})
    assert running.component.kind in str(refused.value)
    assert "state.postgresql" in str(refused.value)
    client_module._WARNED.clear()
    for _ in range(2):
        assert running.client().capabilities.guarantee == "at-least-once"
    said = [record.message for record in caplog.records if "at-least-once" in record.message]
    assert len(said) == 1, "it is said once"
