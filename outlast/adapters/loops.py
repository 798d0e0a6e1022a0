"""Event loops that async runs are carried out on."""

from __future__ import annotations

import asyncio
import threading
from typing import Final

_PATIENCE: Final = 1.0
_LOCK: Final = threading.Lock()
_background: asyncio.AbstractEventLoop | None = None


def choose(callers: asyncio.AbstractEventLoop | None) -> asyncio.AbstractEventLoop:
    """Return the loop of the caller while it turns, else one in the background."""
    if callers is not None and callers.is_running() and _turns(callers):
        return callers
    return background()


def background() -> asyncio.AbstractEventLoop:
    """Return the loop of async runs whose submitter is not here; a new one if something blocks it."""
    global _background
    with _LOCK:
        if _background is None or not _background.is_running() or not _turns(_background):
            loop = asyncio.new_event_loop()
            ready = threading.Event()

            def serve() -> None:
                loop.call_soon(ready.set)
                loop.run_forever()

            threading.Thread(target=serve, name="outlast-loop", daemon=True).start()
            ready.wait()
            _background = loop
        return _background


def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    turned = threading.Event()
    try:
        loop.call_soon_threadsafe(turned.set)
    except RuntimeError:
        return False
    return turned.wait(_PATIENCE)
