"""A model that says what a script tells it, behind OpenAI's HTTP API.

As a process: `python -m outlast.testing.model_server --script module:attribute [--port N] [--log FILE]` prints one line
of JSON with its port and serves until SIGTERM.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outlast.testing import chat, faults
from outlast.testing._http import (
    BadRequest,
    Exchange,
    JsonLines,
    LocalServer,
    error_body,
    serve_until_stopped,
    server_arguments,
)
from outlast.testing.chat import Reply, Script
from outlast.testing.faults import Fault


class ScriptedModelServer(LocalServer):
    """An OpenAI-compatible server with a scripted model: chat completions, plain and streaming, and faults on demand.

        with ScriptedModelServer([Reply("Hello!")]) as server:
            ChatOpenAI(model="scripted", base_url=server.base_url, api_key="none").invoke("Hi")
            assert len(server.requests()) == 1

    Each call is recorded when it arrives, before it is answered: what is counted is what would be paid for. Given the
    log file of an earlier server, it goes on counting where that one stopped. `on_call` is told each call, recorded and
    not answered yet.
    """

    def __init__(
        self,
        script: Script,
        *,
        port: int = 0,
        log: Path | None = None,
        on_call: Callable[[dict[str, Any]], None] | None = None,
    ):
        super().__init__(port)
        self.on_call = on_call
        self._script = script
        self._log = JsonLines(log)
        self._faults = faults.FaultPlan()
        self._lock = threading.Lock()
        self._calls = len(self.requests())
        self._answered = sum(record["fault"] is None for record in self.requests())
        self.routes = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("GET", "/v1/models"): self._models,
            ("GET", "/_control/requests"): lambda exchange: exchange.send_json(self.requests()),
            ("POST", "/_control/faults"): self._plan,
            ("DELETE", "/_control/faults"): self._forget,
        }

    @property
    def base_url(self) -> str:
        """For `OPENAI_BASE_URL`."""
        return f"{self.url}/v1"

    def requests(self) -> list[dict[str, Any]]:
        """Every model call so far: `call` (its number), `time`, `stream`, `fault` (None: answered) and `request`."""
        return self._log.all()

    def fail(self, *planned: Fault) -> None:
        """Plan faults. Another process does the same with `POST /_control/faults`."""
        self._faults.add(*planned)

    def _chat(self, exchange: Exchange) -> None:
        request = exchange.json()
        if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
            raise BadRequest("a chat completion request needs a list of messages")
        streaming = bool(request.get("stream"))
        with self._lock:
            call, answered = self._calls, self._answered
            fault = self._faults.take(call)
            self._calls += 1
            self._answered += fault is None
            record: dict[str, Any] = {"call": call, "time": time.time(), "stream": streaming}
            record |= {"fault": fault and fault.kind, "request": request}
            self._log.append(record)
        if self.on_call is not None:
            self.on_call(record)
        if fault is not None and fault.kind == "status":
            return faults.send_status(fault, exchange)
        if fault is not None and fault.kind == "hang":
            self.stopping.wait(fault.seconds)
            return exchange.drop()
        if fault is not None and fault.kind == "malformed":
            return exchange.send_bytes(b'{"id": "chatcmpl-broken", "choices": [{')
        try:
            reply = chat.choose(self._script, request, answered)
        except LookupError as error:
            return exchange.send_json(error_body(f"No reply: {error}.", "script_exhausted"), 400)
        self.stopping.wait(reply.delay)
        self._send(exchange, reply, request, f"chatcmpl-{call}", broken=fault is not None)

    def _send(self, exchange: Exchange, reply: Reply, request: dict[str, Any], identifier: str, broken: bool) -> None:
        if request.get("stream"):
            events = list(chat.chunks(reply, request, identifier))
            if broken:
                return exchange.send_events(self._interrupted(exchange, events[: len(events) // 2]))
            return exchange.send_events(self._paced(events, reply.chunk_delay))
        body = chat.completion(reply, request, identifier)
        if broken:
            return exchange.send_half(json.dumps(body).encode())
        exchange.send_json(body)

    def _paced(self, events: list[str], pause: float) -> Iterator[str]:
        for event in events:
            self.stopping.wait(pause)
            yield event

    def _interrupted(self, exchange: Exchange, events: list[str]) -> Iterator[str]:
        yield from events
        exchange.drop()
        raise ConnectionAbortedError("a scripted fault: drop")

    def _models(self, exchange: Exchange) -> None:
        model = {"id": "scripted", "object": "model", "created": 0, "owned_by": "outlast"}
        exchange.send_json({"object": "list", "data": [model]})

    def _plan(self, exchange: Exchange) -> None:
        planned = faults.parse(exchange.json())
        self.fail(*planned)
        exchange.send_json({"planned": len(planned)}, 201)

    def _forget(self, exchange: Exchange) -> None:
        self._faults.clear()
        exchange.send_json({"planned": 0})


def load_script(name: str) -> Script:
    """The script that `module:attribute` names."""
    module, _, attribute = name.partition(":")
    script: Script = getattr(importlib.import_module(module), attribute)
    return script


def main() -> None:
    parser = server_arguments(__doc__)
    parser.add_argument("--script", required=True, help="module:attribute of a list of replies or a function")
    args = parser.parse_args()
    serve_until_stopped(ScriptedModelServer(load_script(args.script), port=args.port, log=args.log))


if __name__ == "__main__":
    main()
