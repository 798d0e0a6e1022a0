"""The example's agent as LangChain runs it, without durability: what a durable run of it is compared to."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

import outlast
from outlast.testing import LedgerServer, ScriptedModelServer
from outlast.testing.scripts import WEATHER_REPLIES, weather
from tests.harness.procs import REPOSITORY


@pytest.fixture
def model() -> Any:
    with ScriptedModelServer(weather) as server:
        yield server


@pytest.fixture
def ledger() -> Any:
    with LedgerServer() as server:
        yield server


def test_it_books_once_and_answers(
    model: ScriptedModelServer, ledger: LedgerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", model.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("LEDGER_URL", ledger.url)
    monkeypatch.setattr(outlast, "durable", lambda graph, name: graph, raising=False)
    example = runpy.run_path(str(REPOSITORY / "examples" / "weather_agent.py"))

    result = example["build_graph"]().invoke({"messages": [("user", example["QUESTION"])]})

    assert result["messages"][-1].content == WEATHER_REPLIES[-1].content
    results = [message.content for message in result["messages"] if message.type == "tool"]
    assert results == [
        "rain, 13 °C",
        "sunny, 24 °C",
        "Hotel Mirador",
        "Booked Hotel Mirador for 2 nights: B-0001",
    ]
    assert len(model.requests()) == 4
    assert [call["request"] for call in ledger.bookings()] == [{"hotel": "Hotel Mirador", "nights": 2}]
