from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.acceptance.scenario import Replicas, Stage
from tests.acceptance.zygote import Zygote
from tests.adapters import conftest as shared
from tests.harness.daprd import DaprCluster

AT_ONCE = 2
PRELOAD = (
    "agents", "agents.extensions.handoff_filters", "dapr.clients", "dapr.ext.workflow", "dapr.proto", "grpc.aio",
    "httpx", "openai", "ormsgpack", "sqlite3",
)  # fmt: skip


@pytest.fixture(scope="session")
def agents_zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts processes that have the OpenAI Agents SDK imported."""
    server = Zygote(tmp_path_factory.mktemp("zygote"), PRELOAD)
    yield server
    server.close()


@pytest.fixture(scope="session")
def agents_apps(request: pytest.FixtureRequest) -> Callable[[], list[Replicas | None]]:
    """Apps to play scenarios on; on daprd they are started once and shared by all tests."""
    made: list[Replicas | None] = []

    def apps() -> list[Replicas | None]:
        if request.config.getoption("--sidecar") == "embedded":
            return [None] * AT_ONCE
        if not made:
            cluster: DaprCluster = request.getfixturevalue("dapr_cluster")
            made.extend([cluster.start_daprd().env] for _ in range(AT_ONCE))
        return made

    return apps


@pytest.fixture
def stage(agents_zygote: Zygote, tmp_path: Path, agents_apps: Callable[[], list[Replicas | None]]) -> Stage:
    """Plays scenarios."""
    free: SimpleQueue[Replicas | None] = SimpleQueue()
    for app in agents_apps():
        free.put(app)
    return Stage(agents_zygote, tmp_path, free)


runtime, name = shared.runtime, shared.name
