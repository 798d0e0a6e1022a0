"""One SQLite file: how it is opened, laid out, written with group commit, and read."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from outlast.embedded.errors import EmbeddedStoreError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x4F75744C  # "OutL": tells our file from any other SQLite database
BUSY_SECONDS = 30.0
_IDLE_READERS = 8

_SCHEMA = """
CREATE TABLE state (
  app TEXT NOT NULL, store TEXT NOT NULL, key TEXT NOT NULL,
  value BLOB NOT NULL, etag TEXT NOT NULL, expires REAL,
  PRIMARY KEY (app, store, key));
CREATE INDEX state_expires ON state (expires) WHERE expires IS NOT NULL;

CREATE TABLE instances (
  iid INTEGER PRIMARY KEY AUTOINCREMENT,
  app TEXT NOT NULL, id TEXT NOT NULL, name TEXT NOT NULL,
  status INTEGER NOT NULL,
  hold INTEGER NOT NULL DEFAULT 0,
  generation INTEGER NOT NULL DEFAULT 0,
  events INTEGER NOT NULL DEFAULT 0,
  start BLOB NOT NULL, incoming BLOB, completed BLOB, custom_status TEXT, patches TEXT,
  created INTEGER NOT NULL, started INTEGER, updated INTEGER NOT NULL,
  ready INTEGER NOT NULL DEFAULT 0, owner TEXT, token TEXT,
  UNIQUE (app, id));
CREATE INDEX instances_ready ON instances (app, iid) WHERE ready = 1 AND owner IS NULL;
CREATE INDEX instances_owner ON instances (owner) WHERE owner IS NOT NULL;
CREATE INDEX instances_hold ON instances (app) WHERE hold <> 0;

CREATE TABLE history (
  iid INTEGER NOT NULL, seq INTEGER NOT NULL, event BLOB NOT NULL,
  PRIMARY KEY (iid, seq)) WITHOUT ROWID;
CREATE TABLE inbox (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, iid INTEGER NOT NULL, rank INTEGER NOT NULL, event BLOB NOT NULL);
CREATE INDEX inbox_iid ON inbox (iid, rank, seq);
CREATE TABLE tasks (
  id INTEGER PRIMARY KEY AUTOINCREMENT, app TEXT NOT NULL, iid INTEGER NOT NULL, generation INTEGER NOT NULL,
  request BLOB NOT NULL, owner TEXT, token TEXT);
CREATE INDEX tasks_free ON tasks (app, id) WHERE owner IS NULL;
CREATE INDEX tasks_owner ON tasks (owner) WHERE owner IS NOT NULL;
CREATE INDEX tasks_iid ON tasks (iid);
CREATE TABLE timers (
  id INTEGER PRIMARY KEY, fire_at INTEGER NOT NULL, iid INTEGER NOT NULL, timer_id INTEGER NOT NULL, event BLOB,
  waits_for TEXT);
CREATE INDEX timers_fire_at ON timers (fire_at);
CREATE INDEX timers_iid ON timers (iid);
CREATE TABLE children (
  iid INTEGER NOT NULL, app TEXT NOT NULL, id TEXT NOT NULL,
  PRIMARY KEY (iid, app, id)) WITHOUT ROWID;
"""

T = TypeVar("T")


_open: weakref.WeakSet[Database] = weakref.WeakSet()


class _Request(Generic[T]):
    """One caller's piece of a group commit."""

    __slots__ = ("done", "durable", "error", "lead", "result", "wake", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T], durable: bool) -> None:
        self.work = work
        self.durable = durable
        self.done = False
        self.lead = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.wake = threading.Event()


class Database:
    """The file, one writing connection with group commit, and a pool of reading connections.

    There is no writer thread: whoever finds the writer free commits the requests of all who came meanwhile, and
    then hands the role on. An uncontended write therefore costs no thread switch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        self._queue: list[_Request[Any]] = []
        self._busy = False
        self._closed = False
        self._synchronous = ""
        self._readers: list[sqlite3.Connection] = []
        _open.add(self)
        _prepare_file(path)
        try:
            self._writer = self._connect()
            self._prepare_schema()
        except sqlite3.DatabaseError as error:
            raise EmbeddedStoreError(
                f"cannot open {path} as an outlast database: {error}. "
                "Point OUTLAST_EMBEDDED_PATH at another file, or move this one away."
            ) from error

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        connection.execute("PRAGMA journal_size_limit = 67108864")
        return connection

    def _prepare_schema(self) -> None:
        writer = self._writer
        # Switching to WAL and creating the tables must not race with another process that opens the same new file.
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                writer.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:  # SQLite does not wait for this lock itself
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        writer.execute("BEGIN IMMEDIATE")
        try:
            version = int(writer.execute("PRAGMA user_version").fetchone()[0])
            mark = int(writer.execute("PRAGMA application_id").fetchone()[0])
            tables = int(writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
            if version > SCHEMA_VERSION and mark == APPLICATION_ID:
                raise EmbeddedStoreError(
                    f"{self.path} was written by a newer outlast (layout {version}, this one knows {SCHEMA_VERSION}). "
                    "Upgrade outlast, or use another file."
                )
            if tables and mark != APPLICATION_ID:
                raise EmbeddedStoreError(
                    f"{self.path} is an SQLite database of another program. Use another file for outlast."
                )
            if not tables:
                for statement in _SCHEMA.split(";"):
                    writer.execute(statement)
                writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            writer.execute("COMMIT")
        except BaseException:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            writer.close()
            raise

    def write(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = True) -> T:
        """Run `work` in a transaction and return its result once it is committed.

        Args:
            work: Called with the writing connection; if it raises, only its own changes are undone.
            durable: Whether the commit must reach the disk (a power cut). A killed process loses nothing either way.

        Raises:
            sqlite3.Error: The transaction could not be committed (disk full, I/O error); nothing was written.
        """
        request = _Request(work, durable)
        with self._mutex:
            if self._closed:
                raise sqlite3.ProgrammingError("the embedded sidecar is stopped")
            self._queue.append(request)
            request.lead = not self._busy
            self._busy = True
        while not request.done:
            if request.lead:
                self._lead()
            else:
                request.wake.wait()
                request.wake.clear()
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[return-value]

    def _lead(self) -> None:
        with self._mutex:
            batch, self._queue = self._queue, []
        try:
            self._commit(batch)
        finally:
            with self._mutex:
                successor = self._queue[0] if self._queue else None
                if successor is None:
                    self._busy = False
                else:
                    successor.lead = True
            for request in batch:
                request.lead = False
                request.done = True
                request.wake.set()
            if successor is not None:
                successor.wake.set()

    def _commit(self, batch: list[_Request[Any]]) -> None:
        writer = self._writer
        try:
            mode = "FULL" if any(request.durable for request in batch) else "NORMAL"
            if mode != self._synchronous:
                writer.execute(f"PRAGMA synchronous = {mode}")
                self._synchronous = mode
            writer.execute("BEGIN IMMEDIATE")
            for request in batch:
                writer.execute("SAVEPOINT request")
                try:
                    request.result = request.work(writer)
                except Exception as error:
                    request.error = error
                    if not writer.in_transaction:  # SQLite itself gave the whole transaction up
                        raise
                    writer.execute("ROLLBACK TO request")
                writer.execute("RELEASE request")
            writer.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
            for request in batch:
                request.result = None
                request.error = request.error or error
            if not isinstance(error, Exception):
                raise

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend a reading connection; each SELECT sees the latest commit of any process."""
        with self._mutex:
            if self._closed:
                raise sqlite3.ProgrammingError("the embedded sidecar is stopped")
            reader = self._readers.pop() if self._readers else None
        if reader is None:
            reader = self._connect()
        try:
            yield reader
        except BaseException:
            reader.close()
            raise
        with self._mutex:
            if len(self._readers) < _IDLE_READERS and not self._closed:
                self._readers.append(reader)
                return
        reader.close()

    def close(self) -> None:
        """Close all connections once the running commit is done. Idempotent."""
        with contextlib.suppress(sqlite3.Error):
            self.write(lambda connection: None, durable=False)
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            readers, self._readers = self._readers, []
        for connection in (*readers, self._writer):
            with contextlib.suppress(sqlite3.Error):
                connection.close()


def _prepare_file(path: Path) -> None:
    """Create the folder and the file for their owner alone.

    An existing file is not opened here: closing a descriptor would drop the locks SQLite holds on it in this process.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise EmbeddedStoreError(
            f"cannot create or write {path}: {error.strerror}. Choose a writable path with OUTLAST_EMBEDDED_PATH."
        ) from error


def _keep_in_child() -> None:
    """A forked child must never close its parent's connections, not even at its end: SQLite would act on the file."""
    for database in list(_open):
        for connection in (*database._readers, getattr(database, "_writer", None)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


os.register_at_fork(after_in_child=_keep_in_child)
