"""Checkpoints of long runs. (Filled in below.)"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Checkpoints:
    def __init__(self, agent: Any, attempt: Any, place: Any, contexts: Any, stretch: int) -> None:
        pass

    async def newest(self) -> Any:
        return None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        yield
