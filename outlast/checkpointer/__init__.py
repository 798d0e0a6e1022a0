"""Checkpoints in Dapr state stores: the state layout, and LangGraph's checkpointer and long-term store on it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlast.checkpointer.saver import DaprSaver
    from outlast.checkpointer.store import DaprStore

__all__ = ["DaprSaver", "DaprStore"]


def __getattr__(name: str) -> Any:
    # Lazy: the layout under the saver is used without LangGraph, too.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "saver" if name == "DaprSaver" else "store"
    try:
        return getattr(importlib.import_module(f"outlast.checkpointer.{module}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs LangGraph ({error.name} is missing): pip install 'outlast[langgraph]'", name=error.name
        ) from error
