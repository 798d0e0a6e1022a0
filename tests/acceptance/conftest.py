from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.acceptance.scenario import Replicas, Stage
from tests.acceptance.zygote import Zygote
from tests.harness.daprd import DaprCluster

AT_ONCE = 3


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts processes that have LangGraph imported."""
    server = Zygote(tmp_path_factory.mktemp("zygote"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def stages(request: pytest.FixtureRequest) -> Callable[[int], list[Replicas | None]]:
    """Apps by the number of replicas; on daprd they are started once and shared by all tests."""
    made: dict[int, list[Replicas | None]] = {}

    def of(replicas: int) -> list[Replicas | None]:
        if request.config.getoption("--sidecar") == "embedded":
            return [None] * AT_ONCE
        if replicas not in made:
            cluster: DaprCluster = request.getfixturevalue("dapr_cluster")
            made[replicas] = []
            for _ in range(AT_ONCE if replicas == 1 else 1):
                first = cluster.start_daprd()
                others = [cluster.start_daprd(first.app_id) for _ in range(replicas - 1)]
                made[replicas].append([first.env, *(other.env for other in others)])
        return made[replicas]

    return of


def _stage(zygote: Zygote, root: Path, apps: list[Replicas | None]) -> Stage:
    free: SimpleQueue[Replicas | None] = SimpleQueue()
    for app in apps:
        free.put(app)
    return Stage(zygote, root, free)


@pytest.fixture
def stage(zygote: Zygote, tmp_path: Path, stages: Callable[[int], list[Replicas | None]]) -> Stage:
    """Plays scenarios of one replica."""
    return _stage(zygote, tmp_path, stages(1))


@pytest.fixture
def replicated(zygote: Zygote, tmp_path: Path, stages: Callable[[int], list[Replicas | None]]) -> Stage:
    """Plays scenarios of two replicas."""
    return _stage(zygote, tmp_path, stages(2))
