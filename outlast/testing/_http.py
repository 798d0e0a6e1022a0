"""The HTTP server and the log that the testing servers are made of."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Json = Any
"""What `json.loads` gives."""


class JsonLines:
    """Records, in memory and, where there is a path, appended to a file as one JSON line each, readable at once.

    Opened on a file that is there already, it starts with what the file holds.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._records: list[dict[str, Json]] = []
        self._lock = threading.Lock()
        if path is not None and path.exists():
            whole, newline, _half_written = path.read_bytes().rpartition(b"\n")
            os.truncate(path, len(whole) + len(newline))
            self._records = [json.loads(line) for line in whole.splitlines()]

    def append(self, record: dict[str, Json]) -> None:
        with self._lock:
            self._records.append(record)
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps(record) + "\n")

    def all(self) -> list[dict[str, Json]]:
        with self._lock:
            return list(self._records)


class BadRequest(Exception):
    """The caller sent something that makes no sense; the message says what."""


class Exchange:
    """One request and the answering of it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: bytes):
        self._handler = handler
        self._body = body
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in handler.headers.items()}

    def json(self) -> Json:
        try:
            return json.loads(self._body)
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None

    def send_json(self, value: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(value).encode(), status, headers)

    def send_bytes(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._start(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})})
        self._handler.wfile.write(body)

    def send_events(self, events: Iterable[str]) -> None:
        """Server-sent events, each flushed as it comes."""
        self._start(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        for event in events:
            self._send_chunk(f"data: {event}\n\n".encode())
        self._send_chunk(b"")

    def send_half(self, body: bytes) -> None:
        """Promise the whole body, send half of it, and break the connection."""
        self._start(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self._handler.wfile.write(body[: len(body) // 2])
        self.drop()

    def drop(self) -> None:
        """Break the connection."""
        self._handler.close_connection = True
        self._handler.wfile.flush()
        try:
            self._handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was first

    def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()

    def _send_chunk(self, data: bytes) -> None:
        self._handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self._handler.wfile.flush()


Route = Callable[[Exchange], None]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for the name of 127.0.0.1
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a caller that was killed is nothing to report
            super().handle_error(request, client_address)


class LocalServer:
    """A threaded HTTP server on loopback. Subclasses fill `routes`: (method, path) → handler."""

    def __init__(self, port: int = 0):
        self.routes: dict[tuple[str, str], Route] = {}
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", port), self._handler_class())
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        exchange = Exchange(handler, body)
        path = handler.path.partition("?")[0]
        route = self.routes.get((handler.command, path))
        try:
            if route is None:
                exchange.send_json(error_body(f"There is no {handler.command} {path} here.", "not_found"), 404)
            else:
                route(exchange)
        except BadRequest as error:
            exchange.send_json(error_body(str(error), "invalid_request_error"), 400)
        except ConnectionError:
            handler.close_connection = True  # the caller is gone, maybe killed: that is what these servers are for

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                server._answer(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        return Handler


def error_body(message: str, kind: str) -> dict[str, Json]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def serve_until_stopped(server: LocalServer) -> None:
    """Run as a process: say where on one line of JSON, and serve until SIGTERM or SIGINT."""

    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with server:
        print(json.dumps({"port": server.port, "url": server.url}), flush=True)  # noqa: T201 - a command's output
        signal.sigwait(ends)


def server_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options every testing server has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes any free one")
    parser.add_argument("--log", type=Path, help="append each call to this file, one line of JSON each")
    return parser
