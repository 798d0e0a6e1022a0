"""DaprSaver passes all of LangGraph's own base conformance tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from langgraph.checkpoint.conformance import checkpointer_test, validate

from outlast.checkpointer import DaprSaver

pytestmark = [pytest.mark.acceptance, pytest.mark.usefixtures("sidecar_env")]

BASE = {"put", "put_writes", "get_tuple", "list", "delete_thread"}


async def test_all_58_base_tests_pass() -> None:
    @checkpointer_test(name="DaprSaver")
    async def saver() -> AsyncIterator[DaprSaver]:
        yield DaprSaver("statestore")

    report = await validate(saver)
    results = {name: result for name, result in report.results.items() if name in BASE}
    assert set(results) == BASE
    failures = [failure for result in results.values() for failure in result.failures]
    assert not failures
    assert sum(result.tests_passed for result in results.values()) == 58
    assert report.passed_all_base()
