"""What the client makes of a store that answers with errors."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from outlast.checkpointer import cells, records
from outlast.checkpointer.client import StateClient
from outlast.checkpointer.operations import Get, Save
from outlast.errors import StoreError


class Refused(grpc.RpcError):
    def __init__(self, details: str) -> None:
        super().__init__(details)
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str:
        return self._details


class Refusing:
    """A stub whose every method fails so many times before it does what it is asked."""

    def __init__(self, stub: Any, times: int, details: str) -> None:
        self._stub = stub
        self._left: dict[str, int] = {}
        self._times = times
        self._details = details
        self.refused = 0

    def __getattr__(self, method: str) -> Any:
        def call(request: Any, **more: Any) -> Any:
            left = self._left.setdefault(method, self._times)
            if left:
                self._left[method] = left - 1
                self.refused += 1
                raise Refused(self._details)
            return getattr(self._stub, method)(request, **more)

        return call


LOCKED = "failed saving state in state store statestore: database is locked (5) (SQLITE_BUSY)"


def test_a_locked_store_is_asked_again(client: StateClient) -> None:
    assert client.capabilities
    stub = client._stub = Refusing(client._stub, 2, LOCKED)
    client.run(saving(b"v"))
    assert client.run(getting()) == b"v"
    assert client.run(cells.update("c-locked", records.REGISTRY, lambda body: {"n": 1})) == {"n": 1}
    assert client.run(cells.update("c-locked", records.REGISTRY, lambda body: {"n": body["n"] + 1})) == {"n": 2}
    assert client.run(cells.read("c-locked", records.REGISTRY))[0] == {"n": 2}
    assert stub.refused >= 4


def test_other_errors_are_not_asked_again(client: StateClient) -> None:
    assert client.capabilities
    stub = client._stub = Refusing(client._stub, 2, "no space left on device")
    with pytest.raises(StoreError, match="no space left"):
        client.run(saving(b"v"))
    assert stub.refused == 1


def saving(value: bytes) -> Any:
    yield Save([("plain-key", value)])


def getting() -> Any:
    return (yield Get(["plain-key"]))["plain-key"].data
