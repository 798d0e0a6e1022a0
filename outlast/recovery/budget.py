"""Budgets: what a run may spend, checked before the call that would cross it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from outlast.recovery.journal import Record, Usage

_CHARACTERS_A_TOKEN: Final = 4


@dataclass(frozen=True)
class Price:
    """What a model costs, in a currency of yours, for a million tokens."""

    input: float
    output: float


@dataclass(frozen=True)
class Budget:
    """Limits of one run. What is None has no limit.

    Tokens and cost are known after a call only, so the call that would cross a limit is told by an estimate: what was
    used, what the calls in flight are estimated at, and a token for every four characters of the request.

    Attributes:
        tokens: Tokens of model calls, input and output together.
        cost: Cost of model calls, in the currency of `prices`.
        model_calls, tool_calls: Calls made, failed ones included, replayed ones not.
        wall_time: Seconds since the run was submitted, waiting included.
        prices: Price of each model by name; a model without one is an error where `cost` is limited.
        on_limit: `fail` raises BudgetExceededError, `ask` lets the run wait for a person, who may allow more.
    """

    tokens: int | None = None
    cost: float | None = None
    model_calls: int | None = None
    tool_calls: int | None = None
    wall_time: float | None = None
    prices: Mapping[str, Price | tuple[float, float]] = field(default_factory=dict)
    on_limit: Literal["fail", "ask"] = "fail"

    def __post_init__(self) -> None:
        if self.cost is not None and not self.prices:
            raise ValueError("a budget with cost= needs prices={model: (input, output)} for a million tokens each")
        if self.on_limit not in ("fail", "ask"):
            raise ValueError(f"on_limit={self.on_limit!r}: use 'fail' or 'ask'")

    def price(self, usage: Usage) -> float:
        """Return what a call cost.

        Raises:
            ValueError: If no price is given for its model.
        """
        price = self.prices.get(usage.model)
        if price is None:
            # Providers answer with dated names: gpt-4o-2024-08-06 for gpt-4o.
            named = [name for name in self.prices if usage.model.startswith(name)]
            price = self.prices[max(named, key=len)] if named else None
        if price is None:
            raise ValueError(
                f"the budget limits cost, but prices has no entry for model {usage.model!r} "
                f"(it has {', '.join(map(repr, self.prices))})"
            )
        input, output = (price.input, price.output) if isinstance(price, Price) else price
        return (usage.input * input + usage.output * output) / 1_000_000


LIMITS: Final = ("tokens", "cost", "model_calls", "tool_calls", "wall_time")
_COUNTED: Final = {"model": ("tokens", "cost", "model_calls"), "tool": ("tool_calls",)}


class Account:
    """What a run has spent against its budget.

    Args:
        budget: The limits.
        created: Unix time at which the run was submitted.
        records: What its journal holds.

    Attributes:
        grants: How often a person has allowed more.
    """

    def __init__(self, budget: Budget, created: float, records: Iterable[Record] = ()) -> None:
        self.grants = 0
        self._lock = threading.Lock()
        self._budget = budget
        self._created = created
        self._flying: dict[int, dict[str, float]] = {}
        self._spent: dict[str, float] = dict.fromkeys(LIMITS, 0)
        for record in records:
            if record.kind == "grant":
                self.grant(record.value)
            elif record.kind in ("result", "error"):
                self._add(_spending(budget, record.type, record.usage))

    @property
    def unlimited(self) -> bool:
        """Whether nothing is limited."""
        return all(getattr(self._budget, name) is None for name in LIMITS)

    def grant(self, more: Mapping[str, float]) -> None:
        """Raise limits by what a person allowed."""
        self.grants += 1
        with self._lock:
            raised: dict[str, Any] = {
                name: (getattr(self._budget, name) or 0) + value
                for name, value in more.items()
                if name in LIMITS and getattr(self._budget, name) is not None
            }
            self._budget = replace(self._budget, **raised)

    def begin(self, call: object, type: str, model: str, characters: int) -> str | None:
        """Count a call as in flight, or return which limit it would cross, said in words."""
        usage = Usage(max(1, characters // _CHARACTERS_A_TOKEN), 0, model)
        estimate = _spending(self._budget, type, usage, priced=False)
        with self._lock:
            self._spent["wall_time"] = time.time() - self._created
            for name in (*_COUNTED.get(type, ()), "wall_time"):
                limit = getattr(self._budget, name)
                if limit is None:
                    continue
                used = self._spent[name] + sum(flying[name] for flying in self._flying.values())
                if used >= limit or used + estimate[name] > limit:
                    return f"{name}: {used:g} of {limit:g} used, the next call needs about {estimate[name]:g}"
            self._flying[id(call)] = estimate
        return None

    def end(self, call: object, type: str, usage: Usage | None, made: bool = True) -> None:
        """A call has ended, with a result or an error; or, if not `made`, it is not known to have been made."""
        with self._lock:
            self._flying.pop(id(call), None)
        if made:
            self._add(_spending(self._budget, type, usage))

    def _add(self, spending: Mapping[str, float]) -> None:
        with self._lock:
            for name, value in spending.items():
                self._spent[name] += value

    @property
    def spent(self) -> dict[str, float]:
        """What is spent so far, by limit."""
        with self._lock:
            return {**self._spent, "wall_time": time.time() - self._created}


def _spending(budget: Budget, type: str, usage: Usage | None, priced: bool = True) -> dict[str, float]:
    spending: dict[str, float] = dict.fromkeys(LIMITS, 0)
    if type == "model":
        spending["model_calls"] = 1
        if usage:
            spending["tokens"] = usage.input + usage.output
            if budget.cost is not None and (priced or _known(budget, usage.model)):
                spending["cost"] = budget.price(usage)
    elif type == "tool":
        spending["tool_calls"] = 1
    return spending


def _known(budget: Budget, model: str) -> bool:
    return any(model.startswith(name) for name in budget.prices)
