"""A proxy between an agent and its model: counts calls, answers again what it has heard, misbehaves on demand."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, Self

_HOP: Final = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding", "accept-encoding"})
_LONGEST_PAUSE: Final = 2.0


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        status, headers, body: Of the HTTP response.
        seconds: How long it took.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    seconds: float


@dataclass(frozen=True)
class Misbehaviour:
    """What goes wrong with the calls from number `at` on, `times` times.

    `rate-limit` answers 429 with `Retry-After`; `drop-model` breaks the connection in the middle of the answer.
    """

    kind: Literal["rate-limit", "drop-model"]
    at: int
    times: int
    retry_after: float = 1.0


@dataclass
class Calls:
    """The calls of one run: when, and whether they were answered."""

    made: list[tuple[float, bool]] = field(default_factory=list)
    misbehaviour: Misbehaviour | None = None

    @property
    def answered(self) -> int:
        return sum(well for _, well in self.made)


class ModelProxy:
    """Serves on loopback. One run at a time: `begin` starts counting for the next.

    Args:
        upstream: The model's base URL.
        replay: Whether a request that was answered before gets the same answer again, without asking the model.
    """

    def __init__(self, upstream: str, replay: bool = True) -> None:
        self._upstream = upstream.rstrip("/")
        self._replay = replay
        self._heard: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self.calls = Calls()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The base URL for the agent."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def begin(self, misbehaviour: Misbehaviour | None = None) -> Calls:
        """Count the calls of a new run."""
        with self._lock:
            self.calls = Calls(misbehaviour=misbehaviour)
            return self.calls

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            calls = self.calls
            wrong = calls.misbehaviour
            hit = wrong is not None and wrong.at <= len(calls.made) < wrong.at + wrong.times
            calls.made.append((time.time(), not hit))
        if wrong is not None and hit and wrong.kind == "rate-limit":
            text = json.dumps({"error": {"message": "rate limit (injected by outlast chaos)", "type": "rate_limit"}})
            headers = (("Content-Type", "application/json"), ("Retry-After", f"{wrong.retry_after:g}"))
            return _send(handler, Answer(429, headers, text.encode(), 0), False)
        _send(handler, self._answer(handler, body), hit)

    def _answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> Answer:
        digest = hashlib.sha256(f"{handler.command} {handler.path}\n".encode() + body).hexdigest()
        known = self._heard.get(digest) if self._replay else None
        if known is not None:
            # At the model's own pace, so that a run is disturbed in the middle of things.
            time.sleep(min(known.seconds, _LONGEST_PAUSE))
            return known
        answer = self._ask(handler, body)
        if answer.status == 200:
            self._heard[digest] = answer
        return answer

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes) -> Answer:
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP}
        url = self._upstream + handler.path
        request = urllib.request.Request(url, body or None, headers, method=handler.command)
        started = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return _heard(reply, started)
        except urllib.error.HTTPError as error:
            with error:
                return _heard(error, started)
        except OSError as error:
            text = json.dumps({"error": {"message": f"outlast chaos: the model at {url} does not answer: {error}"}})
            return Answer(502, (("Content-Type", "application/json"),), text.encode(), 0)


def _heard(reply: Any, started: float) -> Answer:
    body = reply.read()
    headers = tuple((name, value) for name, value in reply.headers.items() if name.lower() not in _HOP)
    return Answer(reply.status, headers, body, time.monotonic() - started)


def _send(handler: BaseHTTPRequestHandler, answer: Answer, broken: bool) -> None:
    handler.send_response(answer.status)
    for name, value in answer.headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(answer.body)))
    handler.end_headers()
    handler.wfile.write(answer.body[: len(answer.body) // 2] if broken else answer.body)
    if broken:
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)


def _handler(proxy: ModelProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            try:
                proxy.serve(self)
            except (OSError, http.client.HTTPException):
                # The agent is gone, maybe killed, or the connection was broken on purpose.
                self.close_connection = True

        do_GET = do_DELETE = do_PUT = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler
