"""Checkpoints in Dapr state stores: the state layout, and LangGraph's checkpointer on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlast.checkpointer.saver import DaprSaver

__all__ = ["DaprSaver"]


def __getattr__(name: str) -> Any:
    # Lazy: the layout under the saver is used without LangGraph, too.
    if name != "DaprSaver":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from outlast.checkpointer.saver import DaprSaver
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"DaprSaver needs LangGraph ({error.name} is missing): pip install 'outlast[langgraph]'", name=error.name
        ) from error
    return DaprSaver
