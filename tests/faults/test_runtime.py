"""Each part of the runtime is killed, alone, while journaled runs are in flight, and comes back some seconds later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    name: str
    store: servers.Server
    cluster: DaprCluster
    daprds: list[Daprd]
    workers: list[Child]


@contextmanager
def _app(name: str, open_store: AbstractContextManager[Any], world: World, home: Path) -> Iterator[App]:
    with ExitStack() as stack:
        store = stack.enter_context(open_store)
        cluster = stack.enter_context(DaprCluster(home / "dapr", {"statestore.yaml": store.component}))
        first = cluster.start_daprd()
        daprds = [first, cluster.start_daprd(first.app_id)]
        workers = [
            stack.enter_context(start_worker(home, f"worker-{number}", {**world.env, **daprd.env}))
            for number, daprd in enumerate(daprds)
        ]
        yield App(name, store, cluster, daprds, workers)


@pytest.fixture(scope="module")
def on_redis(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    home = tmp_path_factory.mktemp("redis")
    with _app("redis", servers.redis(home), world, home) as app:
        yield app


@pytest.fixture(scope="module")
def on_postgres(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with _app("postgres", servers.postgres(), world, tmp_path_factory.mktemp("postgres")) as app:
        yield app


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


def _play(app: App, world: World, part: str) -> None:
    user = User(Address(LOOPBACK, app.daprds[0].grpc_port), world)
    try:
        play(f"{part}-{app.name}", world, user, app.workers, FAULTS[part](app))
    finally:
        user.close()


@pytest.mark.parametrize("part", FAULTS)
def test_a_part_of_the_runtime_is_killed(on_redis: App, world: World, part: str) -> None:
    _play(on_redis, world, part)


@pytest.mark.parametrize("part", ["store", "every-daprd"])
def test_what_touches_the_store_is_killed_on_postgresql_too(on_postgres: App, world: World, part: str) -> None:
    _play(on_postgres, world, part)
