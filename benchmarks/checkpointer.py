"""What a checkpointer costs: DaprSaver on four stores next to LangGraph's in-memory, SQLite and PostgreSQL savers.

A thread grows by one 1 KB message a turn. Every system runs in turn in one process run; printed are ms per put around
turn 10 and around the last turn (and the slope between them), of reading the latest state and of a list of 20,
of the first read of the whole thread by a new saver, and stored bytes as a multiple of the raw messages.

    make bench-checkpointer    or    python -m benchmarks.checkpointer --turns 1000 --plot docs/img/checkpointer.svg
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage
from langgraph.checkpoint.base import empty_checkpoint

RAW = 1000


@dataclass
class System:
    """A saver under test: makes savers that remember nothing, and tells how many bytes are stored."""

    make: Callable[[], contextlib.AbstractContextManager[Any]]
    stored: Callable[[], int]


@contextlib.contextmanager
def _in_memory(folder: Path) -> Iterator[System]:
    from langgraph.checkpoint.memory import InMemorySaver

    saver = InMemorySaver()

    def stored() -> int:
        blobs = sum(len(data) for _, data in saver.blobs.values())
        threads = (rows for namespaces in saver.storage.values() for rows in namespaces.values())
        return blobs + sum(len(row[0][1]) + len(row[1][1]) for rows in threads for row in rows.values())

    yield System(lambda: contextlib.nullcontext(saver), stored)


@contextlib.contextmanager
def _sqlite(folder: Path) -> Iterator[System]:
    from langgraph.checkpoint.sqlite import SqliteSaver

    path = folder / "saver.db"
    yield System(lambda: SqliteSaver.from_conn_string(str(path)), lambda: _file(path))


@contextlib.contextmanager
def _postgres(folder: Path) -> Iterator[System]:
    import psycopg
    from langgraph.checkpoint.postgres import PostgresSaver

    from tests.migrate.postgres import server

    with server() as url:
        with PostgresSaver.from_conn_string(url) as saver:
            saver.setup()

        def stored() -> int:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("VACUUM FULL")
                row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
                return int(row[0]) if row else 0

        empty = stored()
        yield System(lambda: PostgresSaver.from_conn_string(url), lambda: stored() - empty)


@contextlib.contextmanager
def _embedded(folder: Path) -> Iterator[System]:
    from outlast.checkpointer.sidecar import Address
    from outlast.embedded import EmbeddedSidecar

    path = folder / "outlast.db"
    with EmbeddedSidecar(path) as sidecar:
        yield _dapr(Address("127.0.0.1", sidecar.grpc_port, embedded=True), lambda: _file(path))


def _on_daprd(name: str) -> Callable[[Path], contextlib.AbstractContextManager[System]]:
    @contextlib.contextmanager
    def start(folder: Path) -> Iterator[System]:
        from outlast.checkpointer.sidecar import Address
        from tests.stores import servers, sidecar

        with servers.STORES[name].start(folder) as component:
            daprd = sidecar.start(folder / "daprd", component)
            try:
                measure = {"sqlite": _component_file, "redis": _redis, "postgresql-v2": _postgres_size}[name]
                empty = measure(component)
                system = _dapr(Address("127.0.0.1", daprd.grpc_port), lambda: measure(component) - empty)
                yield system
            finally:
                daprd.kill()

    return start


def _dapr(address: Any, stored: Callable[[], int]) -> System:
    from outlast.checkpointer import DaprSaver
    from outlast.checkpointer.client import StateClient

    return System(
        lambda: contextlib.nullcontext(DaprSaver(client=StateClient("statestore", address))),
        stored,
    )


def _file(path: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        database = sqlite3.connect(path)
        database.execute("VACUUM INTO ?", (str(copy),))
        database.close()
        return copy.stat().st_size


def _component_file(component: Any) -> int:
    path = Path(component.metadata["connectionString"])
    return _file(path) if path.exists() else 0


def _redis(component: Any) -> int:
    import socket

    host, port = component.metadata["redisHost"].split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"INFO memory\r\n")
        found = connection.recv(65536).decode()
    return int(next(line.split(":")[1] for line in found.splitlines() if line.startswith("used_memory_dataset:")))


def _postgres_size(component: Any) -> int:
    import psycopg

    with psycopg.connect(component.metadata["connectionString"].replace("database=", "dbname="), autocommit=True) as db:
        db.execute("VACUUM FULL")
        row = db.execute("SELECT pg_database_size(current_database())").fetchone()
        return int(row[0]) if row else 0


SYSTEMS: dict[str, Callable[[Path], contextlib.AbstractContextManager[System]]] = {
    "InMemorySaver": _in_memory,
    "SqliteSaver": _sqlite,
    "PostgresSaver": _postgres,
    "DaprSaver, embedded": _embedded,
    "DaprSaver, daprd + SQLite": _on_daprd("sqlite"),
    "DaprSaver, daprd + Redis": _on_daprd("redis"),
    "DaprSaver, daprd + PostgreSQL": _on_daprd("postgresql-v2"),
}


def _text(chance: random.Random) -> str:
    words = ("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(400))
    return " ".join(words)[:RAW]


def _run(system: System, turns: int) -> dict[str, Any]:
    chance = random.Random(7)
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    latest: Any = {"configurable": {"thread_id": "t"}}
    puts: list[float] = []
    messages: list[Any] = []
    with system.make() as saver:
        version: Any = None
        for turn in range(turns):
            messages = [*messages, AIMessage(_text(chance), id=str(turn))]
            version = saver.get_next_version(version, None)
            checkpoint = empty_checkpoint()
            checkpoint["channel_values"] = {"messages": messages, "step": turn}
            checkpoint["channel_versions"] = {"messages": version, "step": version}
            started = time.perf_counter()
            config = saver.put(config, checkpoint, {"source": "loop", "step": turn}, checkpoint["channel_versions"])
            puts.append((time.perf_counter() - started) * 1000)
        get = _middle(lambda: saver.get_tuple(latest))
        listed = _middle(lambda: list(saver.list(latest, limit=20)), 5)
    with system.make() as fresh:
        started = time.perf_counter()
        found = fresh.get_tuple(latest)
        resume = (time.perf_counter() - started) * 1000
        assert found is not None
        assert len(found.checkpoint["channel_values"]["messages"]) == turns
    return {"puts": puts, "get": get, "list": listed, "resume": resume, "bytes": system.stored() / (turns * RAW)}


def _middle(call: Callable[[], Any], times: int = 20) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


def _report(results: dict[str, dict[str, Any]], turns: int) -> None:
    head = ["system", "put at turn 10, ms", f"put at turn {turns}, ms", "slope, µs a turn", "get, ms", "list 20, ms"]
    lines = ["| " + " | ".join([*head, "first read, ms", "stored / raw"]) + " |", "|---" * 8 + "|"]
    for name, found in results.items():
        first, last = statistics.median(found["puts"][5:25]), statistics.median(found["puts"][-20:])
        slope = (last - first) * 1000 / turns
        figures = [f"{first:.2f}", f"{last:.2f}", f"{slope:.1f}", f"{found['get']:.1f}", f"{found['list']:.1f}"]
        lines.append("| " + " | ".join([name, *figures, f"{found['resume']:.1f}", f"{found['bytes']:.1f}"]) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


def _plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "outlast"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, found in results.items():
        puts = found["puts"]
        width = max(1, len(puts) // 50)
        smooth = [statistics.median(puts[start : start + width]) for start in range(0, len(puts), width)]
        axes.plot(range(0, len(puts), width), smooth, label=name)
    axes.set(xlabel="turn (1 KB each)", ylabel="ms per put", ylim=(0, None))
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--system", action="append", choices=list(SYSTEMS), help="only these")
    parser.add_argument("--plot", type=Path, help="write an SVG of ms per put over turns")
    parser.add_argument("--json", action="store_true", help="print the raw figures")
    asked = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name in asked.system or SYSTEMS:
        with tempfile.TemporaryDirectory() as folder, SYSTEMS[name](Path(folder)) as system:
            results[name] = _run(system, asked.turns)
    if asked.plot:
        _plot(results, asked.plot)
    if asked.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    else:
        _report(results, asked.turns)


if __name__ == "__main__":
    main()
