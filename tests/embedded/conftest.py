"""What the embedded sidecar's tests share. Those of state and workflows run on a real daprd too (`--sidecar=daprd`,
or on a running one at OUTLAST_TEST_DAPR_GRPC_PORT and OUTLAST_TEST_DAPR_HTTP_PORT), so that both are held to the same.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import grpc
import pytest
from dapr.clients import DaprClient
from dapr.conf import settings
from dapr.ext.workflow import DaprWorkflowClient, WorkflowRuntime
from dapr.proto import api_service_v1

from outlast.embedded import EmbeddedSidecar

# Read when gRPC is first used: with its fork handlers, starting a child from a process that serves gRPC can hang.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

STORE = "statestore"


class Ports(NamedTuple):
    """Where the sidecar under test listens, and whether it is ours."""

    grpc: int
    http: int
    embedded: bool


@pytest.fixture(scope="session")
def ports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    given = os.environ.get("OUTLAST_TEST_DAPR_GRPC_PORT"), os.environ.get("OUTLAST_TEST_DAPR_HTTP_PORT")
    if given[0] and given[1]:
        yield Ports(int(given[0]), int(given[1]), embedded=False)
    elif request.config.getoption("--sidecar") == "daprd":
        cluster = request.getfixturevalue("dapr_cluster")
        daprd = cluster.start_daprd()
        yield Ports(daprd.grpc_port, daprd.http_port, embedded=False)
        cluster.stop_daprd(daprd)
    else:
        with EmbeddedSidecar(tmp_path_factory.mktemp("embedded") / "outlast.db") as sidecar:
            yield Ports(sidecar.grpc_port, sidecar.http_port, embedded=True)


@pytest.fixture
def embedded(ports: Ports) -> None:
    """For tests of what only the embedded sidecar does."""
    if not ports.embedded:
        pytest.skip("differs from daprd on purpose")


@pytest.fixture(autouse=True)
def _sdk_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the SDK, which reads its environment at import, to the sidecar under test."""
    if "ports" not in request.fixturenames:
        return
    ports: Ports = request.getfixturevalue("ports")
    for name, port in (("DAPR_GRPC_PORT", ports.grpc), ("DAPR_HTTP_PORT", ports.http)):
        monkeypatch.setenv(name, str(port))
        monkeypatch.setattr(settings, name, port)


@pytest.fixture
def key() -> str:
    """A key or instance id that no other test uses."""
    return f"k{uuid.uuid4().hex}"


@pytest.fixture
def client(ports: Ports, _sdk_settings: None) -> Iterator[DaprClient]:
    with DaprClient() as client:
        yield client


@pytest.fixture
def stub(ports: Ports) -> Iterator[api_service_v1.DaprStub]:
    """The bare API, for requests the SDK would refuse itself."""
    with grpc.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        yield api_service_v1.DaprStub(channel)


@pytest.fixture(scope="session")
def workflows(ports: Ports) -> Iterator[DaprWorkflowClient]:
    """A client, with a worker that has all workflows of `tests.embedded.sample`."""
    from tests.embedded import sample

    runtime = WorkflowRuntime(host="127.0.0.1", port=str(ports.grpc))
    sample.register(runtime)
    runtime.start()
    client = DaprWorkflowClient(host="127.0.0.1", port=str(ports.grpc))
    yield client
    client.close()
    runtime.shutdown()
