"""Faults on demand: what can go wrong between an agent and its model."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from outlast.testing._http import BadRequest, Exchange, Json, error_body


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a call instead of an answer.

    `status`: an error status (429 with `retry_after` seconds, 500, …); `drop`: the connection breaks in the middle of
    the answer; `hang`: nothing comes for `seconds`, then the connection breaks; `malformed`: an answer that is no JSON.
    """

    kind: Literal["status", "drop", "hang", "malformed"] = "status"
    status: int = 500
    retry_after: float | None = None
    seconds: float = 3600
    at_call: int | None = None
    """The call it befalls, counted from 0 and from the first the server ever got; None: whichever comes next."""
    times: int = 1
    """How many calls in a row it befalls."""


class FaultPlan:
    """The faults that are still to come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[tuple[Fault, int]] = []  # with the number of times left

    def add(self, *faults: Fault) -> None:
        with self._lock:
            self._pending += [(fault, fault.times) for fault in faults]

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()

    def take(self, call: int) -> Fault | None:
        """The fault for this call, used up by asking."""
        with self._lock:
            for index, (fault, left) in enumerate(self._pending):
                if fault.at_call is not None and not fault.at_call <= call < fault.at_call + fault.times:
                    continue
                self._pending[index : index + 1] = [(fault, left - 1)] if left > 1 else []
                return fault
        return None


def parse(value: Json) -> list[Fault]:
    """One fault or a list of them, from JSON."""
    try:
        return _FAULTS.validate_python(value if isinstance(value, list) else [value])
    except ValidationError as error:
        raise BadRequest(f"not a fault: {error}") from None


def send_status(fault: Fault, exchange: Exchange) -> None:
    kind = "rate_limit_exceeded" if fault.status == 429 else "server_error"
    headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
    exchange.send_json(error_body(f"A scripted fault: status {fault.status}.", kind), fault.status, headers)


_FAULTS = TypeAdapter(list[Fault])
