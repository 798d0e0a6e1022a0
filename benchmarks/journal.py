"""What recording a call costs: a graph with the journal (outlast) next to the same graph on DaprSaver without one.

Model and tool answer at once and in the process, which is the worst case. Two graphs for each: one node that makes all
the calls one after another, and a loop of nodes with one call each. The cost of a call is the difference between a
run of many and a run of few, so that what a run costs once is not in it. Both systems take turns in one process, on the
same store; look at the ratios.

    make bench-journal          or            python -m benchmarks.journal --calls 100 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import logging
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph

_FEW = 5
KINDS = ("model", "tool")
SHAPES = {"calls in one node": "one", "one call a superstep": "loop"}
_TEXT = "It is sunny in Lisbon and it rains in Paris. " * 10


class Model(BaseChatModel):
    """Says the same at once, in 450 characters."""

    @property
    def _llm_type(self) -> str:
        return "instant"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        usage = {"input_tokens": 10, "output_tokens": 100, "total_tokens": 110}
        return ChatResult(generations=[ChatGeneration(message=AIMessage(_TEXT, usage_metadata=usage))])


@tool
def look_up(number: int) -> str:
    """Look something up."""
    return _TEXT


class State(TypedDict, total=False):
    """Counts the calls."""

    done: Annotated[int, operator.add]
    wanted: int


def graph(kind: str, shape: str) -> Any:
    """Return one of the graphs, not compiled."""
    model = Model()

    def call(number: int) -> None:
        if kind == "model":
            model.invoke(f"Question {number}?")
        else:
            look_up.invoke({"number": number})

    def node(state: State) -> State:
        if shape == "loop":
            call(state["done"])
            return {"done": 1}
        for number in range(state["wanted"]):
            call(number)
        return {"done": state["wanted"]}

    builder = StateGraph(State)
    builder.add_node("node", node).add_edge(START, "node")
    builder.add_conditional_edges("node", lambda state: END if state["done"] >= state["wanted"] else "node")
    return builder


def _systems(kind: str, shape: str) -> dict[str, Callable[[int, str], Any]]:
    from outlast import durable
    from outlast.checkpointer import DaprSaver

    plain = graph(kind, shape).compile(checkpointer=DaprSaver())
    agent = durable(graph(kind, shape).compile(), name=f"{kind}-{shape}")

    def config(thread: str, calls: int) -> Any:
        return {"configurable": {"thread_id": thread}, "recursion_limit": calls + 10}

    def without(calls: int, thread: str) -> None:
        plain.invoke({"done": 0, "wanted": calls}, config(thread, calls), durability="sync")

    def recorded(calls: int, thread: str) -> None:
        agent.invoke({"done": 0, "wanted": calls}, config(thread, calls))

    return {"DaprSaver": without, "outlast": recorded}


def _ms_a_call(run: Callable[[int, str], Any], calls: int, thread: str) -> float:
    seconds = []
    for count in (_FEW, _FEW + calls):
        started = time.perf_counter()
        run(count, f"{thread}-{count}")
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) * 1000 / calls


def _measure(calls: int, rounds: int) -> None:
    """Child process: measure everything on the sidecar of the environment, print figures as JSON."""
    logging.disable(logging.INFO)
    found: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        for title, shape in SHAPES.items():
            systems = _systems(kind, shape)
            rows = found[f"{kind}, {title}"] = {name: [] for name in systems}
            for number in range(rounds + 1):
                for name, run in systems.items():
                    ms = _ms_a_call(run, calls, f"{name}-{kind}-{shape}-{number}")
                    if number:  # the first warms up
                        rows[name].append(ms)
    sys.stdout.write(json.dumps(found) + "\n")


def _child(environment: dict[str, str], calls: int, rounds: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.journal", "--measure"]
    command += ["--calls", str(calls), "--rounds", str(rounds)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the measurement failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the raw figures")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        _measure(asked.calls, asked.rounds)
        return
    from tests.harness.daprd import DaprCluster

    clean = {name: "" for name in os.environ if name.startswith("DAPR_")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded = {**clean, "OUTLAST_EMBEDDED_PATH": str(folder / "embedded.db")}
        results = {"embedded": _child(embedded, asked.calls, asked.rounds)}
        with DaprCluster(folder / "dapr") as cluster:
            results["daprd"] = _child(cluster.start_daprd("bench").env, asked.calls, asked.rounds)
    if asked.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    lines = [
        "| a call of | DaprSaver alone, ms | with the journal, ms | ratio | journal adds, ms |",
        "|---|---|---|---|---|",
    ]
    for where, measured in results.items():
        for what, rows in measured.items():
            plain, recorded = statistics.median(rows["DaprSaver"]), statistics.median(rows["outlast"])
            ratio = statistics.median(b / a for a, b in zip(rows["DaprSaver"], rows["outlast"], strict=True))
            cells = f"{plain:.2f} | {recorded:.2f} | {ratio:.1f} | {recorded - plain:.2f}"
            lines.append(f"| {what}, {where} | {cells} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
