"""The journal in the store: recorded by its owner alone, read by whoever takes over, whole after any kill."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from outlast.checkpointer.client import StateClient
from outlast.checkpointer.registry import RUNS
from outlast.checkpointer.thread import Fence, ThreadLog
from outlast.doctor import repair
from outlast.errors import CorruptRecordError, FencedError
from outlast.recovery import journal
from outlast.recovery.journal import Journal, Place, Record, journal_key, shortened
from tests.upkeep import test_orphans
from tests.upkeep.test_orphans import Killed

connect = test_orphans.connect
Connect = Callable[..., StateClient]
CODEC = JsonPlusSerializer()
ROUND = (0, 1)


def opened(client: StateClient, epoch: int) -> Journal:
    made = Journal(client, "run", Fence(epoch, f"worker {epoch}"), CODEC, epoch)
    if epoch > 1:
        client.run(made.take_over())
    return made


def record(place: Place, value: Any = None, error: dict[str, Any] | None = None) -> Record:
    return Record(
        kind="error" if error else "result",
        key=place.key,
        slot=place.slot.index,
        number=len(place.slot.outcomes),
        type="function",
        name="f",
        digest="d",
        request="f()",
        value=value,
        error=error,
    )


def settle(made: Journal, key: str, value: Any) -> None:
    place = made.take(key, ROUND)
    assert place.found is None
    done = record(place, value)
    made.write(done).result(10)
    made.settle(place, done, ROUND)


def test_whoever_takes_over_has_what_was_recorded_and_the_old_owner_records_nothing_more(connect: Connect) -> None:
    client = connect()
    first = opened(client, 1)
    for number in range(70):
        settle(first, f"step {number}", {"n": number, "big": "x" * 20_000 if number == 3 else ""})
    second = opened(connect(), 2)
    assert [item.value["n"] for item in second.records] == list(range(70))
    assert {(item.attempt, item.epoch) for item in second.records} == {(1, 1)}
    place = first.take("late", ROUND)
    with pytest.raises(FencedError):
        first.write(record(place, "late")).result(10)
    settle(second, "step 70", {"n": 70})
    with pytest.raises(FencedError, match="later attempt"):
        client.run(Journal(client, "run", Fence(1, "worker 1"), CODEC, 1).take_over())
    third = opened(connect(), 3)
    assert [item.value["n"] for item in third.records] == list(range(71))
    assert len(third.take("step 3", ROUND).found.value["big"]) == 20_000  # type: ignore[union-attr]


def test_a_journal_that_nobody_wrote_keeps_its_first_owner_out(connect: Connect) -> None:
    """The one that takes over comes before the first record of the one that was overtaken."""
    client = connect()
    first = opened(client, 1)
    second = opened(connect(), 2)
    assert second.records == []
    with pytest.raises(FencedError):
        first.write(record(first.take("late", ROUND), "late")).result(10)
    assert opened(connect(), 3).records == []


def test_what_ends_together_is_one_commit(connect: Connect) -> None:
    client = connect()
    made = opened(client, 1)
    settle(made, "first", 0)
    before = len(client.run(ThreadLog("run", key=journal_key("run")).read()).recent)  # type: ignore[union-attr]
    places = [made.take(f"k{number}", ROUND) for number in range(8)]
    with made._lane._arrived:
        futures: list[Future[None]] = [made.write(record(place, place.key)) for place in places]
    for future in futures:
        future.result(10)
    head = client.run(ThreadLog("run", key=journal_key("run")).read())
    assert head is not None
    assert len(head.recent) - before <= 2
    assert [item.value for item in opened(connect(), 2).records[1:]] == [f"k{number}" for number in range(8)]


# --- slots


def failing(place: Place) -> Record:
    error = {"type": "E", "module": "builtins", "name": "ValueError", "message": "m", "args": None, "attributes": {}}
    return record(place, error=error)


def test_equal_calls_take_slots_in_their_order(connect: Connect) -> None:
    made = opened(connect(), 1)
    both = [made.take("k", ROUND) for _ in range(2)]
    assert [place.slot.index for place in both] == [0, 1]
    for place in reversed(both):
        done = record(place, place.slot.index)
        made.write(done).result(10)
        made.settle(place, done, ROUND)
        made.settle(place, done, ROUND)
    again = opened(connect(), 2)
    assert [again.take("k", ROUND).found.value for _ in range(2)] == [0, 1]  # type: ignore[union-attr]
    fresh = again.take("k", ROUND)
    assert (fresh.found, fresh.slot.index) == (None, 2)
    again.leave(fresh)
    assert again.take("k", ROUND).slot.index == 2


def test_errors_and_rounds(connect: Connect) -> None:
    made = opened(connect(), 1)
    place = made.take("k", ROUND)
    error = failing(place)
    made.write(error).result(10)
    made.settle(place, error, ROUND)
    # Asked for once more in the same attempt: the framework tries again.
    second = made.take("k", ROUND)
    assert (second.found, second.slot.index) == (None, 0)
    made.leave(second)
    # One that takes over goes the same way again.
    other = opened(connect(), 2)
    found = other.take("k", ROUND).found
    assert found is not None
    assert found.kind == "error"
    assert other.take("k", ROUND).found is None
    # In a later round errors of rounds before are not given again.
    assert opened(connect(), 3).take("k", (0, 2)).found is None
    assert opened(connect(), 4).take("k", (1, 1)).found is None


def test_requests_are_shortened_in_the_middle() -> None:
    assert shortened("abc") == "abc"
    long = shortened("a" * 600 + "b" * 600)
    assert len(long) <= 1000
    assert (long[:3], long[-3:]) == ("aaa", "bbb")


# --- killed, damaged, deleted


def unreachable(path: Path, client: StateClient) -> set[str]:
    with sqlite3.connect(path) as database:
        stored = {row[0].rpartition("||")[2] for row in database.execute("SELECT key FROM state")}
    log = ThreadLog("run", key=journal_key("run"))
    head = client.run(log._load())
    reached = {log.key, *client.run(log._records(head))} if head else set()
    return {key for key in stored if key.startswith("j-")} - reached


@pytest.mark.parametrize("how", ["before", "torn", "after"])
@pytest.mark.parametrize("kind", ["no transactions", "redis"])
def test_killed_at_every_request(connect: Connect, tmp_path: Path, kind: str, how: str) -> None:
    looking = connect(kind)
    looking.run(RUNS.add("run"))
    left, recorded = 0, 0
    for number in range(60):
        epoch = number + 1
        dying = connect(kind, number, how)
        try:
            made = opened(dying, epoch)
            assert len(made.records) >= recorded
            for step in range(3):
                settle(made, f"{epoch} {step}", "x" * 12_000)
                recorded += 1
        except Killed:
            pass
        left += len(unreachable(tmp_path / "outlast.db", looking))
        repair(looking, grace=0)
        assert unreachable(tmp_path / "outlast.db", looking) == set()
        if not dying._stub.dead:
            break
    else:
        pytest.fail("never reached the end")
    assert recorded > 3
    if (kind, how) in (("no transactions", "after"), ("redis", "torn")):
        assert left, "the test sees what is left"


def test_a_damaged_journal_is_told(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    client.run(RUNS.add("run"))
    settle(opened(client, 1), "step", 1)
    with sqlite3.connect(tmp_path / "outlast.db") as database:
        database.execute("UPDATE state SET value = substr(value, 1, 20) WHERE key LIKE '%j-%-_%'")
    with pytest.raises(CorruptRecordError, match="j-"):
        opened(connect(), 2)
    (finding,) = repair(client, grace=0).left
    assert finding.kind == "damaged journal"


def test_a_journal_is_deleted(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    made = opened(client, 1)
    for number in range(40):
        settle(made, f"step {number}", "x" * 10_000)
    assert len(client.run(journal.read("run", CODEC))) == 40
    client.run(journal.remove("run"))
    assert client.run(journal.read("run", CODEC)) == []
    assert unreachable(tmp_path / "outlast.db", client) == set()


def test_an_outcome_written_twice_is_one(connect: Connect) -> None:
    """As when the acknowledgement of its commit is lost, and it is committed again."""
    made = opened(connect(), 1)
    place = made.take("k", ROUND)
    error = failing(place)
    for _ in range(2):
        made.write(error).result(10)
    made.settle(place, error, ROUND)
    again = made.take("k", ROUND)
    done = record(again, "done")
    made.write(done).result(10)
    other = opened(connect(), 2)
    assert [item.kind for item in other.records] == ["error", "result"]
    assert [other.take("k", ROUND).found.kind for _ in range(2)] == ["error", "result"]  # type: ignore[union-attr]
