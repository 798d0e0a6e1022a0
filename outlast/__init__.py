"""Make LangGraph graphs and OpenAI Agents runs durable: a `kill -9` at any instant costs nothing."""

from __future__ import annotations
