"""A thread that removes what has expired now and then, for savers and stores alike."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

logger = logging.getLogger("outlast.store")

MINUTES: Final = 5.0
"""How often, unless told otherwise."""


class Sweeper:
    """Calls `sweep` regularly, on a thread.

    Args:
        sweep: Removes what has expired.
        name: Name of the thread.
    """

    def __init__(self, sweep: Callable[[], object], name: str) -> None:
        self._sweep = sweep
        self._name = name
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, minutes: float) -> Future[None]:
        """Begin, if not begun. Cancelling the future that is returned stops it."""
        future: Future[None] = Future()
        future.add_done_callback(lambda done: self._stop.set() if done.cancelled() else None)
        if self._thread and self._thread.is_alive():
            return future
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(minutes * 60, future), name=self._name, daemon=True)
        self._thread.start()
        return future

    def stop(self, timeout: float | None = None) -> bool:
        """Stop. Returns False if it has not ended within `timeout` seconds."""
        self._stop.set()
        if self._thread:
            self._thread.join(timeout)
        return not (self._thread and self._thread.is_alive())

    def _run(self, seconds: float, future: Future[None]) -> None:
        while not self._stop.wait(seconds):
            try:
                self._sweep()
            except Exception:
                logger.exception("what has expired could not be swept; trying again in %.0f s", seconds)
        if not future.done():
            future.set_result(None)
