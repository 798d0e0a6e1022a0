from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from outlast.testing import LedgerServer
from tests.harness.procs import Child


def book(url: str, headers: dict[str, str] | None = None, **booking: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{url}/bookings", json=booking, headers=headers).raise_for_status().json()
    return answer


def test_each_call_without_a_key_books() -> None:
    with LedgerServer() as ledger:
        assert book(ledger.url, hotel="Mirador", nights=2) == {"id": "B-0001", "duplicate": False}
        assert book(ledger.url, hotel="Mirador", nights=2) == {"id": "B-0002", "duplicate": False}
        assert [call["request"]["hotel"] for call in ledger.bookings()] == ["Mirador", "Mirador"]


def test_the_same_key_books_once_and_is_counted_twice() -> None:
    with LedgerServer() as ledger:
        book(ledger.url, hotel="Other")
        first = book(ledger.url, hotel="Mirador", idempotency_key="k1")
        again = book(ledger.url, {"Idempotency-Key": "k1"}, hotel="Mirador")
        assert again == {"id": first["id"], "duplicate": True}
        assert [call["duplicate"] for call in ledger.calls()] == [False, False, True]
        assert len(ledger.bookings()) == 2
        assert httpx.get(f"{ledger.url}/bookings").json() == ledger.calls()


def test_the_same_key_at_once_books_once() -> None:
    with LedgerServer() as ledger, ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: book(ledger.url, idempotency_key="k"), range(30)))
    assert {answer["id"] for answer in answers} == {"B-0001"}
    assert sum(not answer["duplicate"] for answer in answers) == 1


def test_what_is_no_booking_is_refused() -> None:
    with LedgerServer() as ledger:
        assert httpx.post(f"{ledger.url}/bookings", json=["Mirador"]).status_code == 400
        assert ledger.calls() == []


def test_a_call_is_recorded_before_its_answer_is_delayed() -> None:
    with LedgerServer(delay=0.5) as ledger, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(book, ledger.url)
        while not ledger.calls():
            time.sleep(0.01)
        assert not answer.done()
        assert answer.result()["id"] == "B-0001"


def test_a_restarted_process_knows_its_bookings(tmp_path: Path) -> None:
    log = tmp_path / "bookings.jsonl"
    answers = []
    for _start in range(2):
        with Child.python("-m", "outlast.testing.ledger", "--log", log, log=tmp_path / "out") as child:
            url = json.loads(child.wait_for_line(r"^\{.*\}$")[0])["url"]
            answers.append(book(url, idempotency_key="k"))
    assert answers == [{"id": "B-0001", "duplicate": False}, {"id": "B-0001", "duplicate": True}]


def test_a_call_is_told_while_its_answer_is_awaited() -> None:
    told: list[Any] = []
    with LedgerServer(on_call=told.append) as ledger:
        book(ledger.url, hotel="Mirador")
        assert told == ledger.calls()
