"""Who else uses the file: a lock per sidecar that the kernel frees at its death, and wake-up pings between them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("outlast.embedded")

_LOCK_SUFFIX = ".lock"
_HELLO = b"hello"
_SOCKET_PATH_LIMIT = 100  # sun_path holds 104 bytes on macOS, 108 on Linux

# flock, not POSIX locks: those of two processes that watch each other are refused as a deadlock, and closing any
# descriptor of the file would drop them. A lock taken with flock lives as long as any copy of its descriptor, so
# forked children close theirs (`_close_in_child`).
_held: set[int] = set()


class Presence:
    """This sidecar's entry among those that share the file.

    Args:
        folder: The folder of lock files beside the database.
        on_ping: Called (in a thread of this object) when another sidecar changed something.
        on_death: Called with the id of a sidecar that is gone, in a thread of this object.
    """

    def __init__(self, folder: Path, on_ping: Callable[[], None], on_death: Callable[[str], None]) -> None:
        self.id = uuid.uuid4().hex
        self._folder = folder
        self._on_ping = on_ping
        self._on_death = on_death
        self._peers: dict[str, str] = {}
        self._mutex = threading.Lock()
        self._closed = threading.Event()
        self._greeted = False
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket_path = folder / f"{self.id}.sock"
        if len(os.fsencode(self._socket_path)) > _SOCKET_PATH_LIMIT:
            self._socket_path = Path(tempfile.gettempdir()) / f"outlast-{self.id}.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(self._socket_path))
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        self._lock_path = folder / f"{self.id}{_LOCK_SUFFIX}"
        # Locked under another name first: a lock file that others can see but nobody holds means a dead sidecar.
        unborn = folder / f"{self.id}.tmp"
        self._lock_file = os.open(unborn, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _held.add(self._lock_file)
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        os.write(self._lock_file, os.fsencode(self._socket_path))
        os.rename(unborn, self._lock_path)

    def start(self) -> None:
        """Begin to listen for pings."""
        threading.Thread(target=self._listen, name="outlast-pings", daemon=True).start()

    @property
    def has_peers(self) -> bool:
        """Whether another sidecar shares the file now."""
        return bool(self._peers)

    def unmet(self) -> bool:
        """Whether a newcomer has said hello since the last `rescan`."""
        return self._greeted

    def rescan(self) -> set[str]:
        """Look for sidecars that came since; returns the ids of all that may be alive, this one included."""
        self._greeted = False
        alive = {self.id}
        for entry in self._folder.glob(f"*{_LOCK_SUFFIX}"):
            peer = entry.name.removesuffix(_LOCK_SUFFIX)
            alive.add(peer)
            with self._mutex:
                if peer == self.id or peer in self._peers or self._closed.is_set():
                    continue
                self._peers[peer] = ""
            self._meet(peer, entry)
        return alive

    def _meet(self, peer: str, lock_path: Path) -> None:
        try:
            descriptor = os.open(lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # it has left between the listing and now
            with self._mutex:
                self._peers.pop(peer, None)
            return
        _held.add(descriptor)
        address = os.fsdecode(os.pread(descriptor, 4096, 0))
        with self._mutex:
            self._peers[peer] = address
        arguments = (peer, lock_path, descriptor, address)
        threading.Thread(target=self._watch, args=arguments, name="outlast-watch", daemon=True).start()
        self._send(address, _HELLO)

    def _watch(self, peer: str, lock_path: Path, descriptor: int, address: str) -> None:
        """Sleep in the kernel until the owner of a lock file is gone, then clean up after it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # shared: all that watch the same file wake at once
        except OSError:
            logger.exception("cannot watch the lock file %s", lock_path)
            return
        finally:
            _held.discard(descriptor)
            os.close(descriptor)
        lock_path.unlink(missing_ok=True)
        Path(address).unlink(missing_ok=True)
        try:
            self._lost(peer)
        except Exception:
            logger.exception("could not take over the work of a sidecar that is gone")

    def _lost(self, peer: str) -> None:
        with self._mutex:
            if self._closed.is_set() or self._peers.pop(peer, None) is None:
                return
        self._on_death(peer)

    def ping(self) -> None:
        """Tell every other sidecar to look at the file again. Never blocks."""
        for address in list(self._peers.values()):
            self._send(address)

    def _send(self, address: str, message: bytes = b"!") -> None:
        # A full queue means a ping is already waiting there; a missing socket means its owner is gone.
        with contextlib.suppress(OSError):
            self._sender.sendto(message, address)

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                messages = {self._socket.recv(16)}
            except OSError:
                return
            self._socket.setblocking(False)
            with contextlib.suppress(OSError):
                while True:
                    messages.add(self._socket.recv(16))
            self._socket.setblocking(True)
            if self._closed.is_set():
                return
            if _HELLO in messages:
                self._greeted = True
            try:
                self._on_ping()
            except Exception:
                logger.exception("could not handle the ping of another sidecar")

    def close(self) -> None:
        """Leave: remove the lock file, then free the lock, and tell the others. Idempotent."""
        with self._mutex:
            if self._closed.is_set():
                return
            self._closed.set()
        self._lock_path.unlink(missing_ok=True)
        self._send(os.fspath(self._socket_path))  # ends the listener
        _held.discard(self._lock_file)
        os.close(self._lock_file)
        self._socket_path.unlink(missing_ok=True)
        self._sender.close()


def _close_in_child() -> None:
    """A forked child must not keep its parent's locks alive; it runs none of the threads here."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
