"""What a durable OpenAI Agents run costs: overhead per turn next to plain Runner, resume at 50, 150 and 300 turns.

A turn is one model call (an answer of the process itself, so that only overhead is measured) and one call of a tool
that returns 1 KB. Prints milliseconds and stored bytes per turn, and for the resume the CPU seconds from the start of
the program's own code to the first new model call, with the sidecar's and the worker's start in them; processes are
killed by SIGKILL. Ratios count; the figures are one machine's, of one day.

    make bench-openai            or            python -m benchmarks.openai_agents --turns 50 150 300 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from agents import Agent, Model, ModelResponse, Usage, function_tool, set_tracing_disabled
from agents import Runner as PlainRunner
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

RUN: Final = "bench"


def _words(seed: int, size: int) -> str:
    chance = random.Random(seed)
    words = ("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(size // 2))
    return " ".join(words)[:size]


class Answers(Model):
    """Calls a tool `turns` times, then ends. May kill its process, or say when it is first asked."""

    def __init__(self, turns: int, kill: int | None = None, tell: bool = False) -> None:
        self.turns, self.kill, self.tell = turns, kill, tell

    async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> ModelResponse:
        turn = 0 if isinstance(input, str) else sum(item.get("type") == "function_call" for item in input)
        if turn == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.tell:
            print(json.dumps({"turn": turn, "cpu": time.process_time() - _STARTED_CPU}), flush=True)
            os._exit(0)
        output: Any = ResponseFunctionToolCall(
            arguments=json.dumps({"note": _words(turn, 200)}), call_id=f"c{turn}", name="look", type="function_call"
        )
        if turn >= self.turns:
            text = ResponseOutputText(text="done", type="output_text", annotations=[])
            output = ResponseOutputMessage(id="m", content=[text], role="assistant", status="completed", type="message")
        usage = Usage(requests=1, input_tokens=100, output_tokens=10, total_tokens=110)
        return ModelResponse(output=[output], usage=usage, response_id=f"r{turn}")

    async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
        yield


@function_tool
def look(note: str) -> str:
    """Look something up."""
    return _words(len(note), 1000)


def _agent(model: Answers) -> Agent[Any]:
    return Agent(name="bench", model=model, tools=[look])


async def _timed(runner: Any, turns: int, **kwargs: Any) -> float:
    began = time.perf_counter()
    await runner.run(_agent(Answers(turns)), "go", max_turns=None, **kwargs)
    return (time.perf_counter() - began) * 1000 / turns


def overhead(turns: int, rounds: int) -> tuple[float, float]:
    """Milliseconds a turn: plain, durable; in turns, medians."""
    from outlast.adapters.openai_agents import Runner

    async def measure() -> tuple[list[float], list[float]]:
        plain, durable = [], []
        await _timed(Runner, 2, run_id="warm")
        for number in range(rounds):
            plain.append(await _timed(PlainRunner, turns))
            durable.append(await _timed(Runner, turns, run_id=f"overhead-{turns}-{number}"))
        return plain, durable

    plain, durable = asyncio.run(measure())
    return statistics.median(plain), statistics.median(durable)


def _size(path: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        source = sqlite3.connect(path)
        source.execute("VACUUM INTO ?", (str(copy),))
        source.close()
        return copy.stat().st_size


def _child(path: Path, turns: int, *, kill: int | None = None) -> str:
    command = [sys.executable, "-m", "benchmarks.openai_agents", "--child", str(turns), "--kill", str(kill or -1)]
    env = {**os.environ, "OUTLAST_EMBEDDED_PATH": str(path)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600).stdout


def resume(turns: int) -> tuple[float, float]:
    """CPU seconds to the first new model call after a kill in the last turn, and stored bytes a turn."""
    with tempfile.TemporaryDirectory(prefix="outlast-bench-") as folder:
        path = Path(folder) / "outlast.db"
        _child(path, turns, kill=turns - 1)
        told = json.loads(_child(path, turns).splitlines()[-1])
        assert told["turn"] == turns - 1, told
        return told["cpu"], _size(path) / turns


def _be_child(turns: int, kill: int) -> None:
    from outlast.adapters.openai_agents import Runner

    global _STARTED_CPU
    _STARTED_CPU = time.process_time()
    model = Answers(turns, kill if kill >= 0 else None, tell=kill < 0)
    asyncio.run(Runner.run(_agent(model), "go", max_turns=None, run_id=RUN))


_STARTED_CPU = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[50, 150, 300])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kill", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_tracing_disabled(True)
    if args.child:
        _be_child(args.child, args.kill)
        return
    with tempfile.TemporaryDirectory(prefix="outlast-bench-") as folder:
        os.environ["OUTLAST_EMBEDDED_PATH"] = str(Path(folder) / "outlast.db")
        print("| turns | plain, ms/turn | durable, ms/turn | overhead per recorded call, ms |")
        print("|---|---|---|---|")
        for turns in args.turns:
            plain, durable = overhead(turns, args.rounds)
            print(f"| {turns} | {plain:.1f} | {durable:.1f} | {(durable - plain) / 2:.1f} |", flush=True)
        from outlast.recovery.runtime import default_runtime

        default_runtime().close()
    print("\n| turns | CPU of a resume, s | stored bytes/turn |")
    print("|---|---|---|")
    for turns in args.turns:
        cpu, size = resume(turns)
        print(f"| {turns} | {cpu:.2f} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
