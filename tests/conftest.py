"""Which sidecar the tests run on: `--sidecar=embedded` (default) or `--sidecar=daprd`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.harness.daprd import DaprCluster
from tools.get_dapr import DaprNotFound, find

EMBEDDED, DAPRD = "embedded", "daprd"

# Tests start children while gRPC servers run in this process, whose fork handlers would hang or crash them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sidecar", choices=(EMBEDDED, DAPRD), default=EMBEDDED, help="what the tests run on")
    parser.addoption("--kills", type=int, default=20, help="random kills (tests/acceptance/test_random_kills.py)")
    parser.addoption("--seed", type=int, default=None, help="of the random kills; printed, and drawn if not given")
    parser.addoption("--waiting", type=int, default=200, help="runs that wait (tests/acceptance/test_waiting_runs.py)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sidecar") == DAPRD:
        try:
            find()
        except DaprNotFound as error:
            raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> str:
    return f"sidecar: {config.getoption('--sidecar')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--sidecar") == EMBEDDED:
        skip = pytest.mark.skip(reason="needs a real daprd: --sidecar=daprd")
        for item in items:
            if item.get_closest_marker("dapr"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def dapr_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaprCluster]:
    """A running placement and scheduler; tests add the daprd they need."""
    with DaprCluster(tmp_path_factory.mktemp("dapr")) as cluster:
        yield cluster


@pytest.fixture
def sidecar(request: pytest.FixtureRequest) -> str:
    """The name of what this test runs on: "embedded" or "daprd"."""
    name: str = request.config.getoption("--sidecar")
    return name


@pytest.fixture
def sidecar_replicas(
    request: pytest.FixtureRequest, sidecar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[dict[str, str]]]:
    """The settings of two processes that are replicas of one app, with state no other test sees.

    Embedded: both share one file. daprd: each has its own daprd, of the same app id. This process itself is pointed to
    the first.
    """
    if sidecar == EMBEDDED:
        (tmp_path / "embedded").mkdir()
        replica = {"OUTLAST_EMBEDDED_PATH": str(tmp_path / "embedded" / "outlast.db")}
        _point_to(replica, monkeypatch)
        yield [replica, dict(replica)]
        return
    cluster: DaprCluster = request.getfixturevalue("dapr_cluster")
    first = cluster.start_daprd()
    second = cluster.start_daprd(first.app_id)
    _point_to(first.env, monkeypatch)
    yield [first.env, second.env]
    for daprd in (first, second):
        cluster.stop_daprd(daprd)


@pytest.fixture
def sidecar_env(
    request: pytest.FixtureRequest, sidecar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """The settings that point outlast and the Dapr SDK, here and in child processes, to a sidecar with no state yet.

    In a test that also asks for `sidecar_replicas`, those of the first replica.
    """
    if sidecar == EMBEDDED or "sidecar_replicas" in request.fixturenames:
        replicas: list[dict[str, str]] = request.getfixturevalue("sidecar_replicas")
        yield replicas[0]
        return
    cluster: DaprCluster = request.getfixturevalue("dapr_cluster")
    daprd = cluster.start_daprd()
    _point_to(daprd.env, monkeypatch)
    yield daprd.env
    cluster.stop_daprd(daprd)


def _point_to(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("DAPR_", "OUTLAST_")) and name != "OUTLAST_CACHE":
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    from dapr.conf import settings  # it read the environment when it was imported

    for name in ("DAPR_GRPC_PORT", "DAPR_HTTP_PORT"):
        if name in environment:
            monkeypatch.setattr(settings, name, int(environment[name]))
