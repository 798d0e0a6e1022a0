"""Threads that expire: all at once, for whoever reads or writes, and never under a run that holds them."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointer import DaprSaver, life
from outlast.checkpointer.client import Get, StateClient, Swap
from outlast.checkpointer.sidecar import Address
from outlast.checkpointer.thread import ThreadLog
from outlast.doctor import repair
from outlast.embedded import EmbeddedSidecar
from tests.upkeep.test_upkeep import _CutShort, contents, cut, keys_of, talk

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[StateClient]:
    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:
        client = StateClient("statestore", Address("127.0.0.1", sidecar.grpc_port))
        yield client
        client.close()


class Clock:
    """A clock that a test moves, in minutes."""

    def __init__(self) -> None:
        self.minutes = 1000.0

    def __call__(self) -> float:
        return self.minutes * 60


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(life, "now", clock)
    return clock


def there(saver: DaprSaver, thread: str, **more: Any) -> bool:
    config: Any = {"configurable": {"thread_id": thread, **more}}
    found = saver.get_tuple(config)
    assert bool(list(saver.list(config))) == bool(found)
    return found is not None


def test_a_thread_lives_as_long_as_it_is_written_to(client: StateClient, clock: Clock) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10, "refresh_on_read": False})
    talk(saver, "t", 2)
    clock.minutes += 9
    talk(saver, "t", 1)
    clock.minutes += 9.9
    assert there(saver, "t")
    clock.minutes += 0.2
    assert not there(saver, "t")
    assert not there(DaprSaver(client=client), "t"), "it is gone for savers without a time to live, too"
    assert list(saver.list(None)) == []


@pytest.mark.parametrize("refresh", [True, False])
def test_reading_begins_it_anew_if_wanted(client: StateClient, clock: Clock, refresh: bool) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10, "refresh_on_read": refresh})
    talk(saver, "t", 1)
    for _ in range(3):
        clock.minutes += 6
        there(DaprSaver(client=client, ttl={"default_ttl": 10, "refresh_on_read": refresh}), "t")
    assert there(saver, "t") is refresh
    talk(saver, "t", 1)
    state = saver.get_tuple({"configurable": {"thread_id": "t"}})
    assert state is not None
    assert len(state.checkpoint["channel_values"]["messages"]) == (4 if refresh else 2)


def test_reading_again_at_once_writes_nothing(client: StateClient, clock: Clock, monkeypatch: Any) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 60})
    talk(saver, "t", 1)
    clock.minutes += 30
    swaps: list[Any] = []
    perform = StateClient._perform

    def counting(self: StateClient, operation: Any) -> Any:
        if isinstance(operation, Swap):
            swaps.append(operation)
        return perform(self, operation)

    monkeypatch.setattr(StateClient, "_perform", counting)
    for _ in range(5):
        assert there(saver, "t")
    assert len(swaps) == 1


def test_a_thread_may_have_a_time_of_its_own(client: StateClient, clock: Clock) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10, "refresh_on_read": False})
    for thread in ("short", "ever", "usual"):
        talk(saver, thread, 1)
    for thread, minutes in (("short", 1), ("ever", None)):
        config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": "", "ttl": minutes}}
        found = saver.get_tuple(config)
        assert found is not None
        saver.put_writes({"configurable": {**found.config["configurable"], "ttl": minutes}}, [("note", "x")], "task")
    # The default is not for them any more.
    talk(saver, "ever", 1)
    talk(saver, "short", 1)
    clock.minutes += 2
    assert [there(saver, thread) for thread in ("short", "ever", "usual")] == [False, True, True]
    clock.minutes += 10_000
    assert [there(saver, thread) for thread in ("short", "ever", "usual")] == [False, True, False]
    # A thread that begins anew has the default again.
    talk(saver, "short", 1)
    clock.minutes += 2
    assert there(saver, "short")


def test_a_saver_without_one_keeps_what_a_thread_has(client: StateClient, clock: Clock) -> None:
    talk(DaprSaver(client=client, ttl={"default_ttl": 10}), "t", 1)
    plain = DaprSaver(client=client)
    clock.minutes += 9
    talk(plain, "t", 1)
    clock.minutes += 9
    assert there(plain, "t")
    clock.minutes += 2
    assert not there(plain, "t")


@pytest.mark.parametrize("ttl", [0, -1, float("inf"), float("nan"), "10", True])
def test_what_is_no_time_to_live_is_refused(client: StateClient, ttl: Any) -> None:
    with pytest.raises(ValueError, match="positive number of minutes"):
        DaprSaver(client=client, ttl={"default_ttl": ttl})
    saver = DaprSaver(client=client)
    with pytest.raises(ValueError, match="positive number of minutes"):
        saver.put_writes({"configurable": {"thread_id": "t", "checkpoint_id": "1", "ttl": ttl}}, [("a", 1)], "task")


def test_a_thread_that_a_run_holds_does_not_expire(client: StateClient, clock: Clock) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10})
    talk(saver, "t", 1)
    client.run(ThreadLog("t").change(lambda head: replace(head, active="run")))
    clock.minutes += 100
    assert there(saver, "t")
    assert saver.sweep_ttl() == 0
    talk(saver, "t", 1)
    client.run(ThreadLog("t").change(lambda head: replace(head, active="", queue=("next",))))
    clock.minutes += 100
    assert there(saver, "t")
    # Its time begins when it is let go of.
    client.run(ThreadLog("t").change(lambda head: replace(head, queue=())))
    clock.minutes += 9
    assert len(contents(saver, "t")) == 6
    clock.minutes += 11
    assert saver.sweep_ttl() == 1


def test_an_expired_thread_begins_anew(client: StateClient, clock: Clock, tmp_path: Path) -> None:
    """A saver that remembers segments of the expired thread must not share them."""
    saver = DaprSaver(client=client, ttl={"default_ttl": 10, "refresh_on_read": False})
    talk(saver, "t", 20)
    old = keys_of(tmp_path / "outlast.db")
    clock.minutes += 11
    talk(saver, "t", 1)
    assert len(contents(DaprSaver(client=client), "t")) == 3
    assert len(keys_of(tmp_path / "outlast.db") & old) == 1, "nothing is left of it but the head"


def test_a_conversation_longer_than_its_time_goes_on_with_all_it_knows(client: StateClient, clock: Clock) -> None:
    """A node that takes longer: the thread expires, another process sweeps, and then the checkpoint comes."""
    from tests.checkpointer.writing import Writer

    for swept in (False, True):
        saver = DaprSaver(client=client, ttl={"default_ttl": 10})
        writer = Writer(saver, f"t-{swept}")
        writer.put({"messages": ["a"] * 3, "other": "kept"})
        writer.put({"messages": ["a"] * 4})
        clock.minutes += 11
        if swept:
            assert DaprSaver(client=client).sweep_ttl() == 1
        last = writer.put({"messages": ["a"] * 5})
        (found,) = DaprSaver(client=client).list({"configurable": {"thread_id": f"t-{swept}"}})
        assert found.checkpoint["id"] == last
        assert found.checkpoint["channel_values"] == {"messages": ["a"] * 5, "other": "kept"}
        clock.minutes += 11
        assert DaprSaver(client=client).sweep_ttl() == 1


def test_a_sweep_cut_short_at_every_request(
    client: StateClient, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10})
    talk(saver, "other", 3)
    client.run(ThreadLog("other").change(lambda head: replace(head, life=life.Life(None, own=True))))
    other = contents(saver, "other")
    for number, after in itertools.product(range(50), (False, True)):
        talk(saver, f"t-{number}-{after}", 40)
        known = keys_of(tmp_path / "outlast.db")
        clock.minutes += 11
        with monkeypatch.context() as patched:
            cut(client, patched, number, after)
            try:
                saver.sweep_ttl()
                ended = True
            except _CutShort:
                ended = False
        # Whole or gone, never a part.
        assert contents(saver, f"t-{number}-{after}") == []
        DaprSaver(client=client).sweep_ttl()
        left = keys_of(tmp_path / "outlast.db")
        assert len(left & known) <= len(known) - 40
        assert DaprSaver(client=client).sweep_ttl() == 0
        assert contents(saver, "other") == other
        if ended:
            break
    else:
        pytest.fail("never reached the end")
    heads = {f"{ThreadLog(f't-{number}-{after}').key}" for number in range(50) for after in (False, True)}
    of_other = {key for key in left if key.startswith(ThreadLog("other").key)}
    assert left <= heads | of_other, "tombstones are all that is left of the others"


def test_a_writer_that_comes_back_at_the_same_moment(
    client: StateClient, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each request of a sweep a writer goes on with the thread: what it wrote is there, whole."""
    perform = StateClient._perform
    for number in range(50):
        thread = f"t-{number}"
        saver = DaprSaver(client=client, ttl={"default_ttl": 10})
        talk(saver, thread, 20)
        clock.minutes += 11
        count = itertools.count()
        met = False

        sweeping = StateClient("statestore", client.address)
        assert sweeping.capabilities

        def meeting(
            self: StateClient,
            operation: Any,
            number: int = number,
            thread: str = thread,
            count: Iterator[int] = count,
            sweeping: StateClient = sweeping,
        ) -> Any:
            nonlocal met
            if self is sweeping and next(count) == number:
                met = True
                talk(DaprSaver(client=client, ttl={"default_ttl": 10}), thread, 2)
            return perform(self, operation)

        with monkeypatch.context() as patched:
            patched.setattr(StateClient, "_perform", meeting)
            DaprSaver(client=sweeping).sweep_ttl()
        sweeping.close()
        found = contents(DaprSaver(client=client), thread)
        assert len(found) == (6 if met else 0)
        talk(saver, thread, 1)
        assert len(contents(DaprSaver(client=client), thread)) == (9 if met else 3)
        assert [finding.kind for finding in repair(client, grace=0).findings] == []
        if not met:
            return
    pytest.fail("never reached the end")


def test_a_thread_renewed_while_it_was_swept_is_left_alone(
    client: StateClient, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another's clock it has not expired: its commit comes between the look at the head and its mark."""
    saver = DaprSaver(client=client, ttl={"default_ttl": 10})
    talk(saver, "t", 2)
    perform = StateClient._perform
    renewed = False

    def renewing(self: StateClient, operation: Any) -> Any:
        nonlocal renewed
        if isinstance(operation, Swap) and not renewed:
            renewed = True
            clock.minutes -= 11
            talk(saver, "t", 1)
            clock.minutes += 9
        return perform(self, operation)

    clock.minutes += 11
    sweeper = DaprSaver(client=client)
    with monkeypatch.context() as patched:
        patched.setattr(StateClient, "_perform", renewing)
        assert sweeper.sweep_ttl() == 0
    assert renewed
    assert len(contents(saver, "t")) == 9


def test_a_commit_after_another_process_deleted_the_thread(client: StateClient) -> None:
    """It stores all of the state again: what it would have shared is gone."""
    saver = DaprSaver(client=client)
    talk(saver, "t", 20)
    state = saver.get_tuple({"configurable": {"thread_id": "t"}})
    DaprSaver(client=client).delete_thread("t")
    assert state is not None
    checkpoint = {**state.checkpoint, "id": "1ffffffe-ffff-6fff-8000-000000000000"}
    saver.put(state.config, checkpoint, {}, {})  # type: ignore[arg-type,typeddict-item]
    found = DaprSaver(client=client).get_tuple({"configurable": {"thread_id": "t"}})
    assert found is not None
    assert found.checkpoint["channel_values"] == state.checkpoint["channel_values"]


def test_the_doctor_sweeps(client: StateClient, clock: Clock, tmp_path: Path) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10})
    talk(saver, "old", 3)
    clock.minutes += 11
    talk(saver, "new", 1)
    tried = repair(client, dry_run=True, grace=0)
    assert [(finding.kind, finding.where) for finding in tried.left] == [("expired thread", "old")]
    assert not repair(client, grace=0).left
    assert len([key for key in keys_of(tmp_path / "outlast.db") if key.startswith(ThreadLog("old").key)]) == 1
    assert there(saver, "new")


def test_the_sweeper(client: StateClient, clock: Clock, tmp_path: Path) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10, "sweep_interval_minutes": 0.001})
    talk(saver, "t", 3)
    clock.minutes += 11
    future = saver.start_ttl_sweeper()
    try:
        with sqlite3.connect(tmp_path / "outlast.db") as database:
            while database.execute("SELECT count(*) FROM state WHERE key LIKE 't-%'").fetchone()[0] > 1:
                pass
    finally:
        assert saver.stop_ttl_sweeper(10)
    assert future.done()
    again = saver.start_ttl_sweeper()
    again.cancel()
    with pytest.raises(CancelledError):
        again.result(1)


async def test_the_async_face(client: StateClient, clock: Clock) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10})
    talk(saver, "t", 1)
    clock.minutes += 6
    assert await saver.aget_tuple({"configurable": {"thread_id": "t"}})
    clock.minutes += 6
    assert await saver.aget_tuple({"configurable": {"thread_id": "t"}})
    clock.minutes += 11
    assert await saver.aget_tuple({"configurable": {"thread_id": "t"}}) is None
    assert await saver.asweep_ttl() == 1


def test_a_copy_lives_by_its_own_time(client: StateClient, clock: Clock) -> None:
    saver = DaprSaver(client=client, ttl={"default_ttl": 10, "refresh_on_read": False})
    talk(saver, "usual", 1)
    talk(saver, "ever", 1)
    client.run(ThreadLog("ever", wish=life.own(None)).change(lambda head: head))
    for thread in ("usual", "ever"):
        saver.copy_thread(thread, f"copy of {thread}")
    clock.minutes += 11
    assert not there(saver, "copy of usual")
    assert there(saver, "copy of ever")


def test_nothing_is_left_to_the_stores_own_time_to_live(client: StateClient, monkeypatch: Any) -> None:
    """A record that expires by itself could be one that another version needs."""
    sent: list[Any] = []
    calls = StateClient._calls

    def watching(self: StateClient, operation: Any) -> Any:
        sent.append(operation)
        return calls(self, operation)

    monkeypatch.setattr(StateClient, "_calls", watching)
    talk(DaprSaver(client=client, ttl={"default_ttl": 10}), "t", 2)
    assert all(getattr(operation, "ttl", None) is None for operation in sent)
    assert any(not isinstance(operation, Get) for operation in sent)
