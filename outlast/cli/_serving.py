"""Waiting for the signal that ends a command that serves."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class UntilStopped:
    """SIGTERM and SIGINT as an event; a second one ends the process at once."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopped.is_set():
            os._exit(128 + number)
        self._stopped.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the signal, `seconds` at most. Returns whether it has come."""
        return self._stopped.wait(seconds)
