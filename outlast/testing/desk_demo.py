"""`make demo-openai`: the support desk of examples/, killed with SIGKILL at the worst moments, with local servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outlast.testing.chat import Reply, ToolCall
from outlast.testing.ledger import LedgerServer
from outlast.testing.model_server import ScriptedModelServer


def script(request: Mapping[str, Any], answered: int) -> Reply:
    """What the model of examples/support_desk.py says; it depends on the conversation alone."""
    called = {call["function"]["name"] for message in request["messages"] for call in message.get("tool_calls") or ()}
    if "refund" in called:
        return Reply("I am sorry about the vase. Your 40 euros are on their way.")
    if "transfer_to_refunds" in called:
        return Reply(tool_calls=[ToolCall("refund", {"order": "A-1", "amount": 40}, "refund")])
    if "find_order" in called:
        return Reply(tool_calls=[ToolCall("transfer_to_refunds", {}, "over")])
    return Reply("Let me see.", tool_calls=[ToolCall("find_order", {"order": "A-1"}, "order")])


class _Killer:
    """Kills the process that asks the model for the third time, and the first that asks for money."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None
        self.kills: list[str] = []
        self._lock = threading.Lock()

    def asked(self, call: Mapping[str, Any]) -> None:
        if call["call"] == 2:
            self._kill("while the model was asked for the third time")

    def paid(self, call: Mapping[str, Any]) -> None:
        self._kill("while the bank was paying", once=True)

    def _kill(self, when: str, once: bool = False) -> None:
        with self._lock:
            if self.child is not None and self.child.poll() is None and when not in self.kills:
                self.kills.append(when)
                os.kill(self.child.pid, signal.SIGKILL)


def play(program: str) -> int:
    """Play the demo. Returns the exit status: 1 if the promise did not hold."""
    killer = _Killer()
    with (
        tempfile.TemporaryDirectory(prefix="outlast-desk-") as folder,
        ScriptedModelServer(script, on_call=killer.asked) as model,
        LedgerServer(on_call=killer.paid, delay=0.2) as ledger,
    ):
        env = {
            **os.environ,
            "OPENAI_BASE_URL": model.base_url,
            "OPENAI_API_KEY": "none",
            "LEDGER_URL": ledger.url,
            "OUTLAST_EMBEDDED_PATH": str(Path(folder) / "outlast.db"),
        }
        began = time.monotonic()

        def run(*arguments: str) -> int:
            _say(began, f"$ python {Path(program).name} {' '.join(arguments)}")
            with subprocess.Popen(
                [sys.executable, program, *arguments], env=env, stdout=subprocess.PIPE, text=True
            ) as killer.child:
                assert killer.child.stdout is not None
                for line in killer.child.stdout:
                    _say(began, f"  {line.rstrip()}")
            if killer.child.returncode == -signal.SIGKILL:
                _say(began, f"  killed (SIGKILL) {killer.kills[-1]}")
            return killer.child.returncode

        statuses = [run(), run(), run("approve"), run()]
        return _judge(began, statuses, len(model.requests()), ledger)


def _judge(began: float, statuses: list[int], asked: int, ledger: LedgerServer) -> int:
    paid, calls = len(ledger.bookings()), len(ledger.calls())
    _say(began, f"model calls: {asked} (undisturbed: 4; one was in flight at the first kill)")
    _say(began, f"refunds: {paid} (the bank was asked {calls} times, under one idempotency key)")
    held = statuses == [-signal.SIGKILL, 0, -signal.SIGKILL, 0] and asked <= 5 and paid == 1
    _say(began, "the promise held" if held else f"THE PROMISE DID NOT HOLD: {statuses}")
    return 0 if held else 1


def _say(began: float, text: str) -> None:
    sys.stdout.write(f"{time.monotonic() - began:6.2f} s  {text}\n")
    sys.stdout.flush()


__all__ = ["play", "script"]
