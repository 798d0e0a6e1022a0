"""The state store seen through the sidecar: operations as values, one sync and one async driver for them.

Everything above writes generators that yield operations and get back results; nothing above knows gRPC. The two drivers
below are all the code that is written twice.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import binascii
import hashlib
import logging
import re
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import grpc
from dapr.conf import settings
from dapr.proto import api_service_v1, api_v1, common_v1

from outlast.checkpointer import quirks, records
from outlast.checkpointer.sidecar import Address, locate
from outlast.errors import (
    RecordTooLargeError,
    SidecarUnavailableError,
    StoreError,
    StoreNotFoundError,
    UnsupportedStoreError,
)

logger = logging.getLogger("outlast.store")

T = TypeVar("T")

Guarantee = Literal["exactly-once", "at-least-once"]
"""What a store must be able to promise: see `StateClient`."""

_FIRST_WRITE: Final = common_v1.StateOptions(concurrency=common_v1.StateOptions.CONCURRENCY_FIRST_WRITE)
_OUTAGE: Final = 30.0
"""Seconds for which a sidecar that has answered before may be away, as when it is restarted."""
_FIRST_CONTACT: Final = 5.0
"""Seconds for which a sidecar that has never answered is waited for."""
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.initial_reconnect_backoff_ms", 50),
)


@dataclass(frozen=True)
class Item:
    """A value read from the store. `data` is empty where there is none; `etag` is what a swap must show."""

    data: bytes = b""
    etag: str = ""


@dataclass(frozen=True)
class Get:
    """Read `keys`; the result is a `dict[str, Item]` that has all of them."""

    keys: Sequence[str]


@dataclass(frozen=True)
class Save:
    """Write `records`, whose keys nobody else writes. The result is None."""

    records: Sequence[tuple[str, bytes]]
    ttl: int | None = None


@dataclass(frozen=True)
class Create:
    """Write `value` at `key` if nothing is there. The result is False where something was, or where that is unclear."""

    key: str
    value: bytes


@dataclass(frozen=True)
class Swap:
    """Write `records`, then `value` at `key` if its ETag still is `etag`.

    The result is False where it no longer is, or where that is unclear: read the key back and look.
    """

    key: str
    value: bytes
    etag: str
    records: Sequence[tuple[str, bytes]] = ()


@dataclass(frozen=True)
class Whole:
    """Tell, without asking the store, whether a swap would be carried out whole or not at all. The result is a bool."""

    swap: Swap


@dataclass(frozen=True)
class Delete:
    """Remove `keys`, whether they are there or not. The result is None."""

    keys: Sequence[str]


@dataclass(frozen=True)
class Pause:
    """Wait for `seconds`. The result is None."""

    seconds: float


Operation = Get | Save | Create | Swap | Whole | Delete | Pause
Steps = Generator[Operation, Any, T]
"""A rule, written sans I/O: yields operations, is sent their results, returns a `T`."""


@dataclass(frozen=True)
class Capabilities:
    """What the sidecar says of a state store component, corrected by what is known of its kind.

    Attributes:
        guarantee: What the store really gives, whatever less was asked for.
        etags: Whether it has ETags, sound ones or not.
    """

    component_type: str
    version: str
    transactional: bool
    ttl: bool
    quirks: quirks.Quirks
    guarantee: Guarantee = "exactly-once"
    etags: bool = True


_Calls = Generator[tuple[str, Any], Any, T]
"""An operation as requests: yields a method and its request, is sent the reply or the error, returns the result."""
_WAIT: Final = "wait"
"""In place of a method: the request is a number of seconds to sleep."""
_WARNED: Final[set[tuple[str, str]]] = set()
"""Stores of which this process has said what they do not give."""
_BULK: Final = 50
_BULK_READ: Final = 100
_CHUNK: Final = re.compile(r"-c\d+$")


class StateClient:
    """One state store component behind one sidecar. Safe to use from any thread and any event loop.

    Args:
        store: Name of the state store component.
        address: The sidecar; found in the environment, or started embedded, if not given.
        guarantee: What the store must be able to promise. `exactly-once` refuses one without a sound compare-and-swap.
            `at-least-once` takes any: where there is no compare-and-swap, a head is compared and then written in two
            requests, which is right with one writer at a time only; two at once may lose what one of them wrote.
    """

    def __init__(self, store: str, address: Address | None = None, *, guarantee: Guarantee = "exactly-once") -> None:
        if guarantee not in ("exactly-once", "at-least-once"):
            raise ValueError(f"unknown guarantee {guarantee!r}: use 'exactly-once' or 'at-least-once'")
        self.store = store
        self.guarantee: Guarantee = guarantee
        self.address = address or locate()
        self._metadata = (("dapr-api-token", settings.DAPR_API_TOKEN),) if settings.DAPR_API_TOKEN else ()
        self._lock = threading.Lock()
        self._capabilities: Capabilities | None = None
        self._channel = self._open(grpc)
        self._stub = api_service_v1.DaprStub(self._channel)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()
        # Before an embedded sidecar stops, which was started earlier: gRPC would write about it to stderr.
        atexit.register(_close, weakref.ref(self))

    def _open(self, kind: Any) -> Any:
        if self.address.tls:
            return kind.secure_channel(self.address.target, grpc.ssl_channel_credentials(), options=_CHANNEL_OPTIONS)
        return kind.insecure_channel(self.address.target, options=_CHANNEL_OPTIONS)

    def _async_stub(self) -> Any:
        loop = asyncio.get_running_loop()
        stub = self._loops.get(loop)
        if stub is None:
            stub = self._loops[loop] = api_service_v1.DaprStub(self._open(grpc.aio))
        return stub

    # --- the two drivers

    def run(self, steps: Steps[T]) -> T:
        """Carry `steps` out and return what they return. Blocks."""
        try:
            operation = next(steps)
            while True:
                try:
                    result = self._perform(operation)
                except Exception as error:
                    operation = steps.throw(error)
                else:
                    operation = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    async def arun(self, steps: Steps[T]) -> T:
        """Carry `steps` out and return what they return, on the running event loop."""
        try:
            operation = next(steps)
            while True:
                try:
                    result = await self._aperform(operation)
                except Exception as error:
                    operation = steps.throw(error)
                else:
                    operation = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def _perform(self, operation: Operation) -> Any:
        if isinstance(operation, Pause):
            return time.sleep(operation.seconds)
        calls = self._calls(operation)
        try:
            method, request = next(calls)
            while True:
                if method == _WAIT:
                    time.sleep(request)
                    method, request = calls.send(None)
                    continue
                started = time.monotonic()
                delay = 0.05
                while True:
                    try:
                        reply: Any = getattr(self._stub, method)(request, metadata=self._metadata)
                    except grpc.RpcError as error:
                        if error.code() == grpc.StatusCode.UNAVAILABLE and time.monotonic() - started < self._patience:
                            time.sleep(delay)
                            delay = min(delay * 2, 1.0)
                            continue
                        reply = error
                    break
                method, request = calls.send(reply)
        except StopIteration as stop:
            return stop.value

    async def _aperform(self, operation: Operation) -> Any:
        if isinstance(operation, Pause):
            return await asyncio.sleep(operation.seconds)
        stub = self._async_stub()
        calls = self._calls(operation)
        try:
            method, request = next(calls)
            while True:
                if method == _WAIT:
                    await asyncio.sleep(request)
                    method, request = calls.send(None)
                    continue
                started = time.monotonic()
                delay = 0.05
                while True:
                    try:
                        reply: Any = await getattr(stub, method)(request, metadata=self._metadata)
                    except grpc.RpcError as error:
                        if error.code() == grpc.StatusCode.UNAVAILABLE and time.monotonic() - started < self._patience:
                            await asyncio.sleep(delay)
                            delay = min(delay * 2, 1.0)
                            continue
                        reply = error
                    break
                method, request = calls.send(reply)
        except StopIteration as stop:
            return stop.value

    @property
    def _patience(self) -> float:
        return _OUTAGE if self._capabilities else _FIRST_CONTACT

    # --- operations as gRPC calls: yields (method, request), is sent the reply or the RpcError

    def _calls(self, operation: Operation) -> _Calls[Any]:
        if self._capabilities is None:
            yield from self._discover()
        match operation:
            case Get():
                return (yield from self._get(list(operation.keys)))
            case Save():
                self._refuse_too_large(operation.records)
                yield from self._save(operation.records, operation.ttl)
            case Create():
                self._refuse_too_large([(operation.key, operation.value)])
                return (yield from self._create(operation))
            case Swap():
                self._refuse_too_large([*operation.records, (operation.key, operation.value)])
                return (yield from self._swap(operation))
            case Whole():
                return self.capabilities.quirks.whole and self._in_one(operation.swap)
            case Delete():
                for start in range(0, len(operation.keys), 100):
                    yield from self._delete(operation.keys[start : start + 100])
        return None

    # The form in which values are stored is known here and nowhere else.

    def _stored(self, data: bytes) -> bytes:
        return base64.b64encode(data) if self.capabilities.quirks.text else data

    def _item(self, data: bytes, etag: str) -> Item:
        if data and self.capabilities.quirks.text:
            try:
                data = base64.b64decode(data, validate=True)
            except binascii.Error:
                pass  # not ours: whoever decodes the record says so
        if not data:
            return Item()
        if not self.capabilities.etags:
            # What a compare in place of a compare-and-swap goes by.
            etag = hashlib.sha256(data).hexdigest()
        return Item(data, etag)

    def _refuse_too_large(self, pairs: Sequence[tuple[str, bytes]]) -> None:
        limit = self.capabilities.quirks.max_value
        for key, value in pairs:
            if len(value) > limit:
                raise RecordTooLargeError(
                    f"record {key!r} has {len(value)} bytes, {self.capabilities.component_type} takes {limit}; "
                    "nothing was written. Use a state store with larger values, such as state.postgresql"
                )

    def _get(self, keys: list[str]) -> _Calls[dict[str, Item]]:
        if len(keys) == 1:
            return {keys[0]: (yield from self._get_one(keys[0]))}
        known = self.capabilities.quirks
        found: dict[str, Item] = {}
        batches = list(_by_size(keys, known))
        while batches:
            batch = batches.pop()
            reply = yield (
                "GetBulkState",
                api_v1.state_pb2.GetBulkStateRequest(store_name=self.store, keys=batch, parallelism=10),
            )
            if _code(reply) == grpc.StatusCode.RESOURCE_EXHAUSTED and len(batch) > 1:
                # The reply outgrew the sidecar's message limit: ask for half as much.
                batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            self._check(reply)
            for item in reply.items:
                if item.error and not (known.absent and known.absent in item.error):
                    raise StoreError(f"state store {self.store!r} could not read {item.key!r}: {item.error}")
                found[item.key] = self._item(item.data, item.etag)
        if known.strong_reads:
            # A bulk read has no consistency to ask for: what it does not see may be there all the same.
            for key in keys:
                if key not in found or not found[key].data:
                    found[key] = yield from self._get_one(key)
        return {key: found.get(key, Item()) for key in keys}

    def _get_one(self, key: str) -> _Calls[Item]:
        known = self.capabilities.quirks
        options = common_v1.StateOptions
        consistency = options.CONSISTENCY_STRONG if known.strong_reads else options.CONSISTENCY_UNSPECIFIED
        reply = yield (
            "GetState",
            api_v1.state_pb2.GetStateRequest(store_name=self.store, key=key, consistency=consistency),
        )
        if known.absent and isinstance(reply, grpc.RpcError) and known.absent in (reply.details() or ""):
            return Item()
        self._check(reply)
        return self._item(reply.data, reply.etag)

    def _save(self, pairs: Sequence[tuple[str, bytes]], ttl: int | None = None) -> _Calls[None]:
        capabilities = self.capabilities
        metadata = {"ttlInSeconds": str(max(ttl, capabilities.quirks.min_ttl))} if ttl and capabilities.ttl else {}
        batch: list[Any] = []
        size = 0
        depth = 0
        for key, value in pairs:
            data = self._stored(value)
            # Small batches: a bulk save is not atomic and some components run it unbounded in parallel. What names
            # other records is there before them, so that they can be found if this is cut short.
            full = len(batch) >= _BULK or size + len(data) > quirks.MAX_MESSAGE - 500_000
            if batch and (full or records.depth(key) != depth):
                yield from self._save_batch(batch)
                batch, size = [], 0
            depth = records.depth(key)
            batch.append(common_v1.StateItem(key=key, value=data, metadata=metadata))
            size += len(data)
        if batch:
            yield from self._save_batch(batch)

    def _save_batch(self, items: list[Any]) -> _Calls[None]:
        reply = yield "SaveState", self._save_request(items)
        if _code(reply) in (None, *_REFUSED) or len(items) == 1:
            return self._check(reply)
        # Some of it may be there, and no answer says which. Nobody else writes these keys: write them again.
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            yield from self._save_batch(half)

    def _save_request(self, items: list[Any]) -> Any:
        return api_v1.state_pb2.SaveStateRequest(store_name=self.store, states=items)

    def _delete(self, keys: Sequence[str]) -> _Calls[None]:
        states = [common_v1.StateItem(key=key) for key in keys]
        reply = yield (
            "DeleteBulkState",
            api_v1.state_pb2.DeleteBulkStateRequest(store_name=self.store, states=states),
        )
        if _code(reply) in (None, *_REFUSED):
            return self._check(reply)
        # Some components fail on a key that is not there, and then it is not said what became of the others.
        for key in keys:
            if (yield from self._get_one(key)).data:
                reply = yield "DeleteState", api_v1.state_pb2.DeleteStateRequest(store_name=self.store, key=key)
                if _code(reply) is not None and (yield from self._get_one(key)).data:
                    self._check(reply)

    def _create(self, operation: Create) -> _Calls[bool]:
        capabilities = self.capabilities
        known = capabilities.quirks
        value = self._stored(operation.value)
        if capabilities.guarantee != "exactly-once":
            if (yield from self._get_one(operation.key)).data:
                return False
            self._check((yield "SaveState", self._save_request([_plain(operation.key, value)])))
            return True
        if known.create == "etag":
            item = _conditional(operation.key, value, known.no_etag)
        else:
            item = common_v1.StateItem(key=operation.key, value=value, options=_FIRST_WRITE)
        if known.create == "settle":
            if (yield from self._get_one(operation.key)).data:
                return False
            yield "SaveState", self._save_request([item])
            # Whoever saw nothing there before this was written has written by then.
            yield _WAIT, quirks.SETTLE
            return (yield from self._get_one(operation.key)).data == operation.value
        return self._settled((yield "SaveState", self._save_request([item])))

    def _swap(self, operation: Swap) -> _Calls[bool]:
        capabilities = self.capabilities
        value = self._stored(operation.value)
        if not capabilities.etags:
            if (yield from self._get_one(operation.key)).etag != operation.etag:
                return False
            yield from self._save(operation.records)
            self._check((yield "SaveState", self._save_request([_plain(operation.key, value)])))
            return True
        head = _conditional(operation.key, value, operation.etag)
        pairs = operation.records
        if not (pairs and self._in_one(operation)):
            yield from self._save(pairs)
            return self._settled((yield "SaveState", self._save_request([head])))
        items = [_plain(key, self._stored(data)) for key, data in pairs]
        reply = yield (
            "ExecuteStateTransaction",
            api_v1.state_pb2.ExecuteStateTransactionRequest(
                storeName=self.store,
                operations=[
                    api_v1.state_pb2.TransactionalStateOperation(operationType="upsert", request=item)
                    for item in (*items, head)
                ],
            ),
        )
        return self._settled(reply)

    def _in_one(self, swap: Swap) -> bool:
        """Tell whether a swap goes out as one transaction."""
        capabilities = self.capabilities
        known = capabilities.quirks
        if not (capabilities.etags and capabilities.transactional):
            return False
        size = sum(len(data) for _, data in swap.records) * (4 if known.text else 3) // 3 + len(swap.value)
        return size < known.max_transaction and len(swap.records) < known.max_operations

    def _settled(self, reply: Any) -> bool:
        """Tell whether a conditional write went through; components differ in how they say that it did not."""
        code = _code(reply)
        if code is None:
            return True
        if code in _REFUSED or code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._check(reply)
        logger.debug("conditional write not acknowledged: %s", code)
        return False

    # --- what the sidecar has

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do; asks the sidecar once.

        Raises:
            SidecarUnavailableError: If no sidecar answers.
            StoreNotFoundError: If the sidecar has no such component.
            UnsupportedStoreError: If the component cannot compare-and-swap and `guarantee` insists on it.
        """
        if self._capabilities is None:
            self._perform(Delete(()))
        assert self._capabilities is not None
        return self._capabilities

    def _discover(self) -> _Calls[None]:
        reply = yield "GetMetadata", api_v1.metadata_pb2.GetMetadataRequest()
        self._check(reply)
        stores = {c.name: c for c in reply.registered_components if c.type.startswith("state.")}
        if self.store not in stores:
            raise StoreNotFoundError(
                f"the {self.address} has no state store {self.store!r}; it has "
                f"{', '.join(map(repr, sorted(stores))) or 'none'}: use one of those names, "
                "or add the component's YAML to the sidecar's resources"
            )
        component = stores[self.store]
        known = quirks.of(component.type, component.version)
        etags = "ETAG" in component.capabilities
        sound = etags and known.sound_cas
        why = known.why if etags or not known.sound_cas else "it has no ETags"
        if not sound and self.guarantee == "exactly-once":
            raise UnsupportedStoreError(
                f"state store {self.store!r} ({component.type}) cannot hold exactly-once state: "
                f"{why}. Choose a component with optimistic concurrency, such as "
                "state.postgresql, state.redis, state.sqlite, state.mysql or state.mongodb; or, if only one process "
                'at a time ever writes to a thread, ask for guarantee="at-least-once"'
            )
        first = (self.address.target, self.store) not in _WARNED
        if not sound and first:
            logger.warning(
                "state store %r (%s) gives at-least-once only: %s. Two processes that write to one thread at the same "
                "time may lose what one of them wrote",
                self.store,
                component.type,
                why,
            )
        elif known.create == "settle" and first:
            logger.warning(
                "state store %r (%s): %s. Two processes that create one thread within %s s of each other are kept "
                "apart only while none of them is held up for longer than that",
                self.store,
                component.type,
                known.why,
                quirks.SETTLE,
            )
        _WARNED.add((self.address.target, self.store))
        self._capabilities = Capabilities(
            component_type=component.type,
            version=component.version,
            transactional="TRANSACTIONAL" in component.capabilities and known.transactions,
            ttl="TTL" in component.capabilities and known.ttl,
            quirks=known,
            guarantee="exactly-once" if sound else "at-least-once",
            etags=etags,
        )

    def _check(self, reply: Any) -> None:
        code = _code(reply)
        if code is None:
            return
        details = reply.details() or ""
        if code == grpc.StatusCode.UNAVAILABLE:
            raise SidecarUnavailableError(
                f"no answer from the {self.address}: {details}. Start it (`dapr run …`, `outlast sidecar`), "
                "or unset DAPR_GRPC_PORT and DAPR_GRPC_ENDPOINT to use the embedded one"
            ) from reply
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise RecordTooLargeError(
                f"the {self.address} refused a message as too large: {details}. Start daprd with a larger "
                "--max-body-size, or keep large values out of the agent's state"
            ) from reply
        if "state store" in details and ("not found" in details or "not configured" in details):
            raise StoreNotFoundError(f"the {self.address} has no state store {self.store!r}: {details}") from reply
        raise StoreError(f"state store {self.store!r} at the {self.address}: {code.name}: {details}") from reply

    def close(self) -> None:
        """Close the connection of the sync driver; those of event loops end with their loops."""
        self._channel.close()


def _close(reference: weakref.ref[StateClient]) -> None:
    client = reference()
    if client is not None:
        client.close()


_REFUSED: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)


def _plain(key: str, value: bytes) -> Any:
    return common_v1.StateItem(key=key, value=value)


def _conditional(key: str, value: bytes, etag: str) -> Any:
    return common_v1.StateItem(key=key, value=value, etag=common_v1.Etag(value=etag), options=_FIRST_WRITE)


def _by_size(keys: Sequence[str], known: quirks.Quirks) -> Iterator[list[str]]:
    """Cut `keys` into bulk reads. Chunks are as large as the store takes, so only a few of them fit in a reply."""
    few = max(1, (quirks.MAX_MESSAGE - 500_000) // known.max_stored)
    batch: list[str] = []
    for key in keys:
        chunks = bool(_CHUNK.search(key))
        if len(batch) >= (few if chunks else _BULK_READ) or (batch and bool(_CHUNK.search(batch[0])) != chunks):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _code(reply: Any) -> grpc.StatusCode | None:
    return reply.code() if isinstance(reply, grpc.RpcError) else None


def load(keys: Sequence[str]) -> Steps[dict[str, bytes]]:
    """Read records by key, put together where they are stored in chunks. Absent ones are left out."""
    if not keys:
        return {}
    items: dict[str, Item] = yield Get(keys)
    parts = {key: records.chunk_keys(key, item.data) for key, item in items.items()}
    wanted = [name for names in parts.values() for name in names]
    chunks: dict[str, Item] = (yield Get(wanted)) if wanted else {}
    found: dict[str, bytes] = {}
    for key, item in items.items():
        if parts[key]:
            found[key] = records.join(key, item.data, {name: chunks[name].data for name in parts[key]})
        elif item.data:
            found[key] = item.data
    return found
