"""LangGraph on outlast: `DurableGraph`, which `outlast.durable` returns for a compiled graph."""

from outlast.adapters.langgraph.face import DurableGraph

__all__ = ["DurableGraph"]
