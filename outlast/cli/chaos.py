"""`outlast chaos`: run a durable agent while what it depends on breaks, and say whether the promise held."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from outlast.checkpointer.sidecar import configured
from outlast.cli._console import AsJson, CommandError, Verbose, complain, print_json, print_line, print_table, say

if TYPE_CHECKING:
    from outlast.chaos import Trial, Verdict

_SCENARIOS: Final = "kill-worker, kill-sidecar, freeze-worker, rate-limit, drop-model, hang-tool, all"
_DAPR: Final = ("DAPR_GRPC_PORT", "DAPR_GRPC_ENDPOINT", "DAPR_HTTP_PORT", "DAPR_HTTP_ENDPOINT", "DAPR_API_TOKEN")


def command(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help=f"{_SCENARIOS}.")],
    agent: Annotated[str, typer.Argument(metavar="MODULE:ATTR", help="Where the durable agent is.")],
    given: Annotated[str | None, typer.Option("--input", help="What to run it with: JSON, or a text to say.")] = None,
    input_file: Annotated[Path | None, typer.Option(help="The same, from a file.", exists=True, dir_okay=False)] = None,
    times: Annotated[int, typer.Option(min=1, help="Disturbed runs of each scenario, each at another place.")] = 3,
    calm: Annotated[int, typer.Option(min=1, help="Undisturbed runs first; two show what varies by itself.")] = 2,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    tool: Annotated[str, typer.Option(help="The tool that is to hang; else each that was called.")] = "",
    harmless: Annotated[list[str] | None, typer.Option(help="A tool that may run twice; repeatable.")] = None,
    ledger: Annotated[str, typer.Option(help="Effects: a URL of a JSON list, or a file of JSON lines.")] = "",
    model_url: Annotated[str, typer.Option(help="The model's base URL. [$OPENAI_BASE_URL, else OpenAI's]")] = "",
    live: Annotated[bool, typer.Option("--live", help="Ask the model again for what it has answered already.")] = False,
    dapr: Annotated[bool, typer.Option("--dapr", help="On the configured Dapr, not on a scratch store.")] = False,
    store: Annotated[str, typer.Option(help="Name of the agent's state store.")] = "statestore",
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="What a run may take.")] = 120.0,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a durable agent while what it depends on breaks, and say whether the promise held.

    The agent runs in worker processes of its own, on a scratch store: first undisturbed, then, for each scenario, as
    often as --times says, each time disturbed at another place. Its tools do what they do, once for every run: give
    it test systems. Model calls go through a local proxy, in OPENAI_BASE_URL; what the model has answered once is not
    asked again, so that runs can be compared and cost little.

    The exit status is 1 if the promise did not hold: a run did not end as it does undisturbed, a recorded step was made
    again, the final state differs, or an effect may have happened twice.

    With --json, an object: promise_held, seed, undisturbed ({runs, ended, model_calls, steps, not_compared}), skipped
    ([{scenario, why}]) and trials ([{scenario, what, ended, held, failures, seconds, repeated, keyed, doubled,
    recorded_again, model_calls: [undisturbed, here, failed on purpose], ledger: [undisturbed, here] or null,
    differences}]).
    """
    from outlast.chaos import SCENARIOS, Options, Trial

    if scenario not in (*SCENARIOS, "all"):
        raise typer.BadParameter(f"{scenario!r} is none of {_SCENARIOS}")
    if dapr and not configured():
        raise CommandError("--dapr: no Dapr sidecar is configured; set DAPR_GRPC_PORT, or leave it out")
    options = Options(
        target=agent,
        input=_input(given, input_file),
        model_url=model_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
        store=store,
        sidecar=tuple((name, os.environ[name]) for name in _DAPR if name in os.environ) if dapr else (),
        seed=seed,
        tool=tool,
        harmless=tuple(harmless or ()),
        ledger=ledger,
        timeout=timeout,
        replay=not live,
    )

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # so that the processes of the trial are ended

    signal.signal(signal.SIGTERM, stop)
    with Trial(options, say) as trial:
        trial.run_calm(calm)
        verdicts, skipped = _play(trial, SCENARIOS if scenario == "all" else [scenario], times)
        uncompared = trial.uncompared
    failed = any(not verdict.held for verdict in verdicts) or not verdicts
    if as_json:
        print_json(_as_dict(trial, verdicts, skipped, uncompared))
    else:
        _print(trial, verdicts, uncompared)
    for why in skipped.values():
        say(f"not played: {why}")
    for text in dict.fromkeys(f"{verdict.scenario}: {text}" for verdict in verdicts for text in verdict.failures):
        complain(text)
    if failed:
        raise typer.Exit(1)


def _input(given: str | None, file: Path | None) -> Any:
    if (given is None) == (file is None):
        raise typer.BadParameter("give one of --input and --input-file")
    text = file.read_text() if file else given or ""
    try:
        value = json.loads(text)
    except ValueError as error:
        if file or text.lstrip().startswith(("{", "[")):
            raise typer.BadParameter(f"the input is not JSON: {error}") from None
        value = text
    return {"messages": [{"role": "user", "content": value}]} if isinstance(value, str) else value


def _play(trial: Trial, scenarios: Sequence[str], times: int) -> tuple[list[Verdict], dict[str, str]]:
    """Play the scenarios. Of several, those that make no sense for this agent are left out, and it is said why."""
    from outlast.chaos.processes import ChaosError

    verdicts: list[Verdict] = []
    skipped: dict[str, str] = {}
    for name in scenarios:
        why_not = trial.impossible(name)
        if why_not and len(scenarios) == 1:
            raise ChaosError(why_not)
        if why_not:
            skipped[name] = why_not
        else:
            verdicts += trial.play(name, times)
    return verdicts, skipped


def _as_dict(
    trial: Trial, verdicts: list[Verdict], skipped: dict[str, str], uncompared: Sequence[str]
) -> dict[str, Any]:
    calm = trial.calm[-1]
    return {
        "promise_held": all(verdict.held for verdict in verdicts) and bool(verdicts),
        "seed": trial.options.seed,
        "undisturbed": {
            "runs": len(trial.calm),
            "ended": calm.ended,
            "model_calls": len(calm.calls.made),
            "steps": calm.steps,
            "not_compared": list(uncompared),
        },
        "skipped": [{"scenario": name, "why": why} for name, why in skipped.items()],
        "trials": [{**asdict(verdict), "held": verdict.held} for verdict in verdicts],
    }


def _print(trial: Trial, verdicts: list[Verdict], uncompared: Sequence[str]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("scenario", no_wrap=True)
    table.add_column("what happened", overflow="fold")
    table.add_column("back after", justify="right", no_wrap=True)
    table.add_column("made again", overflow="fold")
    table.add_column("effects doubled", overflow="fold")
    table.add_column("state")
    table.add_column("promise", no_wrap=True)
    for verdict in verdicts:
        table.add_row(
            verdict.scenario,
            Text(verdict.what),
            "" if verdict.seconds is None else f"{verdict.seconds:.2f} s",
            Text(", ".join(verdict.repeated) or "none"),
            Text(_doubled(verdict)),
            _state(verdict, trial.calm[-1].ended),
            Text("held", "green") if verdict.held else Text("not held", "bold red"),
        )
    print_table(table)
    back = [verdict.seconds for verdict in verdicts if verdict.seconds is not None]
    held = sum(verdict.held for verdict in verdicts)
    if back:
        middle, worst = statistics.median(back), max(back)
        print_line(f"\nheld in {held} of {len(verdicts)}; back after {middle:.2f} s (median), {worst:.2f} s at most")
    if uncompared:
        say(f"not compared, because it differs between undisturbed runs, too: {', '.join(uncompared)}")
    say(f"again with the same places: --seed {trial.options.seed}")


def _doubled(verdict: Verdict) -> str:
    if verdict.ledger is not None:
        more = verdict.ledger[1] - verdict.ledger[0]
        return f"{more}, says the ledger" if more > 0 else "none, says the ledger"
    if verdict.doubled:
        return f"maybe: {', '.join(verdict.doubled)}"
    return f"none; key passed on by {', '.join(verdict.keyed)}" if verdict.keyed else "none"


def _state(verdict: Verdict, calm: str) -> str:
    if verdict.ended != calm:
        return "waits" if verdict.ended.startswith("asks") else "other end"
    return "differs" if verdict.differences else "equal"
