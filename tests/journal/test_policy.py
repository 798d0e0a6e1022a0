"""Rules of retries, breakers and budgets by themselves."""

from __future__ import annotations

import email.utils
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from outlast import (
    Budget,
    BudgetExceededError,
    CircuitBreaker,
    CircuitOpenError,
    Policies,
    Price,
    StepPolicy,
    allow,
    fail,
)
from outlast.recovery.budget import Account
from outlast.recovery.journal import Usage
from outlast.recovery.policy import Breakers, RetryPolicy, retry_after, transient
from outlast.recovery.runtime import Runtime
from tests.journal.test_langchain import Model
from tests.journal.test_steps import run

REQUEST = httpx2.Request("POST", "http://localhost/v1/chat/completions")


def rate_limit(**headers: str) -> openai.RateLimitError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return openai.RateLimitError("slow", response=httpx2.Response(429, headers=named, request=REQUEST), body=None)


def status(code: int) -> openai.APIStatusError:
    return openai.APIStatusError("no", response=httpx2.Response(code, request=REQUEST), body=None)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (openai.APIConnectionError(request=REQUEST), True),
        (openai.APITimeoutError(REQUEST), True),
        (rate_limit(), True),
        (status(500), True),
        (status(503), True),
        (status(408), True),
        (status(400), False),
        (status(401), False),
        (httpx2.ConnectError("no"), True),
        (ValueError("no"), False),
    ],
)
def test_what_is_worth_trying_again(error: Exception, again: bool) -> None:
    assert transient(error) is again


def test_what_a_server_asks_to_wait() -> None:
    assert retry_after(rate_limit(retry_after="7")) == 7
    assert retry_after(rate_limit(retry_after_ms="1500", retry_after="7")) == 1.5
    later = retry_after(rate_limit(retry_after=email.utils.formatdate(time.time() + 100, usegmt=True)))
    assert later is not None
    assert 90 < later < 101
    assert retry_after(rate_limit(retry_after=email.utils.formatdate(time.time() - 100, usegmt=True))) == 0
    assert retry_after(rate_limit()) is None
    assert retry_after(rate_limit(retry_after="soon")) is None
    assert retry_after(ValueError()) is None


def test_waits() -> None:
    policy = RetryPolicy(attempts=4, backoff=1, factor=3, max_backoff=5, jitter=0)
    assert [policy.wait(ConnectionError(), tries) for tries in (1, 2, 3, 4)] == [1, 3, 5, None]
    assert policy.wait(ValueError(), 1) is None
    assert policy.wait(rate_limit(retry_after="60"), 1) == 60
    assert policy.wait(rate_limit(retry_after="0"), 2) == 3
    own = RetryPolicy(retry_on=(ValueError,), backoff=1, jitter=0.5)
    waits = {own.wait(ValueError(), 1) for _ in range(50)}
    assert len(waits) > 1
    assert all(wait is not None and 0.5 <= wait <= 1 for wait in waits)
    assert RetryPolicy(retry_on=lambda error: "again" in str(error)).wait(ValueError("again"), 1) is not None


def test_the_narrower_policy_goes_first() -> None:
    policies = Policies(
        tools=StepPolicy(timeout=30, on_in_doubt="fail"),
        named={"refund": StepPolicy(on_in_doubt="ask")},
    )
    assert policies.of("tool", "refund") == StepPolicy(timeout=30, on_in_doubt="ask")
    assert policies.of("tool", "other") == StepPolicy(timeout=30, on_in_doubt="fail")
    assert policies.of("function", "refund", StepPolicy(timeout=5, on_in_doubt="retry")) == StepPolicy(
        timeout=5, on_in_doubt="ask"
    )
    assert policies.of("model", "any") == StepPolicy()


def test_a_breaker_lets_one_call_through_to_see() -> None:
    breakers, breaker = Breakers(), CircuitBreaker(failures=2, reset_after=0.05)
    for failed in (True, False, True, True):
        breakers.enter("there", breaker)
        breakers.left("there", breaker, failed)
    with pytest.raises(CircuitOpenError, match="there failed 2 times in a row") as raised:
        breakers.enter("there", breaker)
    assert 0 < raised.value.retry_after <= 0.1
    assert transient(raised.value)
    breakers.enter("elsewhere", breaker)
    time.sleep(0.06)
    breakers.enter("there", breaker)
    with pytest.raises(CircuitOpenError):
        breakers.enter("there", breaker)
    breakers.left("there", breaker, failed=None)
    breakers.enter("there", breaker)
    breakers.left("there", breaker, failed=False)
    breakers.enter("there", breaker)
    breakers.left("there", breaker, failed=True)
    breakers.enter("there", breaker)


def test_an_account_counts_what_is_in_flight() -> None:
    account = Account(Budget(tokens=100, model_calls=3), time.time())
    one, two, three = object(), object(), object()
    assert account.begin(one, "model", "m", 160) is None
    assert account.begin(two, "model", "m", 160) is None
    assert account.begin(three, "model", "m", 160) == "tokens: 80 of 100 used, the next call needs about 40"
    account.end(one, "model", Usage(5, 5, "m"))
    assert account.begin(three, "model", "m", 160) is None
    account.end(two, "model", None, made=False)
    account.end(three, "model", Usage(10, 75, "m"))
    assert account.spent["tokens"] == 95
    assert account.spent["model_calls"] == 2
    assert account.begin(one, "model", "m", 30) == "tokens: 95 of 100 used, the next call needs about 7"
    account.grant({"tokens": 50, "cost": 7})
    assert account.begin(one, "model", "m", 30) is None
    account.end(one, "model", None)
    assert "model_calls: 3 of 3 used" in str(account.begin(one, "model", "m", 4))
    assert account.begin(one, "tool", "t", 4000) is None


def test_cost() -> None:
    budget = Budget(cost=1.0, prices={"gpt-4o": (2.5, 10.0), "gpt-4o-mini": Price(0.15, 0.6)})
    assert budget.price(Usage(1_000_000, 100_000, "gpt-4o-2024-08-06")) == 3.5
    assert budget.price(Usage(1_000_000, 0, "gpt-4o-mini")) == 0.15
    with pytest.raises(ValueError, match=r"no entry for model 'o9'.*'gpt-4o'"):
        budget.price(Usage(1, 1, "o9"))
    with pytest.raises(ValueError, match="prices="):
        Budget(cost=1.0)
    account = Account(budget, time.time())
    call = object()
    assert account.begin(call, "model", "gpt-4o", 400) is None
    account.end(call, "model", Usage(200_000, 60_000, "gpt-4o"))
    assert account.spent["cost"] == pytest.approx(1.1)
    assert str(account.begin(call, "model", "gpt-4o", 400)).startswith("cost: 1.1 of 1 used")


def test_wall_time() -> None:
    account = Account(Budget(wall_time=10), time.time() - 11)
    assert str(account.begin(object(), "function", "f", 1)).startswith("wall_time: 11")


# --- in a run


def test_a_budget_of_tokens_asks_and_goes_on(runtime: Runtime, name: Callable[[], str]) -> None:
    model = Model()

    def body(_: Any) -> list[str]:
        return [str(model.invoke(f"question {number}").content) for number in range(4)]

    handle = run(runtime, name(), body, budget=Budget(model_calls=2, on_limit="ask"))
    asked = handle.result(20)
    assert asked["__interrupt__"][0].value["kind"] == "budget"
    question = handle.question()
    assert question is not None
    assert (question.kind, question.step) == ("budget", "backwards-1")
    assert model.counts == {"invoke": 2}
    handle.answer(allow(model_calls=1))
    handle.result(20)
    assert handle.status() == "waiting"
    handle.answer(allow(model_calls=5))
    assert len(handle.result(20)["out"]) == 4
    assert model.counts == {"invoke": 4}


def test_a_budget_that_is_not_raised(runtime: Runtime, name: Callable[[], str]) -> None:
    model = Model()
    handle = run(runtime, name(), lambda _: model.invoke("x"), budget=Budget(model_calls=0, on_limit="ask"))
    handle.result(20)
    handle.answer(fail())
    with pytest.raises(BudgetExceededError, match="model_calls: 0 of 0 used"):
        handle.result(20)
    assert model.counts == {}


def test_two_owners_of_retries_are_told(
    runtime: Runtime, name: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    class Retrying(Model):
        max_retries: int = 2

    policies = Policies(models=StepPolicy(retry=RetryPolicy()))
    with caplog.at_level(logging.WARNING, "outlast.steps"):
        for _ in range(2):
            run(runtime, name(), lambda _: Retrying(model="twice").invoke("x"), policies=policies).result(20)
    told = [record.getMessage() for record in caplog.records if "max_retries" in record.getMessage()]
    assert len(told) == 1
    assert "model twice retries by itself (max_retries=2)" in told[0]
