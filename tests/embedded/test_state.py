"""Dapr's state API, through the real SDK."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

import grpc
import pytest
from dapr.aio.clients import DaprClient as AsyncDaprClient
from dapr.clients import DaprClient
from dapr.clients.exceptions import DaprGrpcError, DaprInternalError
from dapr.clients.grpc._request import TransactionalStateOperation, TransactionOperationType
from dapr.clients.grpc._state import Concurrency, Consistency, StateItem, StateOptions
from dapr.proto import api_service_v1, api_v1, common_v1

from tests.embedded.conftest import STORE, Ports

FIRST_WRITE = StateOptions(consistency=Consistency.strong, concurrency=Concurrency.first_write)
LAST_WRITE = StateOptions(consistency=Consistency.strong, concurrency=Concurrency.last_write)
MISMATCH = "possible etag mismatch. error from state store"


def code_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    return error.code(), error.details()


def upsert(key: str, data: bytes, etag: str | None = None) -> TransactionalStateOperation:
    return TransactionalStateOperation(key, data, etag, TransactionOperationType.upsert)


def test_a_missing_key_is_empty(client: DaprClient, key: str) -> None:
    response = client.get_state(STORE, key)
    assert (response.data, response.etag) == (b"", "")


@pytest.mark.parametrize("value", [b"plain", b"", bytes(range(256)), b'{"json": true}', b"x" * 3_000_000])
def test_bytes_come_back_as_they_went_in(client: DaprClient, key: str, value: bytes) -> None:
    client.save_state(STORE, key, value)
    response = client.get_state(STORE, key)
    assert response.data == value
    assert response.etag


def test_values_larger_than_grpc_would_take(ports: Ports, embedded: None, key: str) -> None:
    value = b"x" * 20_000_000
    with DaprClient(max_grpc_message_length=64 * 1024 * 1024) as client:
        client.save_state(STORE, key, value)
        assert client.get_state(STORE, key).data == value


def test_each_write_has_a_new_etag_even_after_a_delete(client: DaprClient, key: str) -> None:
    etags = []
    for _ in range(3):
        client.save_state(STORE, key, "same")
        etags.append(client.get_state(STORE, key).etag)
    client.delete_state(STORE, key)
    client.save_state(STORE, key, "same")
    etags.append(client.get_state(STORE, key).etag)
    assert len(set(etags)) == 4


@pytest.mark.parametrize("options", [FIRST_WRITE, LAST_WRITE, None], ids=["first-write", "last-write", "default"])
def test_a_stale_etag_is_refused(client: DaprClient, key: str, options: StateOptions | None) -> None:
    client.save_state(STORE, key, "one")
    stale = client.get_state(STORE, key).etag
    client.save_state(STORE, key, "two", etag=stale)
    code, text = code_of(lambda: client.save_state(STORE, key, "three", etag=stale, options=options))
    assert code == grpc.StatusCode.ABORTED
    assert text == f"failed saving state in state store {STORE}: {MISMATCH}"
    assert client.get_state(STORE, key).data == b"two"


@pytest.mark.parametrize("etag", ["not-an-etag", "1", str(uuid.uuid4())], ids=["text", "number", "uuid"])
def test_an_etag_of_a_missing_key_is_refused(client: DaprClient, key: str, etag: str) -> None:
    assert code_of(lambda: client.save_state(STORE, key, "x", etag=etag))[0] == grpc.StatusCode.ABORTED
    assert client.get_state(STORE, key).etag == ""


def test_first_write_without_an_etag_creates_once(client: DaprClient, key: str) -> None:
    client.save_state(STORE, key, "one", options=FIRST_WRITE)
    code, _ = code_of(lambda: client.save_state(STORE, key, "two", options=FIRST_WRITE))
    assert code == grpc.StatusCode.ABORTED
    assert client.get_state(STORE, key).data == b"one"
    client.save_state(STORE, key, "three", options=LAST_WRITE)
    client.save_state(STORE, key, "four")
    assert client.get_state(STORE, key).data == b"four"


def test_an_empty_etag_is_none(client: DaprClient, key: str) -> None:
    client.save_state(STORE, key, "one", etag="")
    client.save_state(STORE, key, "two", etag="")
    assert client.get_state(STORE, key).data == b"two"


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_one_of_many_creators_wins(client: DaprClient, key: str) -> None:
    wins: list[int] = []
    codes: set[grpc.StatusCode] = set()

    def create(number: int) -> None:
        try:
            client.save_state(STORE, key, str(number), options=FIRST_WRITE)
            wins.append(number)
        except grpc.RpcError as error:
            codes.add(error.code())

    in_threads(8, create)
    assert codes == {grpc.StatusCode.ABORTED}
    assert len(wins) == 1
    assert client.get_state(STORE, key).data == str(wins[0]).encode()


def test_no_update_is_lost_in_a_race(client: DaprClient, key: str) -> None:
    client.save_state(STORE, key, "0")

    def increment(_: int) -> None:
        done = 0
        while done < 10:
            now = client.get_state(STORE, key)
            try:
                client.save_state(STORE, key, str(int(now.data) + 1), etag=now.etag, options=FIRST_WRITE)
                done += 1
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.ABORTED:
                    raise

    in_threads(8, increment)
    assert client.get_state(STORE, key).data == b"80"


def test_delete(client: DaprClient, key: str) -> None:
    client.delete_state(STORE, key)  # a missing key is fine
    client.save_state(STORE, key, "one")
    code, text = code_of(lambda: client.delete_state(STORE, key, etag="stale"))
    assert code == grpc.StatusCode.ABORTED
    assert text == f"failed deleting state with key {key}: {MISMATCH}"
    client.delete_state(STORE, key, etag=client.get_state(STORE, key).etag)
    assert client.get_state(STORE, key).etag == ""
    assert code_of(lambda: client.delete_state(STORE, key, etag="gone"))[0] == grpc.StatusCode.ABORTED


def test_a_transaction_is_whole(client: DaprClient, key: str) -> None:
    client.save_state(STORE, f"{key}-a", "old")
    etag = client.get_state(STORE, f"{key}-a").etag
    client.execute_state_transaction(
        STORE,
        [
            upsert(f"{key}-a", b"new", etag),
            upsert(f"{key}-b", b"b"),
            TransactionalStateOperation(f"{key}-c", b"", operation_type=TransactionOperationType.delete),
        ],
    )
    assert [client.get_state(STORE, f"{key}-{n}").data for n in "abc"] == [b"new", b"b", b""]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_conflict_undoes_the_whole_transaction(client: DaprClient, key: str, position: int) -> None:
    operations = [upsert(f"{key}-{n}", b"x") for n in range(2)]
    operations.insert(position, upsert(f"{key}-bad", b"x", "stale"))
    code, text = code_of(lambda: client.execute_state_transaction(STORE, operations))
    assert code == grpc.StatusCode.INTERNAL
    assert text == f"error while executing state transaction: {MISMATCH}"
    assert [client.get_state(STORE, f"{key}-{n}").etag for n in (0, 1, "bad")] == ["", "", ""]


def test_a_transaction_may_name_a_key_twice(client: DaprClient, key: str) -> None:
    client.execute_state_transaction(STORE, [upsert(key, b"1"), upsert(key, b"2")])
    assert client.get_state(STORE, key).data == b"2"


def test_first_write_creates_once_in_a_transaction(stub: api_service_v1.DaprStub, key: str) -> None:
    options = common_v1.StateOptions(concurrency=common_v1.StateOptions.CONCURRENCY_FIRST_WRITE)
    operation = api_v1.TransactionalStateOperation(
        operationType="upsert", request=common_v1.StateItem(key=key, value=b"x", options=options)
    )
    request = api_v1.ExecuteStateTransactionRequest(storeName=STORE, operations=[operation])
    stub.ExecuteStateTransaction(request)
    assert code_of(lambda: stub.ExecuteStateTransaction(request))[0] == grpc.StatusCode.INTERNAL


def test_unknown_operation_and_store(stub: api_service_v1.DaprStub, client: DaprClient, key: str) -> None:
    operation = api_v1.TransactionalStateOperation(operationType="merge", request=common_v1.StateItem(key=key))
    request = api_v1.ExecuteStateTransactionRequest(storeName=STORE, operations=[operation])
    assert code_of(lambda: stub.ExecuteStateTransaction(request)) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "operation type merge not supported",
    )
    missing = (grpc.StatusCode.INVALID_ARGUMENT, "state store nope is not found")
    assert code_of(lambda: client.get_state("nope", key)) == missing
    assert code_of(lambda: client.save_state("nope", key, "x")) == missing
    assert code_of(lambda: client.delete_state("nope", key)) == missing
    assert code_of(lambda: client.execute_state_transaction("nope", [upsert(key, b"x")])) == missing
    assert code_of(lambda: client.get_bulk_state("nope", [key])) == missing


def test_keys_that_are_refused(stub: api_service_v1.DaprStub, client: DaprClient) -> None:
    refused = (grpc.StatusCode.INVALID_ARGUMENT, "input key/keyPrefix 'a||b' can't contain '||'")
    assert code_of(lambda: client.get_state(STORE, "a||b")) == refused
    assert code_of(lambda: client.save_state(STORE, "a||b", "x")) == refused
    empty = api_v1.SaveStateRequest(store_name=STORE, states=[common_v1.StateItem(key="", value=b"x")])
    assert code_of(lambda: stub.SaveState(empty)) == (grpc.StatusCode.INVALID_ARGUMENT, "state key cannot be empty")


def test_errors_carry_the_codes_the_sdk_shows(client: DaprClient, key: str) -> None:
    def reason(call: Callable[[], object]) -> str:
        with pytest.raises(DaprGrpcError) as caught:
            call()
        return str(caught.value.error_code())

    assert reason(lambda: client.save_state(STORE, key, "x", etag="stale")) == "ERR_STATE_SAVE"
    assert reason(lambda: client.delete_state(STORE, key, etag="stale")) == "ERR_STATE_DELETE"
    assert reason(lambda: client.get_state("nope", key)) == "DAPR_STATE_NOT_FOUND"
    assert reason(lambda: client.get_state(STORE, "a||b")) == "DAPR_STATE_ILLEGAL_KEY"
    stale = [upsert(key, b"x", "stale")]
    assert reason(lambda: client.execute_state_transaction(STORE, stale)) == "ERR_STATE_TRANSACTION"


@pytest.mark.parametrize("key_form", ["a b", "ümläut/é", "x" * 2000, "quote'\"", "100%"])
def test_unusual_keys(client: DaprClient, key: str, key_form: str) -> None:
    client.save_state(STORE, key + key_form, "v")
    assert client.get_state(STORE, key + key_form).data == b"v"
    assert client.get_state(STORE, (key + key_form).upper()).etag == ""


def test_values_expire(client: DaprClient, key: str) -> None:
    client.save_state(STORE, key, "short", state_metadata={"ttlInSeconds": "1"})
    client.save_state(STORE, f"{key}-long", "long", state_metadata={"ttlInSeconds": "100"})
    client.save_state(STORE, f"{key}-ever", "ever", state_metadata={"ttlInSeconds": "-1"})
    with_ttl = api_expiry(client, f"{key}-long")
    assert 90 < with_ttl - time.time() <= 101
    assert client.get_state(STORE, key).data == b"short"
    time.sleep(2.1)
    assert client.get_state(STORE, key).etag == ""
    assert client.get_bulk_state(STORE, [key]).items[0].data == b""
    client.save_state(STORE, key, "again", options=FIRST_WRITE)  # an expired key is an absent key
    assert client.get_state(STORE, key).data == b"again"
    time.sleep(0.01)
    assert client.get_state(STORE, f"{key}-ever").data == b"ever"


def api_expiry(client: DaprClient, key: str) -> float:
    from datetime import datetime

    request = api_v1.GetStateRequest(store_name=STORE, key=key)
    text = client._stub.GetState(request).metadata["ttlExpireTime"]
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def test_writing_again_without_a_ttl_keeps_the_value(client: DaprClient, key: str) -> None:
    client.save_state(STORE, key, "short", state_metadata={"ttlInSeconds": "1"})
    client.save_state(STORE, key, "kept")
    time.sleep(2.1)
    assert client.get_state(STORE, key).data == b"kept"


@pytest.mark.parametrize("ttl", ["soon", "-2"])
def test_a_ttl_that_is_no_number_is_refused(client: DaprClient, key: str, ttl: str) -> None:
    code, _ = code_of(lambda: client.save_state(STORE, key, "x", state_metadata={"ttlInSeconds": ttl}))
    assert code == grpc.StatusCode.INTERNAL
    assert client.get_state(STORE, key).etag == ""


def test_bulk_get(client: DaprClient, key: str) -> None:
    client.save_bulk_state(STORE, [StateItem(key=f"{key}-{n}", value=str(n)) for n in range(5)])
    items = client.get_bulk_state(STORE, [f"{key}-{n}" for n in range(7)]).items
    assert {item.key: item.data for item in items} == {
        f"{key}-{n}": (str(n).encode() if n < 5 else b"") for n in range(7)
    }
    assert all(bool(item.etag) == bool(item.data) for item in items)


def test_a_bulk_save_writes_what_does_not_conflict(client: DaprClient, key: str) -> None:
    items = [StateItem(key=f"{key}-{n}", value="v") for n in range(3)]
    items[1] = StateItem(key=f"{key}-1", value="v", etag="stale")
    code, _ = code_of(lambda: client.save_bulk_state(STORE, items))
    assert code == grpc.StatusCode.ABORTED
    assert [client.get_state(STORE, f"{key}-{n}").data for n in range(3)] == [b"v", b"", b"v"]


def test_bulk_delete(stub: api_service_v1.DaprStub, client: DaprClient, key: str) -> None:
    client.save_bulk_state(STORE, [StateItem(key=f"{key}-{n}", value="v") for n in range(3)])
    states = [common_v1.StateItem(key=f"{key}-{n}") for n in range(2)]
    stub.DeleteBulkState(api_v1.DeleteBulkStateRequest(store_name=STORE, states=states))
    assert [client.get_state(STORE, f"{key}-{n}").data for n in range(3)] == [b"", b"", b"v"]


def test_metadata_names_the_store(client: DaprClient, ports: Ports) -> None:
    metadata = client.get_metadata()
    store = next(c for c in metadata.registered_components if c.name == STORE)
    assert {"ETAG", "TRANSACTIONAL", "TTL", "ACTOR"} <= set(store.capabilities)
    assert ("outlast.embedded" in metadata.extended_metadata) == ports.embedded


def test_what_is_not_served_says_what_to_do(client: DaprClient, embedded: None) -> None:
    code, text = code_of(lambda: client.publish_event("pubsub", "topic", b"x"))
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert "run a real daprd" in text


async def test_the_async_client(ports: Ports, key: str) -> None:
    async with AsyncDaprClient() as client:
        await client.save_state(STORE, key, "one", options=FIRST_WRITE)
        first = await client.get_state(STORE, key)
        await client.save_state(STORE, key, "two", etag=first.etag)
        with pytest.raises(DaprInternalError) as caught:
            await client.save_state(STORE, key, "three", etag=first.etag)
        cause = caught.value.__cause__
        assert isinstance(cause, grpc.aio.AioRpcError)
        assert cause.code() == grpc.StatusCode.ABORTED
        await client.execute_state_transaction(STORE, [upsert(f"{key}-t", b"t")])
        items = (await client.get_bulk_state(STORE, [key, f"{key}-t"])).items
        assert {item.data for item in items} == {b"two", b"t"}
        await client.delete_state(STORE, key)
        assert (await client.get_state(STORE, key)).data == b""
