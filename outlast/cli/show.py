"""`outlast show`: one run whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from pydantic_core import PydanticSerializationError, to_jsonable_python
from rich import box
from rich.pretty import Pretty
from rich.table import Table
from rich.text import Text

from outlast.cli._console import OUT, AsJson, Store, Verbose, iso, local, print_json, print_table, say, status_text
from outlast.cli._store import opened
from outlast.cli.runs import as_dict
from outlast.errors import OutlastError
from outlast.recovery import journal, runs
from outlast.recovery.codec import Codec
from outlast.recovery.runs import RunInput, Typed
from outlast.recovery.runtime import Runtime

_UNREADABLE: Final = object()


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The id of the run.")],
    payload: Annotated[bool, typer.Option("--payload", help="Also what was submitted.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many checkpoints, the newest.")] = 100,
    store: Store = "statestore",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show one run: where it is, its result or error, what it waits for, and its thread's checkpoints.

    What was submitted is shown only with --payload. Types of your own are not imported; their fields are shown.

    With --json, an object: the keys of `outlast runs --json`, and epoch, worker, workflow, cancel_requested, result
    (null if there is none, {"unreadable": why} if it takes your own code to read it), interrupts ([{id, value}]),
    question (what outlast itself asks: {id, kind, step, text, request}, or null), steps ([{type, name, outcome,
    request, error, attempt, started, seconds, input_tokens, output_tokens}], oldest first), checkpoints
    ([{checkpoint_id, namespace, step, source, ran, next, time, run_id}], oldest first; null where langgraph is not
    installed), and with --payload submitted.
    """
    if not verbose:
        # "Blocked deserialization": that is what is meant here.
        logging.getLogger("langgraph.checkpoint.serde").setLevel(logging.ERROR)
    with opened(store) as runtime:
        found = _found(runtime, run, payload, limit)
    if as_json:
        print_json({**found, "result": _plain(found["result"])} if found["result"] is not None else found)
    else:
        _print(found)


def _found(runtime: Runtime, run_id: str, payload: bool, limit: int) -> dict[str, Any]:
    head = runtime.client.run(runs.read(run_id))
    submitted = runtime.client.run(runs.read_input(head))
    running = head.running
    found: dict[str, Any] = {
        **as_dict(head),
        "epoch": running.epoch if running else None,
        "worker": running.worker if running else None,
        "workflow": head.instance,
        "cancel_requested": head.cancel,
        "result": None,
        "interrupts": [],
        "question": None,
        "steps": None,
        "checkpoints": None,
    }
    try:
        from outlast.cli import _history
    except ModuleNotFoundError:
        say("install outlast[langgraph] to see results and checkpoints")
        return found
    loads = _history.strict().loads_typed
    if head.result:
        found["result"] = _readable(loads, runtime.client.run(runs.read_typed(run_id, head.result)))
    if head.status == "waiting" and head.question:
        found["question"] = _readable(loads, runtime.client.run(runs.read_typed(run_id, head.question[2])))
    found["steps"] = _steps(runtime, run_id, _history.strict())
    saver = _history.reader(runtime.client)
    try:
        if head.status == "waiting":
            latest = saver.get_tuple({"configurable": {"thread_id": head.thread_id}})
            found["interrupts"] = [{"id": item.id, "value": _plain(item.value)} for item in _history.interrupts(latest)]
        steps = _history.supersteps(saver, head.thread_id, limit=limit)
        found["checkpoints"] = [
            {**asdict(step), "time": iso(datetime.fromisoformat(step.time).timestamp())} for step in steps
        ]
    except (ValueError, TypeError, NotImplementedError) as error:
        say(f"the checkpoints of thread {head.thread_id!r} cannot be read without the agent's own serialiser: {error}")
    if payload:
        found["submitted"] = _submitted(submitted)
    return found


def _readable(loads: Callable[[Typed], Any], stored: Typed) -> Any:
    try:
        return loads(stored)
    except Exception as error:  # whatever a serialiser that did not write it may raise
        return {"unreadable": f"{stored[0]}: {error}"}


def _steps(runtime: Runtime, run_id: str, codec: Codec) -> list[dict[str, Any]] | None:
    """Return the recorded steps of a run, or None if it takes the agent's own code to read them."""
    try:
        recorded = runtime.client.run(journal.read(run_id, codec))
    except OutlastError:
        raise
    except Exception as error:  # whatever a serialiser that did not write it may raise
        say(f"the steps of run {run_id!r} cannot be read without the agent's own serialiser: {error}")
        return None
    return [
        {
            "type": record.type,
            "name": record.name,
            "outcome": record.kind,
            "request": record.request,
            "error": f"{record.error['type']}: {record.error['message']}" if record.error else None,
            "attempt": record.attempt,
            "started": iso(record.started),
            "seconds": round(record.ended - record.started, 3),
            "input_tokens": record.usage.input if record.usage else None,
            "output_tokens": record.usage.output if record.usage else None,
        }
        for record in recorded
    ]


def _submitted(submitted: RunInput) -> Any:
    from outlast.adapters.langgraph.payload import decode
    from outlast.cli import _history

    return _plain(_readable(lambda typed: decode(_history.strict(), typed), submitted.payload))


def _plain(value: Any) -> Any:
    """Return a value as JSON can have it."""
    try:
        return to_jsonable_python(value, serialize_unknown=True, bytes_mode="base64", inf_nan_mode="strings")
    except (PydanticSerializationError, ValueError):
        return repr(value)


def _print(found: dict[str, Any]) -> None:
    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_column(style="bold", no_wrap=True)
    head.add_column(overflow="fold")
    rows: list[tuple[str, Any]] = [
        ("run", found["run_id"]),
        ("agent", found["agent"]),
        ("thread", found["thread_id"]),
        ("status", status_text(found["status"])),
        ("attempts", found["attempts"]),
        ("created", _local(found["created"])),
        ("updated", _local(found["updated"])),
    ]
    if found["worker"]:
        rows.append(("worker", f"{found['worker']} (epoch {found['epoch']})"))
    if found["cancel_requested"]:
        rows.append(("cancel", "asked for"))
    if found["error"]:
        rows.append(("error", Text(f"{found['error']['type']}: {found['error']['message']}", "red")))
    for item in found["interrupts"]:
        rows.append(("waits for", Text.assemble(f"answer {item['id']}: ", _line(item["value"]))))
    if found["question"]:
        rows.append(("asks", Text(found["question"].get("text") or str(found["question"]), "yellow")))
        rows.append(("", f"answer it with `outlast answer {found['run_id']} ...`"))
    for name, value in rows:
        head.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    print_table(head)
    if "submitted" in found:
        _section("submitted", found["submitted"])
    if found["result"] is not None:
        _section("result", found["result"])
    if found["steps"]:
        OUT.print(Text("\nsteps", "bold"))
        print_table(_step_table(found["steps"]))
    if found["checkpoints"]:
        OUT.print(Text("\ncheckpoints", "bold"))
        print_table(_checkpoints(found))


def _section(title: str, value: Any) -> None:
    OUT.print(Text(f"\n{title}", "bold"))
    if not isinstance(value, dict):
        OUT.print(Pretty(value))
        return
    for key, item in value.items():
        if isinstance(item, list) and item and all(hasattr(each, "content") for each in item):
            for message in item:
                OUT.print(Text.assemble("  ", (f"{message.type}: ", "cyan"), _message(message)), soft_wrap=True)
        elif key != "__interrupt__":
            OUT.print(Text.assemble("  ", (f"{key}: ", "cyan"), _line(item)), soft_wrap=True)


def _message(message: Any) -> str:
    calls = [f"{call['name']}({_arguments(call['args'])})" for call in getattr(message, "tool_calls", None) or ()]
    return " ".join(filter(None, [message.text if isinstance(message.text, str) else "", *calls]))


def _arguments(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _line(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _checkpoints(found: dict[str, Any]) -> Table:
    from outlast.cli._history import names

    steps = found["checkpoints"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("step", justify="right")
    for name in ("source", "ran", "next", "time"):
        table.add_column(name)
    table.add_column("run", overflow="fold")
    nested = any(step["namespace"] for step in steps)
    if nested:
        table.add_column("subgraph", overflow="fold")
    for step in steps:
        mine = step["run_id"] == found["run_id"]
        table.add_row(
            str(step["step"]),
            step["source"],
            Text(names(step["ran"])),
            Text(names(step["next"])),
            _local(step["time"]),
            Text("this" if mine else step["run_id"] or "none", "" if mine else "dim"),
            *([Text(step["namespace"])] if nested else []),
        )
    return table


def _step_table(recorded: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("type", "name", "outcome"):
        table.add_column(name, no_wrap=True)
    for name in ("attempt", "seconds", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("request", overflow="ellipsis", no_wrap=True)
    for row in recorded:
        tokens = "" if row["input_tokens"] is None else f"{row['input_tokens']}+{row['output_tokens']}"
        style = "red" if row["outcome"] == "error" else ""
        said = f"{row['error']} <- {row['request']}" if row["error"] else row["request"]
        table.add_row(
            row["type"],
            row["name"],
            Text(row["outcome"], style),
            str(row["attempt"]),
            f"{row['seconds']:.3f}",
            tokens,
            Text(said.replace("\n", " ")[:200], style),
        )
    return table


def _local(time: str) -> str:
    return local(datetime.fromisoformat(time).timestamp())
