"""Operations as requests of Dapr's state API, and what each kind of component needs to be asked instead. Sans I/O."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import grpc
from dapr.proto import api_v1, common_v1

from outlast.checkpointer import quirks, records
from outlast.checkpointer.operations import Create, Delete, Get, Item, Operation, Pause, Save, Swap, Whole
from outlast.errors import RecordTooLargeError, StoreError

logger = logging.getLogger("outlast.store")

T = TypeVar("T")

Guarantee = Literal["exactly-once", "at-least-once"]
"""What a store must be able to promise: see `StateClient`."""

Request = tuple[str, Any]
"""A method of the sidecar's API and its request."""
Calls = Generator[Request | Pause, Any, T]
"""An operation under way: yields requests, is sent the reply or the error of each; and pauses. Returns the result."""

_FIRST_WRITE: Final = common_v1.StateOptions(concurrency=common_v1.StateOptions.CONCURRENCY_FIRST_WRITE)
_BULK: Final = 50
_BULK_READ: Final = 100
_CHUNK: Final = re.compile(r"-c\d+$")


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


class Wire:
    """Turns operations on one store into requests.

    Args:
        store: Name of the state store component.
        capabilities: What it can do.
        check: Raises what an error stands for; does nothing for a reply.
    """

    def __init__(self, store: str, capabilities: Capabilities, check: Callable[[Any], None]) -> None:
        self.store = store
        self.capabilities = capabilities
        self._check = check

    def calls(self, operation: Operation) -> Calls[Any]:
        """Carry out an operation and return its result."""
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

    def _get(self, keys: list[str]) -> Calls[dict[str, Item]]:
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
            if code_of(reply) == grpc.StatusCode.RESOURCE_EXHAUSTED and len(batch) > 1:
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

    def _get_one(self, key: str) -> Calls[Item]:
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

    def _save(self, pairs: Sequence[tuple[str, bytes]], ttl: int | None = None) -> Calls[None]:
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

    def _save_batch(self, items: list[Any]) -> Calls[None]:
        reply = yield "SaveState", self._save_request(items)
        if code_of(reply) in (None, *_REFUSED) or len(items) == 1:
            return self._check(reply)
        # Some of it may be there, and no answer says which. Nobody else writes these keys: write them again.
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            yield from self._save_batch(half)

    def _save_request(self, items: list[Any]) -> Any:
        return api_v1.state_pb2.SaveStateRequest(store_name=self.store, states=items)

    def _delete(self, keys: Sequence[str]) -> Calls[None]:
        states = [common_v1.StateItem(key=key) for key in keys]
        reply = yield (
            "DeleteBulkState",
            api_v1.state_pb2.DeleteBulkStateRequest(store_name=self.store, states=states),
        )
        if code_of(reply) in (None, *_REFUSED):
            return self._check(reply)
        # Some components fail on a key that is not there, and then it is not said what became of the others.
        for key in keys:
            if (yield from self._get_one(key)).data:
                reply = yield "DeleteState", api_v1.state_pb2.DeleteStateRequest(store_name=self.store, key=key)
                if code_of(reply) is not None and (yield from self._get_one(key)).data:
                    self._check(reply)

    def _create(self, operation: Create) -> Calls[bool]:
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
            yield Pause(quirks.SETTLE)
            return (yield from self._get_one(operation.key)).data == operation.value
        return self._settled((yield "SaveState", self._save_request([item])))

    def _swap(self, operation: Swap) -> Calls[bool]:
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
        code = code_of(reply)
        if code is None:
            return True
        if code in _REFUSED or code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._check(reply)
        logger.debug("conditional write not acknowledged: %s", code)
        return False


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


def code_of(reply: Any) -> grpc.StatusCode | None:
    return reply.code() if isinstance(reply, grpc.RpcError) else None
