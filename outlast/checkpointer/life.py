"""How long a thread lives: its time to live is kept in its head, so that a thread goes as a whole or not at all.

Nothing is left to the store's own TTL: it would take away records that other versions share, some components ignore
it, and reads extend it. A thread past its time does not exist any more for readers and writers; `sweep` removes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

_STEP: Final = 0.01
"""Part of its time to live by which an expiry must move for a read to write it."""

Wish = Callable[["Life | None"], "Life | None"]
"""What a writer wants a thread's life to be, given what it was; the time of expiry is set after that."""


def now() -> float:
    """Return the time, in seconds."""
    return time.time()


@dataclass(frozen=True)
class Life:
    """The time to live of a thread.

    Attributes:
        minutes: Time to live after each use; None for ever.
        own: Whether it was set for this thread, so that the default of a saver is not for it.
        until: When the thread expires, in seconds; None for never.
    """

    minutes: float | None
    own: bool = False
    until: float | None = None

    def body(self) -> list[Any]:
        return [self.minutes, self.own, self.until]

    def renewed(self) -> Life:
        """Return this life, begun anew."""
        return replace(self, until=None if self.minutes is None else now() + self.minutes * 60)

    @property
    def stale(self) -> bool:
        """Whether a use of the thread now makes a difference worth writing."""
        if self.minutes is None or self.until is None:
            return False
        return now() + self.minutes * 60 - self.until > max(1.0, self.minutes * 60 * _STEP)


def keep(life: Life | None) -> Life | None:
    """Wish for nothing."""
    return life


def own(minutes: float | None) -> Wish:
    """Wish for a time to live for one thread; None for ever."""
    return lambda _: Life(minutes, own=True)


def default(minutes: float | None) -> Wish:
    """Wish for a time to live for threads that have none of their own; None leaves them as they are."""

    def wish(life: Life | None) -> Life | None:
        return life if minutes is None or (life and life.own) else Life(minutes)

    return wish


def checked(minutes: Any, where: str) -> float | None:
    """Return a time to live in minutes as it was given.

    Raises:
        ValueError: If it is none.
    """
    if minutes is None:
        return None
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < float("inf"):
        raise ValueError(f"{where} is {minutes!r}: give a positive number of minutes, or None for ever")
    return float(minutes)


def wish_of(configurable: Mapping[str, Any]) -> Wish | None:
    """Return what the config of a call wishes for its thread, if anything."""
    if "ttl" not in configurable:
        return None
    return own(checked(configurable["ttl"], "the thread's `ttl` in the config"))
