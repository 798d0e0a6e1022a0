"""Each part of the runtime is killed, alone, while journaled runs are in flight, and comes back some seconds later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from outlast.checkpointer.sidecar import Address
from tests.faults import servers
from tests.faults.stage import LOOPBACK, User, World, play, start_worker
from tests.harness.daprd import DaprCluster, Daprd
from tests.harness.procs import Child

pytestmark = [pytest.mark.kill, pytest.mark.timeout(240)]
AWAY = 5.0
"""Seconds that what was killed stays away."""


@dataclass
class App:
    """Two replicas on one store."""

    store: servers.Server
    cluster: DaprCluster
    daprds: list[Daprd]
    workers: list[Child]


@pytest.fixture(scope="module")
def app(
    request: pytest.FixtureRequest, world: World, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[App]:
    home = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        open_store = servers.redis(home) if request.param == "redis" else servers.postgres()
        store: servers.Redis | servers.Postgres = stack.enter_context(open_store)
        cluster = stack.enter_context(DaprCluster(home / "dapr", {"statestore.yaml": store.component}))
        first = cluster.start_daprd()
        daprds = [first, cluster.start_daprd(first.app_id)]
        workers = [
            stack.enter_context(start_worker(folder, f"{request.param}-{number}", {**world.env, **daprd.env}))
            for number, daprd in enumerate(daprds)
        ]
        yield App(store, cluster, daprds, workers)


@pytest.fixture
def user(app: App, world: World) -> Iterator[User]:
    using = User(Address(LOOPBACK, app.daprds[0].grpc_port), world)
    yield using
    using.close()


def _away(kill: Callable[[], None], start: Callable[[], None]) -> Callable[[], None]:
    def fault() -> None:
        kill()
        time.sleep(AWAY)
        start()

    return fault


def _kill_all(app: App) -> None:
    for daprd in app.daprds:
        daprd.kill()


def _start_all(app: App) -> None:
    for daprd in app.daprds:
        daprd.start()


FAULTS: dict[str, Callable[[App], Callable[[], None]]] = {
    "daprd": lambda app: _away(app.daprds[0].kill, app.daprds[0].start),
    "every-daprd": lambda app: _away(lambda: _kill_all(app), lambda: _start_all(app)),
    "placement": lambda app: _away(
        lambda: app.cluster.kill_control("placement"), lambda: app.cluster.restart_control("placement")
    ),
    "scheduler": lambda app: _away(
        lambda: app.cluster.kill_control("scheduler"), lambda: app.cluster.restart_control("scheduler")
    ),
    "store": lambda app: _away(app.store.kill, app.store.start),
}


@pytest.mark.parametrize(
    ("app", "part"),
    # What does not touch the store is the same on both.
    [*(("redis", part) for part in FAULTS), ("postgresql", "store"), ("postgresql", "every-daprd")],
    indirect=["app"],
)
def test_a_part_of_the_runtime_is_killed(app: App, user: User, world: World, part: str) -> None:
    store = type(app.store).__name__.lower()
    play(f"{part}-{store}", world, user, app.workers, FAULTS[part](app))
