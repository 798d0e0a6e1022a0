"""A writer killed at any request leaves nothing that `repair` does not find: the store's own table is looked at."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import StateClient
from outlast.checkpointer.registry import THREADS
from outlast.checkpointer.sidecar import Address
from outlast.checkpointer.thread import ThreadLog
from outlast.doctor import repair
from outlast.embedded import EmbeddedSidecar
from tests.upkeep.test_upkeep import contents, talk

pytestmark = pytest.mark.timeout(300)

Connect = Callable[..., StateClient]


class Killed(Exception):
    pass


class Dying:
    """The stub of a process that is killed at its `number`-th change: before, half-way or after it is carried out."""

    def __init__(self, stub: Any, number: int, how: str) -> None:
        self._stub = stub
        self._number = number
        self._how = how
        self._count = itertools.count()
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        def call(request: Any, **more: Any) -> Any:
            if self.dead:
                raise Killed
            changes = method in ("SaveState", "ExecuteStateTransaction", "DeleteBulkState", "DeleteState")
            if changes and next(self._count) == self._number:
                self.dead = True
                if self._how == "after":
                    getattr(self._stub, method)(request, **more)
                elif self._how == "torn" and method == "SaveState" and len(request.states) > 1:
                    # A bulk save is not atomic, and in no order.
                    kept = list(request.states)[1::2]
                    del request.states[:]
                    request.states.extend(kept)
                    getattr(self._stub, method)(request, **more)
                elif self._how == "torn" and method == "ExecuteStateTransaction":
                    # As Redis does it: the others are applied though the head is refused.
                    del request.operations[-1]
                    if request.operations:
                        getattr(self._stub, method)(request, **more)
                raise Killed
            return getattr(self._stub, method)(request, **more)

        return call


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    made: list[StateClient] = []
    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:

        def connect(kind: str = "whole", number: int = -1, how: str = "before") -> StateClient:
            client = StateClient("statestore", Address("127.0.0.1", sidecar.grpc_port))
            known = client.capabilities
            # Small values, so that packs and large values are in chunks.
            known = replace(known, quirks=replace(known.quirks, max_stored=9_000))
            if kind == "no transactions":
                known = replace(known, transactional=False)
            elif kind == "redis":
                known = replace(known, quirks=replace(known.quirks, whole=False))
            client._capabilities = known
            client._stub = Dying(client._stub, number, how)
            made.append(client)
            return client

        yield connect
        for client in made:
            client.close()


def unreachable(path: Path, client: StateClient) -> set[str]:
    """The keys in the store's table, of threads and of their registry, that nothing leads to."""
    with sqlite3.connect(path) as database:
        stored = {row[0].rpartition("||")[2] for row in database.execute("SELECT key FROM state")}
    stored = {key for key in stored if key.startswith(("t-", "g-threads-"))}
    for name in client.run(THREADS.names()):
        log = ThreadLog(name)
        head = client.run(log._load())
        if head is not None:
            stored -= {log.key, *client.run(log._records(head))}
    return stored - set(client.run(THREADS.keys()))


def leave_some(connect: Connect, path: Path, thread: str) -> set[str]:
    """Kill a writer of `thread` where that leaves records that no head reaches; return their keys."""
    looking = connect()
    for number in range(60):
        with pytest.raises(Killed):
            talk(DaprSaver(client=connect("no transactions", number, "after")), thread, 3)
        left = {key for key in unreachable(path, looking) if key.startswith("t-")}
        if left:
            return left
    raise AssertionError


def act(client: StateClient, action: str, thread: str) -> None:
    saver = DaprSaver(client=client)
    if action == "talk":
        talk(saver, thread, 2)
    elif action == "begin":
        talk(saver, f"{thread}, new", 1)
    elif action == "copy":
        saver.copy_thread(thread, f"copy of {thread}")
    elif action == "prune":
        saver.prune([thread])
    else:
        saver.delete_thread(thread)


@pytest.mark.parametrize("how", ["before", "torn", "after"])
@pytest.mark.parametrize("kind", ["whole", "no transactions", "redis"])
@pytest.mark.parametrize("action", ["talk", "begin", "copy", "prune", "delete"])
def test_killed_at_every_request(connect: Connect, tmp_path: Path, action: str, kind: str, how: str) -> None:
    path, looking = tmp_path / "outlast.db", connect(kind)
    if kind == "whole" and how == "torn":
        pytest.skip("where transactions are whole nothing is torn but what is too large for one")
    saver = DaprSaver(client=connect(kind))
    talk(saver, "other", 1)
    other = contents(saver, "other")
    left = 0
    for number in range(60):
        thread = f"{action}-{number}"
        talk(DaprSaver(client=connect(kind)), thread, 2)
        dying = connect(kind, number, how)
        try:
            act(dying, action, thread)
        except Killed:
            pass
        left += len(unreachable(path, looking))
        assert not repair(looking, grace=0).left
        assert unreachable(path, looking) == set()
        assert repair(looking, grace=0).findings == []
        assert contents(saver, "other") == other
        act(connect(kind), action, thread)
        assert unreachable(path, looking) == set()
        if not dying._stub.dead:
            break
    else:
        pytest.fail("never reached the end")
    if action != "delete" and (kind, how) in (("no transactions", "after"), ("redis", "torn")):
        assert left, "the test sees what is left"


def test_where_transactions_are_whole_no_writer_is_announced(connect: Connect) -> None:
    """It would be one request more; only where something may be left it is made."""
    for kind, announced in (("whole", False), ("no transactions", True), ("redis", True)):
        client = connect(kind)
        talk(DaprSaver(client=client), kind, 2)
        head = client.run(ThreadLog(kind).read())
        assert head is not None
        assert bool(head.writers) is announced


def test_many_writers_do_not_make_a_head_grow(connect: Connect, tmp_path: Path) -> None:
    sizes = []
    for _ in range(60):
        client = connect("no transactions")
        talk(DaprSaver(client=client), "t", 1)
        head = client.run(ThreadLog("t").read())
        assert head is not None
        sizes.append(len(head.writers))
    assert max(sizes) <= 18
    looking = connect()
    assert len(looking.run(ThreadLog("t").index.writers(head))) >= 60
    # Of the first one, too, everything is found.
    assert leave_some(connect, tmp_path / "outlast.db", "t")
    for _ in range(20):
        talk(DaprSaver(client=connect("no transactions")), "t", 1)
    assert not repair(looking, grace=0).left
    assert unreachable(tmp_path / "outlast.db", looking) == set()
    assert len(contents(DaprSaver(client=looking), "t")) >= 240


def test_a_writer_that_saves_after_its_thread_was_deleted(connect: Connect, tmp_path: Path) -> None:
    """Its records come between the deletion and its own commit; they are found behind the tombstone."""
    talk(DaprSaver(client=connect("no transactions")), "t", 1)
    late = leave_some(connect, tmp_path / "outlast.db", "t")
    looking = connect("no transactions")
    with sqlite3.connect(tmp_path / "outlast.db") as database:
        database.row_factory = sqlite3.Row
        rows = [tuple(row) for row in database.execute("SELECT * FROM state") if str(row["key"]).endswith(tuple(late))]
    assert rows
    DaprSaver(client=looking).delete_thread("t")
    assert unreachable(tmp_path / "outlast.db", looking) == set()
    with sqlite3.connect(tmp_path / "outlast.db") as database:
        database.executemany(f"INSERT INTO state VALUES ({','.join('?' * len(rows[0]))})", rows)
    assert unreachable(tmp_path / "outlast.db", looking)
    assert [finding.kind for finding in repair(looking, grace=0).findings] == ["orphans"]
    assert unreachable(tmp_path / "outlast.db", looking) == set()


def test_a_checkpoint_put_twice_leaves_nothing(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    saver = DaprSaver(client=client)
    talk(saver, "t", 1)
    found = saver.get_tuple({"configurable": {"thread_id": "t"}})
    assert found is not None
    for _ in range(3):
        saver.put(found.parent_config, found.checkpoint, {}, {})  # type: ignore[arg-type,typeddict-item]
    assert unreachable(tmp_path / "outlast.db", client) == set()
    saver.delete_thread("t")
    assert unreachable(tmp_path / "outlast.db", client) == set()
