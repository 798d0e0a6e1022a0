"""Mends of LangGraph that a durable run needs. Each names the upstream trap and is harmless once that is gone."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, cast

from langgraph.pregel._loop import PregelLoop


class _Saved:
    """A save that is done: what both the sync and the async loop may wait for."""

    def result(self) -> None:
        return None

    def __await__(self) -> Generator[Any, None, None]:
        yield from ()


def apply() -> None:
    """Let loops without a checkpointer wait for a save that they never made.

    With `durability="sync"`, which subgraphs inherit, LangGraph 1.2 waits for `loop._put_checkpoint_fut` after each
    superstep; a subgraph compiled with `checkpointer=False` has none and raises AttributeError.
    """
    if not hasattr(PregelLoop, "_put_checkpoint_fut"):
        PregelLoop._put_checkpoint_fut = cast(Any, _Saved())
