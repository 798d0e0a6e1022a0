"""A support desk that pays money back, once, however often its process is killed.

Triage hands off to refunds, which may pay after a person has approved; a guardrail keeps rudeness out; the conversation
is a session in the state store. It is plain code of the OpenAI Agents SDK but for one import: Runner. Set
OPENAI_BASE_URL, OPENAI_API_KEY and LEDGER_URL.

    python support_desk.py            ask, and say what the run waits for
    python support_desk.py approve    approve the refund, from a process of its own, and see the run end
    python support_desk.py demo       all of it with local servers, killed in the middle (`make demo-openai`)
"""

import asyncio
import json
import os
import sys
from dataclasses import dataclass, field
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunContextWrapper,
    function_tool,
    input_guardrail,
    set_default_openai_api,
    set_tracing_disabled,
)

from outlast import current_step
from outlast.adapters.openai_agents import DaprSession, Runner

QUESTION = "My vase, order A-1, arrived broken. I want my 40 euros back."
RUN_ID = "support-A-1"

set_default_openai_api("chat_completions")
set_tracing_disabled(True)


@dataclass
class Case:
    """What the desk knows of the case; tools change it."""

    notes: list[str] = field(default_factory=list)


@function_tool
def find_order(context: RunContextWrapper[Case], order: str) -> str:
    """Look an order up."""
    context.context.notes.append(f"order {order} found")
    return f"Order {order}: one vase, 40 euros, delivered yesterday."


@function_tool(needs_approval=True)
def refund(context: RunContextWrapper[Case], order: str, amount: int) -> str:
    """Pay money back. This costs money: it must not happen twice, not even if we die while the bank answers."""
    body = {"order": order, "amount": amount, "idempotency_key": current_step().idempotency_key}
    url = urljoin(os.environ["LEDGER_URL"], "/bookings")
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        booking = json.load(response)["id"]
    context.context.notes.append(f"paid {amount} back: {booking}")
    return f"Refunded {amount} euros: {booking}"


@input_guardrail
def polite(context: RunContextWrapper[Case], agent: Agent[Case], input: object) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered="idiot" in str(input).lower())


model = os.environ.get("OPENAI_MODEL", "scripted")
refunds = Agent[Case](name="Refunds", instructions="You pay money back.", tools=[refund], model=model)
triage = Agent[Case](
    name="Triage",
    instructions="You find out what a customer needs, and hand off.",
    tools=[find_order],
    handoffs=[refunds],
    input_guardrails=[polite],
    model=model,
)


async def ask() -> None:
    """Ask the question, or come back to it: the same run_id is the same run."""
    case = Case()
    result = await Runner.run(triage, QUESTION, context=case, session=DaprSession("customer-7"), run_id=RUN_ID)
    for item in result.interruptions:
        print(f"waits for approval: {item.name}({item.arguments})")
    if not result.interruptions:
        print(f"{result.last_agent.name}: {result.final_output}")
        print(f"notes: {'; '.join(case.notes)}")


def approve() -> None:
    """Approve what the run waits for, if it still does."""
    run = Runner.get_run(triage, RUN_ID)
    if run.approvals():
        run.approve()


def main() -> None:
    match sys.argv[1:]:
        case ["demo"]:
            from outlast.testing import desk_demo

            sys.exit(desk_demo.play(__file__))
        case ["approve"]:
            approve()
    asyncio.run(ask())


if __name__ == "__main__":
    main()
