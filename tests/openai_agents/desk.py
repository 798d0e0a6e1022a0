"""The hard scenario: a support desk with everything at once. Every effect is counted outside the process.

Triage calls two tools and three agents in parallel, then hands off to refunds next to a tool call; refunds asks for two
approvals next to a tool call, and hands back to triage (a circle), which ends with structured output. Around it: an
input guardrail with a model of its own, an output guardrail, a tool guardrail, an input filter, a session, a context
object that tools change, and instructions that are never the same.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from agents import (
    Agent,
    GuardrailFunctionOutput,
    ModelSettings,
    RunContextWrapper,
    Runner,
    ToolGuardrailFunctionOutput,
    ToolInputGuardrailData,
    function_tool,
    handoff,
    input_guardrail,
    output_guardrail,
    tool_input_guardrail,
)
from agents.extensions import handoff_filters
from pydantic import BaseModel

from outlast.testing import Reply, ToolCall
from tests.acceptance.points import effect

INPUT = "My order A-1 broke twice, I want my money back."
EFFECTS = {
    "lookup": 1, "stock": 1, "dig": 3, "memo": 1, "refund": 1, "audit": 1,
    "polite": 1, "sane": 1, "small": 1, "to_refunds": 1,
}  # fmt: skip
"""How often each effect takes place in an undisturbed run; `refund` is asked for twice and rejected once."""
MODELS = {"triage": 3, "refunds": 2, "expert": 6, "guard": 1}
"""How often each model is asked."""


@dataclass
class Desk:
    """The context object."""

    log: list[str] = field(default_factory=list)
    refunded: int = 0


class Answer(BaseModel):
    text: str
    refunded: int


Context = RunContextWrapper[Desk]


def _note(context: Context, name: str) -> None:
    effect(name)
    context.context.log.append(name)


@function_tool
def lookup(context: Context, order: str) -> str:
    """Look an order up."""
    _note(context, "lookup")
    return f"order {order}: two vases"


@function_tool
async def stock(context: Context, item: str) -> dict[str, int]:
    """Look into the stock."""
    _note(context, "stock")
    return {item: 7}


@function_tool
async def dig(who: str) -> str:
    """Dig in the archives."""
    effect("dig")
    return f"{who} found nothing"


@function_tool
def memo(context: Context, text: str) -> str:
    """Write a memo."""
    _note(context, "memo")
    return "noted"


@tool_input_guardrail
def small(data: ToolInputGuardrailData) -> ToolGuardrailFunctionOutput:
    effect("small")
    return ToolGuardrailFunctionOutput.allow({"amount": "small"})


@function_tool(needs_approval=True, tool_input_guardrails=[small])
def refund(context: Context, amount: int) -> str:
    """Pay money back."""
    _note(context, "refund")
    context.context.refunded += amount
    return f"refunded {amount}"


@function_tool
def audit(context: Context) -> str:
    """Write to the audit log."""
    _note(context, "audit")
    return "audited"


def _instructions(context: Context, agent: Agent[Desk]) -> str:
    return f"You are {agent.name}. Today's number is {secrets.token_hex(8)}."


_guard = Agent(name="guard", model="guard", instructions="Is it polite?")


@input_guardrail
async def polite(context: Context, agent: Agent[Desk], input: Any) -> GuardrailFunctionOutput:
    found = await Runner.run(_guard, "polite?")
    effect("polite")
    return GuardrailFunctionOutput(output_info={"said": found.final_output}, tripwire_triggered=False)


@output_guardrail
def sane(context: Context, agent: Agent[Desk], output: Answer) -> GuardrailFunctionOutput:
    effect("sane")
    return GuardrailFunctionOutput(output_info=output.text, tripwire_triggered=False)


def _expert(name: str) -> Agent[Desk]:
    return Agent(name=name, model="expert", instructions=_instructions, tools=[dig])


def make() -> Agent[Desk]:
    """Return the agent."""
    experts = [_expert(name).as_tool(name, f"Ask {name}") for name in ("expert_a", "expert_b", "expert_c")]
    refunds = Agent(name="refunds", model="refunds", instructions=_instructions, tools=[refund, audit])
    triage = Agent(
        name="triage",
        model="triage",
        instructions=_instructions,
        tools=[lookup, stock, memo, *experts],
        handoffs=[
            handoff(
                refunds,
                on_handoff=lambda context: effect("to_refunds"),
                input_filter=handoff_filters.remove_all_tools,
            )
        ],
        input_guardrails=[polite],
        output_guardrails=[sane],
        output_type=Answer,
        model_settings=ModelSettings(parallel_tool_calls=True),
    )
    refunds.handoffs = [triage]
    return triage


def script(request: Any, _answered: int) -> Reply:
    """What the models say: it depends on the conversation alone."""
    messages = request["messages"]
    called = {call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
    match request["model"]:
        case "guard":
            return Reply("polite enough")
        case "expert":
            if "dig" in called:
                return Reply("I know nothing.")
            said = str(next(message["content"] for message in messages if message["role"] == "user"))
            return Reply(tool_calls=[ToolCall("dig", {"who": said}, f"dig-{said}")])
        case "refunds":
            if "refund" in called:
                return Reply(tool_calls=[ToolCall("transfer_to_triage", {}, "back")])
            return Reply(
                "Let me see.",
                tool_calls=[
                    ToolCall("refund", {"amount": 40}, "refund-40"),
                    ToolCall("audit", {}, "audit"),
                    ToolCall("refund", {"amount": 2}, "refund-2"),
                ],
            )
    if "transfer_to_triage" in called:
        return Reply(json.dumps({"text": "40 are on their way", "refunded": 40}))
    if "lookup" in called:
        return Reply(
            tool_calls=[ToolCall("memo", {"text": "to refunds"}, "memo"), ToolCall("transfer_to_refunds", {}, "over")]
        )
    return Reply(
        "I look.",
        tool_calls=[
            ToolCall("lookup", {"order": "A-1"}, "lookup"),
            ToolCall("stock", {"item": "vase"}, "stock"),
            *(ToolCall(name, {"input": name}, name) for name in ("expert_a", "expert_b", "expert_c")),
        ],
    )
