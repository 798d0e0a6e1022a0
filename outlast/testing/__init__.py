"""What tests and demos need: a scripted model to talk to, and a ledger that counts what it is asked to do.

Both are real HTTP servers on loopback, so that effects are counted outside the process under test. Each also runs as a
process of its own: `python -m outlast.testing.model_server`, `python -m outlast.testing.ledger`.
"""

from outlast.testing.chat import ChatRequest, Reply, Script, ToolCall, Usage, by_turn
from outlast.testing.faults import Fault
from outlast.testing.ledger import LedgerServer
from outlast.testing.model_server import ScriptedModelServer

__all__ = [
    "ChatRequest",
    "Fault",
    "LedgerServer",
    "Reply",
    "Script",
    "ScriptedModelServer",
    "ToolCall",
    "Usage",
    "by_turn",
]
