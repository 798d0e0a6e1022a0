"""The ends of a migration by their names: `postgres://…`, `sqlite:PATH`, `redis://…`, or a Dapr state store."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol

from outlast.checkpointer.saver import DaprSaver
from outlast.migrate.sides import MigrationError, Side, side_of
from outlast.migrate.verbatim import Verbatim


@contextmanager
def opened(name: str, *, target: bool = False, encrypted: bool = False, verbatim: bool = True) -> Iterator[Side]:
    """Open one end of a migration.

    Args:
        name: `postgres://…`, `sqlite:PATH`, `redis://…` (a source only), or the name of a Dapr state store.
        target: Whether it is written to; a source is never changed, not even by creating tables.
        encrypted: Whether values are encrypted with LANGGRAPH_AES_KEY, as EncryptedSerializer does.
        verbatim: Carry values over as they are stored; both ends must be opened alike.

    Raises:
        MigrationError: If there is no such end, or a package is missing.
    """
    serde = _serializer(encrypted, verbatim)
    if re.match(r"(postgres|postgresql)://", name):
        context = _postgres(name, target, serde)
    elif name.startswith("sqlite:"):
        context = _sqlite(path_of(name), target, serde)
    elif is_redis(name):
        if target:
            raise MigrationError(
                "threads are not copied to Redis through RedisSaver; name a Dapr state store (state.redis)"
            )
        context = _redis(name)
    elif re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        context = _dapr(name, serde)
    else:
        raise MigrationError(
            f"{name!r} names nothing to copy from or to: use postgres://…, sqlite:PATH, redis://… "
            "or the name of a Dapr state store component"
        )
    with context as side:
        try:
            yield side
        finally:
            side.close()


def is_redis(name: str) -> bool:
    """Return whether the name is of a RedisSaver, whose values cannot be carried over as they are stored."""
    return name.startswith(("redis://", "rediss://", "redis+sentinel://"))


def is_dapr(name: str) -> bool:
    """Return whether the name is of a Dapr state store."""
    return ":" not in name


def _serializer(encrypted: bool, verbatim: bool) -> SerializerProtocol | None:
    serde = Verbatim() if verbatim else None
    if not encrypted:
        return serde
    from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

    try:
        return EncryptedSerializer.from_pycryptodome_aes(**({"serde": serde} if serde else {}))
    except (ImportError, ValueError) as error:
        raise MigrationError(f"encrypted values cannot be opened: {error}") from error


@contextmanager
def _dapr(store: str, serde: SerializerProtocol | None) -> Iterator[Side]:
    saver = DaprSaver(store, serde=serde)
    try:
        yield side_of(saver)
    finally:
        saver.client.close()


def path_of(name: str) -> Path:
    """Return the file that `sqlite:PATH` names."""
    return Path(re.sub(r"^sqlite:(//)?", "", name))


@contextmanager
def _sqlite(path: Path, target: bool, serde: SerializerProtocol | None) -> Iterator[Side]:
    try:
        from langgraph.checkpoint.sqlite import SqliteSaver
    except ImportError as error:
        raise MigrationError("SqliteSaver is missing: pip install langgraph-checkpoint-sqlite") from error
    if target:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, check_same_thread=False)) as connection:
            yield side_of(SqliteSaver(connection, serde=serde))
        return
    if not path.is_file():
        raise MigrationError(f"there is no file {path}")
    with closing(
        sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    ) as connection:
        try:
            columns = {row[1] for row in connection.execute("PRAGMA table_info(writes)")}
        except sqlite3.DatabaseError as error:
            raise MigrationError(f"{path} is no SQLite database: {error}") from error
        if not columns:
            raise MigrationError(f"{path} has no table of SqliteSaver's in it")
        saver = SqliteSaver(connection, serde=serde)
        saver.is_setup = True  # it would change the file otherwise
        saver._has_task_path = "task_path" in columns
        yield side_of(saver)


@contextmanager
def _postgres(url: str, target: bool, serde: SerializerProtocol | None) -> Iterator[Side]:
    try:
        import psycopg
        from langgraph.checkpoint.postgres import PostgresSaver
        from psycopg.rows import dict_row
    except ImportError as error:
        raise MigrationError(
            "PostgresSaver is missing: pip install langgraph-checkpoint-postgres 'psycopg[binary]'"
        ) from error
    try:
        connection: Any = psycopg.Connection.connect(url, autocommit=True, prepare_threshold=0, row_factory=dict_row)
    except psycopg.OperationalError as error:
        raise MigrationError(f"PostgreSQL does not answer: {error}") from error
    with connection:
        saver = PostgresSaver(connection, serde=serde)
        if target:
            saver.setup()
        else:
            tables = "SELECT to_regclass('checkpoints') IS NOT NULL AS there"
            columns = (
                "SELECT count(*) AS there FROM information_schema.columns "
                "WHERE table_name = 'checkpoint_writes' AND column_name = 'task_path'"
            )
            if not connection.execute(tables).fetchone()["there"]:
                raise MigrationError("this PostgreSQL database has no table of PostgresSaver's in it")
            if not connection.execute(columns).fetchone()["there"]:
                raise MigrationError(
                    "the tables are of an older PostgresSaver: call PostgresSaver.setup() once, which adds a column"
                )
        yield side_of(saver)


@contextmanager
def _redis(url: str) -> Iterator[Side]:
    try:
        from langgraph.checkpoint.redis import RedisSaver
    except ImportError as error:
        raise MigrationError("RedisSaver is missing: pip install langgraph-checkpoint-redis") from error
    saver = RedisSaver(url)
    try:
        saver.setup()
    except Exception as error:
        raise MigrationError(
            f"RedisSaver cannot use this server: {error}. It needs RedisJSON and RediSearch (Redis 8, or Redis Stack)"
        ) from error
    yield side_of(saver)
