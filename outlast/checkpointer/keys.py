"""Names of records. One case, `[a-z0-9-]` only and short: what every Dapr state store takes."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os


def digest(*parts: str) -> str:
    """Return 26 characters that stand for `parts` (130 bits of SHA-256), whatever characters those have."""
    joined = "\x00".join(f"{len(part)}:{part}" for part in parts)
    raw = hashlib.sha256(joined.encode("utf-8", "surrogatepass")).digest()
    return base64.b32encode(raw).decode("ascii").lower()[:26]


def thread_key(thread_id: str) -> str:
    """Return the key of a thread's head; the keys of its records start with it."""
    return f"t-{digest(thread_id)}"


def run_key(run_id: str) -> str:
    """Return the key of a run's head; the keys of its records start with it."""
    return f"r-{digest(run_id)}"


class RecordNames:
    """Names for immutable records that no other writer, process or restart can ever produce again."""

    def __init__(self) -> None:
        self._pid = 0
        self._writer = ""
        self._count = itertools.count()

    def next(self) -> str:
        """Return the next unused name, relative to the key of its head."""
        pid = os.getpid()
        if self._pid != pid:
            # A forked process must not go on with its parent's names.
            self._writer = base64.b32encode(os.urandom(10)).decode("ascii").lower()
            self._pid = pid
        return f"{self._writer}-{next(self._count)}"
