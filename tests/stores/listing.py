"""All keys of a store, past Dapr: what an orphan is looked for with, because Dapr's API cannot list."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Callable, Mapping

import psycopg

from tests.stores.sidecar import Component
from tests.stores.starting import program


def _sqlite(settings: Mapping[str, str]) -> list[str]:
    with contextlib.closing(sqlite3.connect(settings["connectionString"])) as database:
        return [key for (key,) in database.execute("SELECT key FROM state")]


def _postgresql(settings: Mapping[str, str]) -> list[str]:
    with psycopg.connect(settings["connectionString"]) as connection:
        return [key for (key,) in connection.execute("SELECT key FROM state").fetchall()]


def _redis(settings: Mapping[str, str]) -> list[str]:
    host, _, port = settings["redisHost"].partition(":")
    command = [program("redis-cli", "redis-tools"), "-h", host, "-p", port, "--scan"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


_LISTERS: dict[str, Callable[[Mapping[str, str]], list[str]]] = {
    "state.sqlite": _sqlite,
    "state.postgresql": _postgresql,
    "state.redis": _redis,
}


def can_list(component: Component) -> bool:
    return component.kind in _LISTERS


def keys(component: Component) -> set[str]:
    """The keys as outlast wrote them, without the app id that Dapr puts before."""
    return {key.rpartition("||")[2] for key in _LISTERS[component.kind](component.metadata)}
