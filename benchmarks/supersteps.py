"""What a superstep costs: outlast on both sidecars, next to LangGraph's SqliteSaver and to one Dapr activity a step.

Runs a one-node loop that adds a 0.5 KB message per superstep, all systems in turn and in one process run, several
rounds, and prints milliseconds and stored bytes per superstep. Ratios count; the figures are one machine's, of one day.

    make bench            or            python -m benchmarks.supersteps --steps 10 100 1000 --rounds 3
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import operator
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

SIZE = 500
"""Characters of a message; of random words, so that they do not compress better than text does."""


@functools.cache
def _message(number: int) -> str:
    chance = random.Random(number)
    words = ("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(SIZE // 2))
    return " ".join(words)[:SIZE]


class State(TypedDict):
    """The state of the loop."""

    messages: Annotated[list[Any], add_messages]
    count: Annotated[int, operator.add]


def _graph(steps: int) -> Any:
    def node(state: State) -> dict[str, Any]:
        return {"messages": [AIMessage(_message(state["count"]))], "count": 1}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_conditional_edges("node", lambda state: END if state["count"] >= steps else "node")
    return builder.compile()


def _config(thread_id: str, steps: int) -> Any:
    return {"configurable": {"thread_id": thread_id}, "recursion_limit": steps + 10}


def _size(path: Path) -> int:
    """Bytes of a SQLite database without free pages and log."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        source = sqlite3.connect(path)
        source.execute("VACUUM INTO ?", (str(copy),))
        source.close()
        return copy.stat().st_size


def _timed(run: Callable[[], Any], steps: int) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1000 / steps


def _outlast(database: Path, steps: int, thread: str) -> dict[str, Any]:
    from outlast import durable

    agent = durable(_graph(steps), name="loop")
    run = f"{thread}-{steps}"
    before = _size(database) if database.exists() else 0
    given = {"messages": [], "count": 0}
    ms = _timed(lambda: agent.start(given, _config(run, steps), run_id=run).result(), steps)
    return {"ms": ms, "bytes": (_size(database) - before) / steps, "history": _history(agent, run)}


def _history(agent: Any, run: str) -> int:
    """Events in the history of the run's workflow."""
    return len(agent._runtime.workflows.get_workflow_history(run))


def _sqlite_saver(folder: Path, steps: int, thread: str) -> dict[str, Any]:
    from langgraph.checkpoint.sqlite import SqliteSaver

    database = folder / f"saver-{thread}-{steps}.db"
    with SqliteSaver.from_conn_string(str(database)) as saver:
        graph = _graph(steps).copy({"checkpointer": saver})
        given = {"messages": [], "count": 0}
        ms = _timed(lambda: graph.invoke(given, _config(thread, steps), durability="sync"), steps)
    return {"ms": ms, "bytes": _size(database) / steps}


def _activities(database: Path, steps: int, thread: str) -> dict[str, Any]:
    """A plain Dapr workflow with one activity per step, which is handed its message only, not the state."""
    from dapr.ext.workflow import DaprWorkflowClient, WorkflowRuntime

    from outlast.recovery.worker import sdk_logging

    name = f"plain-{thread}-{steps}"

    def workflow(ctx: Any, count: int) -> Any:
        for number in range(count):
            yield ctx.call_activity(f"{name}-step", input=_message(number))

    def step(ctx: Any, message: str) -> str:
        return message

    runtime = WorkflowRuntime(logger_options=sdk_logging())
    runtime.register_workflow(workflow, name=name)
    runtime.register_activity(step, name=f"{name}-step")
    runtime.start()
    client = DaprWorkflowClient(logger_options=sdk_logging())
    before = _size(database)
    try:

        def run() -> None:
            client.schedule_new_workflow(name, input=steps, instance_id=name)
            client.wait_for_workflow_completion(name, timeout_in_seconds=600)

        ms = _timed(run, steps)
    finally:
        runtime.shutdown()
        client.close()
    return {"ms": ms, "bytes": (_size(database) - before) / steps}


def _measure(system: str, database: str, steps: list[int], rounds: int) -> None:
    """Child process: measure one system, print its figures as JSON."""
    logging.disable(logging.INFO)
    path = Path(database)
    measures: dict[str, Callable[[int, str], dict[str, Any]]] = {
        "outlast": lambda count, thread: _outlast(path, count, thread),
        "sqlite-saver": lambda count, thread: _sqlite_saver(path.parent, count, thread),
        "activities": lambda count, thread: _activities(path, count, thread),
    }
    measure = measures[system]
    measure(5, "warm")
    found = {count: [measure(count, f"r{number}") for number in range(rounds)] for count in steps}
    sys.stdout.write(json.dumps(found) + "\n")


def _child(system: str, environment: dict[str, str], database: Path, steps: list[int], rounds: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.supersteps", "--measure", system, "--database", str(database)]
    command += ["--rounds", str(rounds), "--steps", *map(str, steps)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr}")
    return {int(count): rows for count, rows in json.loads(done.stdout.splitlines()[-1]).items()}


def _all(steps: list[int], rounds: int) -> dict[str, Any]:
    from tests.harness.daprd import DaprCluster

    clean = {name: "" for name in os.environ if name.startswith("DAPR_")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded = folder / "embedded.db"
        results = {
            "outlast, embedded": _child(
                "outlast", {**clean, "OUTLAST_EMBEDDED_PATH": str(embedded)}, embedded, steps, rounds
            ),
            "SqliteSaver, sync": _child("sqlite-saver", clean, folder / "saver.db", steps, rounds),
        }
        with DaprCluster(folder / "dapr") as cluster:
            daprd = cluster.start_daprd("bench")
            database = next((folder / "dapr").rglob("state.sqlite"))
            results["outlast, daprd"] = _child("outlast", daprd.env, database, steps, rounds)
            results["one activity a step, daprd"] = _child("activities", daprd.env, database, steps, rounds)
    return results


def _report(results: dict[str, Any], steps: list[int]) -> None:
    def middle(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    lines = ["| system | " + " | ".join(f"{count} steps: ms, bytes a step" for count in steps) + " |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for system, found in results.items():
        cells = [f"{middle(found[count], 'ms'):.2f}, {middle(found[count], 'bytes'):,.0f}" for count in steps]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    per_activity, on_daprd = results["one activity a step, daprd"], results["outlast, daprd"]
    ratios = [f"{middle(on_daprd[n], 'ms') / middle(per_activity[n], 'ms'):.2f}" for n in steps]
    lines.append(f"\noutlast on daprd / one activity a step, ms: {', '.join(ratios)}")
    events = {n: [row["history"] for row in on_daprd[n]] for n in steps}
    lines.append(f"events in the history of the run's workflow: {events}")
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the raw figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--database", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        _measure(asked.measure, asked.database, asked.steps, asked.rounds)
        return
    results = _all(asked.steps, asked.rounds)
    if asked.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    else:
        _report(results, asked.steps)


if __name__ == "__main__":
    main()
