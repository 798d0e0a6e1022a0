"""An agent that compares the weather, finds a hotel and books it, once, however often its process is killed.

It is a plain LangChain agent with plain tools. The last line before `main` is the one that makes it durable; the
booking passes a key on that is the same however often it is made again. Set OPENAI_BASE_URL, OPENAI_API_KEY and
LEDGER_URL (`make demo` does, with servers of `outlast.testing`). As a program it asks its question; `outlast worker
weather_agent:agent` carries on what a program that was killed has left.
"""

import json
import os
from typing import Any
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from outlast import current_step, durable

QUESTION = "Where is the better weather this weekend, Paris or Lisbon? Book me a hotel there for two nights."


@tool
def get_weather(city: str) -> str:
    """The weather in a city this weekend."""
    return {"Lisbon": "sunny, 24 °C", "Paris": "rain, 13 °C"}.get(city, "cloudy, 18 °C")


@tool
def find_hotel(city: str) -> str:
    """A good hotel in a city."""
    return {"Lisbon": "Hotel Mirador", "Paris": "Hôtel du Canal"}.get(city, f"Grand Hotel {city}")


@tool
def book_hotel(hotel: str, nights: int) -> str:
    """Book a hotel. This costs money: it must not happen twice."""
    body = json.dumps({"hotel": hotel, "nights": nights}).encode()
    headers = {"Content-Type": "application/json"}
    if step := current_step(None):  # there is none where the graph is run without outlast
        headers["Idempotency-Key"] = step.idempotency_key
    request = Request(urljoin(os.environ["LEDGER_URL"], "/bookings"), body, headers)
    with urlopen(request, timeout=60) as response:
        return f"Booked {hotel} for {nights} nights: {json.load(response)['id']}"


def build_graph() -> Any:
    model = ChatOpenAI(model=os.environ.get("OPENAI_MODEL", "scripted"), base_url=os.environ["OPENAI_BASE_URL"])
    return create_agent(model, [get_weather, find_hotel, book_hotel], system_prompt="You plan weekend trips.")


agent = durable(build_graph(), name="weather")

if __name__ == "__main__":
    result = agent.invoke({"messages": [("user", QUESTION)]}, {"configurable": {"thread_id": "weekend"}})
    print(result["messages"][-1].content)
