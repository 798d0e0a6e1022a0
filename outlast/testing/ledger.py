"""A ledger of bookings that counts what it is asked: the effect in the world that must not happen twice.

As a process: `python -m outlast.testing.ledger [--port N] [--log FILE] [--delay SECONDS]` prints one line of JSON with
its port and serves until SIGTERM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outlast.testing._http import BadRequest, Exchange, JsonLines, LocalServer, serve_until_stopped, server_arguments


class LedgerServer(LocalServer):
    """`POST /bookings` with any JSON object books it; `GET /bookings` lists every call.

    A call with the idempotency key of an earlier one (the field `idempotency_key` or the header `Idempotency-Key`) gets
    that one's id again and books nothing, but is recorded as a duplicate. Given the log file of an earlier ledger, it
    knows its bookings. `on_call` is told each call, recorded and not answered yet.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        log: Path | None = None,
        delay: float = 0,
        on_call: Callable[[dict[str, Any]], None] | None = None,
    ):
        super().__init__(port)
        self.delay = delay
        """Seconds between recording a call and answering it: time for the caller to be killed in."""
        self.on_call = on_call
        self._log = JsonLines(log)
        self._lock = threading.Lock()
        self._count = len(self.bookings())
        self._by_key = {booking["key"]: booking["id"] for booking in self.bookings()}
        self.routes = {("POST", "/bookings"): self._book, ("GET", "/bookings"): self._list}

    def calls(self) -> list[dict[str, Any]]:
        """Every call so far: `time`, the booking's `id`, its `key`, whether it is a `duplicate`, and the `request`."""
        return self._log.all()

    def bookings(self) -> list[dict[str, Any]]:
        """The calls that booked something."""
        return [call for call in self.calls() if not call["duplicate"]]

    def _book(self, exchange: Exchange) -> None:
        request = exchange.json()
        if not isinstance(request, dict):
            raise BadRequest("a booking is a JSON object")
        key = request.get("idempotency_key") or exchange.headers.get("idempotency-key")
        with self._lock:
            earlier = self._by_key.get(key) if key else None
            duplicate = earlier is not None
            self._count += not duplicate
            identifier = earlier or f"B-{self._count:04}"
            if key:
                self._by_key[key] = identifier
            call = {"time": time.time(), "id": identifier, "key": key, "duplicate": duplicate, "request": request}
            self._log.append(call)
        if self.on_call is not None:
            self.on_call(call)
        self.stopping.wait(self.delay)
        exchange.send_json({"id": identifier, "duplicate": duplicate}, 200 if duplicate else 201)

    def _list(self, exchange: Exchange) -> None:
        exchange.send_json(self.calls())


def main() -> None:
    parser = server_arguments(__doc__)
    parser.add_argument("--delay", type=float, default=0, help="seconds before each answer, after recording the call")
    args = parser.parse_args()
    serve_until_stopped(LedgerServer(port=args.port, log=args.log, delay=args.delay))


if __name__ == "__main__":
    main()
