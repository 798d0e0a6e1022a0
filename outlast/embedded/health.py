"""The HTTP side: only the health endpoints that Dapr's SDK waits for."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_GET(self) -> None:
        healthy = self.path.partition("?")[0] in ("/v1.0/healthz", "/v1.0/healthz/outbound")
        self.send_response(204 if healthy else 404)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a health check is not news."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    address_family = socket.AF_INET

    def server_bind(self) -> None:
        # The base class looks the host name up, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that goes away in the middle is its own affair."""


class HealthServer:
    """Answers 204 while it runs.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = _Server((host, port), _Handler)
        self.port = int(self._server.server_address[1])
        self._host = host
        self._stopped = False
        threading.Thread(target=self._run, name="outlast-health", daemon=True).start()

    def _run(self) -> None:
        while not self._stopped:
            self._server.handle_request()  # sleeps until a request comes; serve_forever would poll
        self._server.server_close()

    def stop(self) -> None:
        """Stop answering. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(OSError):  # one last connection wakes the loop
            socket.create_connection((self._host, self.port), timeout=1).close()
