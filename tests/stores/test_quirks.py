"""Measures each row of the quirks table on the real component, through Dapr's own API; the table must not promise more.

What was measured goes into `results.json`, and from there into `docs/stores.md`.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from dapr.proto import api_service_v1, api_v1, common_v1

from outlast.checkpointer.client import Create, Get, Item, StateClient, Swap
from outlast.checkpointer.quirks import Quirks
from outlast.errors import RecordTooLargeError
from tests.harness.daprd import STATE_STORE
from tests.stores.conftest import Running

pytestmark = pytest.mark.timeout(300)
_FIRST_WRITE = common_v1.StateOptions(concurrency=common_v1.StateOptions.CONCURRENCY_FIRST_WRITE)


class Api:
    """Dapr's state API, without anything of outlast."""

    def __init__(self, running: Running) -> None:
        self._channel = grpc.insecure_channel(running.address.target)
        self._stub = api_service_v1.DaprStub(self._channel)

    def get(self, key: str) -> tuple[bytes, str]:
        reply = self._stub.GetState(api_v1.state_pb2.GetStateRequest(store_name=STATE_STORE, key=key))
        return reply.data, reply.etag

    def save(self, key: str, value: bytes, etag: str | None = None, first: bool = False) -> bool:
        item = common_v1.StateItem(key=key, value=value)
        if etag is not None:
            item.etag.value = etag
        if first or etag is not None:
            item.options.CopyFrom(_FIRST_WRITE)
        return self._sent("SaveState", api_v1.state_pb2.SaveStateRequest(store_name=STATE_STORE, states=[item]))

    def transact(self, items: list[Any]) -> bool:
        operations = [
            api_v1.state_pb2.TransactionalStateOperation(operationType="upsert", request=item) for item in items
        ]
        request = api_v1.state_pb2.ExecuteStateTransactionRequest(storeName=STATE_STORE, operations=operations)
        return self._sent("ExecuteStateTransaction", request)

    def _sent(self, method: str, request: Any) -> bool:
        try:
            getattr(self._stub, method)(request)
        except grpc.RpcError:
            return False
        return True

    def close(self) -> None:
        self._channel.close()


@pytest.fixture
def api(running: Running) -> Iterator[Api]:
    api = Api(running)
    yield api
    api.close()


@pytest.fixture
def quirks(running: Running) -> Quirks:
    return running.client().capabilities.quirks


def key() -> str:
    return f"q-{secrets.token_hex(8)}"


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """Call `act` on as many threads at the same instant."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(number: int) -> None:
        barrier.wait()
        results[number] = act(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_no_acknowledged_swap_is_lost(running: Running) -> None:
    """Eight writers increment a counter ten times each by compare-and-swap."""
    name = key()
    clients = [running.client() for _ in range(8)]
    clients[0].run(_one(Create(name, b"OL0")))

    def count(number: int) -> None:
        done = 0
        while done < 10:
            item: Item = clients[number].run(_one(Get((name,))))[name]
            done += clients[number].run(_one(Swap(name, b"OL%d" % (int(item.data[2:]) + 1), item.etag)))

    at_once(8, count)
    total = int(clients[0].run(_one(Get((name,))))[name].data[2:])
    running.measured["swaps_kept_of_80"] = total
    assert total == 80 or not running.store.sound


def _one(operation: Any) -> Any:
    return (yield operation)


def test_one_creator_wins(running: Running) -> None:
    """Eight writers create the same absent key at once, five times, in the way the table names."""
    most = 0
    for _ in range(5):
        name = key()
        clients = [running.client() for _ in range(8)]
        for client in clients:
            client.capabilities  # noqa: B018

        def create(number: int, name: str = name, clients: list[StateClient] = clients) -> bool:
            made: bool = clients[number].run(_one(Create(name, b"OL%d" % number)))
            return made

        made = at_once(8, create)
        most = max(most, sum(made))
        if running.store.sound:
            item: Item = clients[0].run(_one(Get((name,))))[name]
            assert sum(made) == 1
            assert made[int(item.data[2:])]
    running.measured["creators_that_won_of_8"] = most


def test_a_put_if_absent_of_daprs_own(running: Running, api: Api, quirks: Quirks) -> None:
    """What a first-write without ETag does on a key that is there: the reason for `create`."""
    name = key()
    api.save(name, b"OLDER", first=True)
    refused = not api.save(name, b"NEWER", first=True)
    running.measured["first_write_refused"] = refused
    if running.store.sound and quirks.create == "first-write":
        assert refused
        assert api.get(name)[0] == b"OLDER"


def test_a_stale_etag_is_refused(running: Running, api: Api) -> None:
    name = key()
    api.save(name, b"OL1")
    _, etag = api.get(name)
    api.save(name, b"OL2", etag)
    refused = bool(etag) and not api.save(name, b"OL3", etag)
    running.measured["stale_etag_refused"] = refused
    if running.store.sound:
        assert refused
        assert api.get(name)[0] == b"OL2"


def test_what_a_refused_transaction_leaves(running: Running, api: Api, quirks: Quirks) -> None:
    """Whether the other operations of a transaction with a bad ETag are applied; if so, writers must be announced."""
    if not running.client().capabilities.transactional:
        pytest.skip("no transactions")
    head, others = key(), [key() for _ in range(5)]
    api.save(head, b"OL1")
    _, etag = api.get(head)
    assert api.save(head, b"OL2", etag)
    items = [common_v1.StateItem(key=name, value=b"OLx") for name in others]
    bad = common_v1.StateItem(key=head, value=b"OL3", etag=common_v1.Etag(value=etag), options=_FIRST_WRITE)
    assert not api.transact([*items, bad])
    assert api.get(head)[0] == b"OL2"
    whole = not any(api.get(name)[0] for name in others)
    running.measured["transaction_whole"] = whole
    assert whole or not quirks.whole


def test_the_largest_transaction(running: Running, api: Api, quirks: Quirks) -> None:
    if not running.client().capabilities.transactional:
        pytest.skip("no transactions")
    few = min(quirks.max_operations, 1000)
    assert api.transact([common_v1.StateItem(key=key(), value=b"OL") for _ in range(few)])
    part = min(quirks.max_stored, 200_000)
    many = quirks.max_transaction // part
    assert api.transact([common_v1.StateItem(key=key(), value=b"x" * (part - 200)) for _ in range(max(1, many))])


def test_values_come_back_as_they_went_in(running: Running, quirks: Quirks) -> None:
    """All bytes, and the largest value, at one key: encoded where the table says so."""
    client = running.client()
    for value in (b"OL" + bytes(range(256)) * 4, b"OL" + secrets.token_bytes(quirks.max_value - 2)):
        name = key()
        assert client.run(_one(Create(name, value)))
        assert client.run(_one(Get((name,))))[name].data == value


def test_raw_bytes(running: Running, api: Api, quirks: Quirks) -> None:
    """Whether bytes that are no text survive as they are: the reason for `text`."""
    name, value = key(), b"OL" + bytes(range(256))
    exact = api.save(name, value) and api.get(name)[0] == value
    running.measured["raw_bytes"] = exact
    assert exact or quirks.text


def test_what_is_too_large_is_refused_before_anything_is_written(running: Running, quirks: Quirks) -> None:
    client, head, record = running.client(), key(), key()
    assert client.run(_one(Create(head, b"OL1")))
    item: Item = client.run(_one(Get((head,))))[head]
    with pytest.raises(RecordTooLargeError, match=head):
        client.run(_one(Swap(head, b"x" * (quirks.max_value + 1), item.etag, [(record, b"OLrecord")])))
    assert not client.run(_one(Get((record,))))[record].data
    assert client.run(_one(Get((head,))))[head].data == b"OL1"
