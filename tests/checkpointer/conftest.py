from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import StateClient
from outlast.checkpointer.sidecar import Address
from outlast.embedded import EmbeddedSidecar

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """Where a sidecar of this module's own listens."""
    with EmbeddedSidecar(tmp_path_factory.mktemp("sidecar") / "outlast.db") as sidecar:
        yield Address("127.0.0.1", sidecar.grpc_port, embedded=True)


@pytest.fixture
def client(address: Address) -> Iterator[StateClient]:
    made = StateClient("statestore", address)
    yield made
    made.close()


@pytest.fixture
def fresh(address: Address) -> Callable[[], DaprSaver]:
    """Makes savers that remember nothing, as after a restart."""
    return lambda: DaprSaver(client=StateClient("statestore", address))


@pytest.fixture
def thread() -> str:
    """A thread that nobody else has."""
    return f"thread-{os.getpid()}-{next(_NUMBERS)}"
