"""The state store seen through the sidecar: one sync and one async driver for the rules above it.

Everything above writes generators that yield operations and get back results; nothing above knows gRPC. What an
operation is in requests is in `wire`; the drivers below send them, and are all the code that is written twice.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
import weakref
from typing import Any, Final, TypeVar

import grpc
from dapr.conf import settings
from dapr.proto import api_service_v1, api_v1

from outlast.checkpointer import quirks
from outlast.checkpointer.operations import (
    Create,
    Delete,
    Get,
    Item,
    Operation,
    Pause,
    Save,
    Steps,
    Swap,
    Whole,
    load,
)
from outlast.checkpointer.sidecar import Address, locate
from outlast.checkpointer.wire import Calls, Capabilities, Guarantee, Request, Wire, code_of
from outlast.errors import (
    RecordTooLargeError,
    SidecarUnavailableError,
    StoreError,
    StoreNotFoundError,
    UnsupportedStoreError,
)

__all__ = [
    "Capabilities",
    "Create",
    "Delete",
    "Get",
    "Guarantee",
    "Item",
    "Operation",
    "Pause",
    "Save",
    "StateClient",
    "Steps",
    "Swap",
    "Whole",
    "load",
]

logger = logging.getLogger("outlast.store")

T = TypeVar("T")

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
_WARNED: Final[set[tuple[str, str]]] = set()
"""Stores of which this process has said what they do not give."""


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
        calls = self._patiently(operation)
        try:
            asked = next(calls)
            while True:
                asked = calls.send(self._answer(asked))
        except StopIteration as stop:
            return stop.value

    async def _aperform(self, operation: Operation) -> Any:
        calls = self._patiently(operation)
        try:
            asked = next(calls)
            while True:
                asked = calls.send(await self._aanswer(asked))
        except StopIteration as stop:
            return stop.value

    def _answer(self, asked: Request | Pause) -> Any:
        if isinstance(asked, Pause):
            return time.sleep(asked.seconds)
        method, request = asked
        try:
            return getattr(self._stub, method)(request, metadata=self._metadata)
        except grpc.RpcError as error:
            return error

    async def _aanswer(self, asked: Request | Pause) -> Any:
        if isinstance(asked, Pause):
            return await asyncio.sleep(asked.seconds)
        method, request = asked
        try:
            return await getattr(self._async_stub(), method)(request, metadata=self._metadata)
        except grpc.RpcError as error:
            return error

    def _patiently(self, operation: Operation) -> Calls[Any]:
        """Carry an operation out; a request that finds no sidecar, or a store locked, is made again for a while."""
        calls = self._calls(operation)
        try:
            asked = next(calls)
            while True:
                reply = yield asked
                started, delay = time.monotonic(), 0.05
                while _passing(reply) and time.monotonic() - started < self._patience:
                    yield Pause(delay)
                    delay = min(delay * 2, 0.2)
                    reply = yield asked
                asked = calls.send(reply)
        except StopIteration as stop:
            return stop.value

    @property
    def _patience(self) -> float:
        return _OUTAGE if self._capabilities else _FIRST_CONTACT

    def _calls(self, operation: Operation) -> Calls[Any]:
        if isinstance(operation, Pause):
            yield operation
            return None
        if self._capabilities is None:
            yield from self._discover()
        assert self._capabilities is not None
        return (yield from Wire(self.store, self._capabilities, self._check).calls(operation))

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

    def _discover(self) -> Calls[None]:
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
        code = code_of(reply)
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


def _passing(reply: Any) -> bool:
    """Tell whether a reply means that nothing was done, and that the same request may go through in a moment."""
    code = code_of(reply)
    # Dapr's SQLite store answers so where other writers hold the file for longer than its busyTimeout.
    locked = code is not None and any(word in (reply.details() or "") for word in ("SQLITE_BUSY", "database is locked"))
    return code == grpc.StatusCode.UNAVAILABLE or locked


def _close(reference: weakref.ref[StateClient]) -> None:
    client = reference()
    if client is not None:
        client.close()
