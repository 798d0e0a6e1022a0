"""The second scenario: every other kind of local tool in one turn each, and what else has an effect.

The model is an instance of the user's own class; tools are of MCP, shell, local shell, custom, apply patch, computer;
one function tool starts a run of its own and has a marked function, one fails, one times out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from agents import (
    Agent,
    ApplyPatchTool,
    AsyncComputer,
    ComputerTool,
    CustomTool,
    LocalShellTool,
    Model,
    ModelResponse,
    RunHooks,
    Runner,
    ShellCallOutcome,
    ShellCommandOutput,
    ShellResult,
    ShellTool,
    Usage,
    function_tool,
)
from agents.editor import ApplyPatchResult
from agents.mcp import MCPServer
from mcp.types import CallToolResult, TextContent
from mcp.types import Tool as MCPTool
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import (
    ResponseCompletedEvent,
    ResponseCustomToolCall,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)
from openai.types.responses.response_computer_tool_call import ActionClick, ResponseComputerToolCall
from openai.types.responses.response_output_item import LocalShellCall, LocalShellCallAction

from outlast import step
from outlast.adapters.openai_agents import is_replaying
from tests.acceptance.points import effect

EFFECTS = {
    **{f"model {number}": 1 for number in range(9)},
    "helper": 1, "mcp": 1, "shell": 1, "local shell": 1, "custom": 1, "patch": 1, "click": 1, "shot": 1,
    "marked": 1, "nested": 1, "fails": 1, "slow": 1,
}  # fmt: skip


def _call(name: str, arguments: str = "{}") -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(arguments=arguments, call_id=f"call-{name}", name=name, type="function_call")


_TURNS: list[list[Any]] = [
    [_call("ask_mcp")],
    [{"type": "shell_call", "call_id": "call-shell", "action": {"commands": ["ls"]}, "status": "completed", "id": "s"}],
    [
        LocalShellCall(
            id="ls", call_id="call-local", status="completed", type="local_shell_call",
            action=LocalShellCallAction(command=["ls"], env={}, type="exec"),
        )
    ],
    [ResponseCustomToolCall(call_id="call-custom", input="code", name="custom", type="custom_tool_call")],
    [
        {
            "type": "apply_patch_call", "call_id": "call-patch", "id": "p", "status": "completed",
            "operation": {"type": "create_file", "path": "a.txt", "diff": "+a"},
        }
    ],
    [
        ResponseComputerToolCall(
            id="c", call_id="call-click", status="completed", type="computer_call", pending_safety_checks=[],
            action=ActionClick(type="click", x=1, y=2, button="left"),
        )
    ],
    [_call("nested"), _call("fails")],
    [_call("slow")],
    [
        ResponseOutputMessage(
            id="m", role="assistant", status="completed", type="message",
            content=[ResponseOutputText(text="done", type="output_text", annotations=[])],
        )
    ],
]  # fmt: skip


class Robot(Model):
    """A model that says what its script says next."""

    def _answer(self, input: Any) -> tuple[int, list[Any]]:
        turn = sum(isinstance(item, dict) and str(item.get("type", "")).endswith("_output") for item in input)
        turn = turn if turn < 7 else turn - 1
        effect(f"model {turn}")
        return turn, _TURNS[turn]

    async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> ModelResponse:
        turn, output = self._answer(input)
        usage = Usage(requests=1, input_tokens=10, output_tokens=turn, total_tokens=10 + turn)
        return ModelResponse(output=output, usage=usage, response_id=f"r{turn}")

    async def stream_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        turn, output = self._answer(input)
        response = OpenAIResponse.model_construct(
            id=f"r{turn}", created_at=0, model="robot", object="response", output=output, tool_choice="auto", tools=[],
            parallel_tool_calls=True, usage=None,
        )  # fmt: skip
        yield ResponseCompletedEvent.model_construct(response=response, sequence_number=0, type="response.completed")


class Helper(Model):
    """The model of the run inside of a tool."""

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        effect("helper")
        message = ResponseOutputMessage(
            id="h", role="assistant", status="completed", type="message",
            content=[ResponseOutputText(text="helped", type="output_text", annotations=[])],
        )  # fmt: skip
        usage = Usage(requests=1, input_tokens=1, output_tokens=1, total_tokens=2)
        return ModelResponse(output=[message], usage=usage, response_id=None)

    async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
        yield


class Server(MCPServer):
    """An MCP server in this process, which has to be connected before it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.session: Any = None

    @property
    def name(self) -> str:
        return "server"

    async def connect(self) -> None:
        self.session = object()

    async def cleanup(self) -> None:
        self.session = None

    async def list_tools(self, run_context: Any = None, agent: Any = None) -> list[MCPTool]:
        assert self.session is not None
        return [MCPTool(name="ask_mcp", inputSchema={"type": "object", "properties": {}})]

    async def call_tool(self, tool_name: str, arguments: Any, meta: Any = None) -> CallToolResult:
        assert self.session is not None
        effect("mcp")
        return CallToolResult(content=[TextContent(type="text", text="from afar")])

    async def list_prompts(self) -> Any:
        raise NotImplementedError

    async def get_prompt(self, name: str, arguments: Any = None) -> Any:
        raise NotImplementedError


async def _shell(request: Any) -> ShellResult:
    effect("shell")
    return ShellResult(output=[ShellCommandOutput(stdout="a.txt", outcome=ShellCallOutcome(type="exit", exit_code=0))])


def _local_shell(request: Any) -> str:
    effect("local shell")
    return "b.txt"


async def _custom(context: Any, code: str) -> str:
    effect("custom")
    return f"ran {code}"


class Editor:
    def create_file(self, operation: Any) -> ApplyPatchResult:
        effect("patch")
        return ApplyPatchResult(output=f"made {operation.path}")

    update_file = delete_file = create_file


class Screen(AsyncComputer):
    @property
    def environment(self) -> Any:
        return "linux"

    @property
    def dimensions(self) -> tuple[int, int]:
        return (10, 10)

    async def screenshot(self) -> str:
        effect("shot")
        return "cG5n"

    async def click(self, x: int, y: int, button: Any) -> None:
        effect("click")

    async def _never(self, *args: Any) -> None:
        raise NotImplementedError

    double_click = scroll = type = wait = move = keypress = drag = _never


@step
def marked(text: str) -> str:
    effect("marked")
    return text.upper()


@function_tool
async def nested() -> str:
    """Start a run of its own."""
    found = await Runner.run(Agent(name="helper", model=Helper()), "help")
    text = await asyncio.to_thread(marked, str(found.final_output))
    effect("nested")
    return text


@function_tool
def fails() -> str:
    """Fail."""
    effect("fails")
    raise ValueError("no luck")


@function_tool(timeout=0.3)
async def slow() -> str:
    """Take too long."""
    effect("slow")
    await asyncio.sleep(30)
    return "never"


class Hooks(RunHooks[Any]):
    """Counts what is told, replays left out."""

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: Any) -> None:
        if not is_replaying():
            effect(f"hook {tool.name}")


def make() -> Agent[Any]:
    """Return the agent."""
    return Agent(
        name="workshop",
        model=Robot(),
        mcp_servers=[Server()],
        tools=[
            nested,
            fails,
            slow,
            ShellTool(executor=_shell),
            LocalShellTool(executor=_local_shell),
            CustomTool(name="custom", description="Run code", on_invoke_tool=_custom, format={"type": "text"}),
            ApplyPatchTool(editor=Editor()),
            ComputerTool(computer=Screen()),
        ],
    )


class Counting(Model):
    """A model that calls a tool in each of so many turns."""

    def __init__(self, turns: int) -> None:
        self._turns = turns

    def _answer(self, input: Any) -> tuple[int, list[Any]]:
        turn = sum(isinstance(item, dict) and item.get("type") == "function_call" for item in input)
        effect(f"turn {turn}")
        if turn < self._turns:
            return turn, [_call("tick").model_copy(update={"call_id": f"tick-{turn}"})]
        return turn, _TURNS[-1]

    get_response = Robot.get_response
    stream_response = Robot.stream_response


@function_tool
def tick() -> str:
    """Tick."""
    effect("tick")
    return "tock " * 40


def long(turns: int) -> Agent[Any]:
    """Return an agent that takes many turns."""
    return Agent(name="long", model=Counting(turns), tools=[tick])


@function_tool(needs_approval=True)
def wipe() -> str:
    """Wipe."""
    effect("wipe")
    return "wiped"


class Asking(Model):
    """A model that asks for two approvals at once."""

    def _answer(self, input: Any) -> tuple[int, list[Any]]:
        if any(isinstance(item, dict) and item.get("type") == "function_call_output" for item in input):
            return 1, _TURNS[-1]
        return 0, [_call("wipe").model_copy(update={"call_id": f"ask-{number}"}) for number in (1, 2)]

    get_response = Robot.get_response
    stream_response = Robot.stream_response


def asking() -> Agent[Any]:
    """Return an agent that needs approvals."""
    return Agent(name="asking", model=Asking(), tools=[wipe])
