"""OpenAI Agents on outlast: `Runner`, in place of `agents.Runner`, and what belongs to it."""

from outlast.adapters.openai_agents.context import ContextCodec
from outlast.adapters.openai_agents.dapr_session import DaprSession
from outlast.adapters.openai_agents.face import DurableAgent
from outlast.adapters.openai_agents.handle import AgentRun
from outlast.adapters.openai_agents.place import is_replaying
from outlast.adapters.openai_agents.results import Approval, RunWaitsError
from outlast.adapters.openai_agents.runner import Runner
from outlast.adapters.openai_agents.seams import UnsupportedSDKError

__all__ = [
    "AgentRun",
    "Approval",
    "ContextCodec",
    "DaprSession",
    "DurableAgent",
    "RunWaitsError",
    "Runner",
    "UnsupportedSDKError",
    "is_replaying",
]
