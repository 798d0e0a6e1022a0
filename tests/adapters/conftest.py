from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from outlast.checkpointer.sidecar import Address
from outlast.embedded import EmbeddedSidecar
from outlast.recovery.runtime import Runtime


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A runtime on an embedded sidecar of its own."""
    with EmbeddedSidecar(tmp_path_factory.mktemp("sidecar") / "outlast.db") as sidecar:
        made = Runtime("statestore", Address("127.0.0.1", sidecar.grpc_port, embedded=True))
        yield made
        made.stop()


_NUMBERS = itertools.count()


@pytest.fixture
def name() -> Callable[[], str]:
    """Names that nothing else in this process has."""
    return lambda: f"n{os.getpid()}-{next(_NUMBERS)}"
