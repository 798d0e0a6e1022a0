"""The server behind each state store component, as the real product or as the stand-in that is named.

Each entry of `STORES` is a context manager that yields the component to reach its server with. What cannot be started
raises `CannotStart` with the reason, which becomes the reason of the skip.
"""

from __future__ import annotations

from tests.stores import sound, unsound  # noqa: F401  they enter their stores in the list
from tests.stores.starting import STORES, CannotStart, Store

__all__ = ["STORES", "CannotStart", "Store"]
