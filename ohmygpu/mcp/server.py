"""The MCP server of `omg mcp`: tools over the daemon's HTTP API, spoken on stdin and stdout.

It starts without a daemon and looks for one at every call, so a daemon started later is found, and
one that is not running is an answer with a way out rather than a hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Annotated

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from ohmygpu import __version__
from ohmygpu.client import AsyncClient, ChatOptions, Health, ModelInfo, find_daemon
from ohmygpu.core.errors import ModelNotFound, OhMyGPUError
from ohmygpu.core.settings import Settings
from ohmygpu.runtime_api import FinishReason, Message, Usage

INSTRUCTIONS = """\
Language models that run on this machine, served by ohmygpu. `list_models` names what is installed,
`chat` asks one of them, `status` says whether the server runs and what it holds in memory."""

_PROGRESS_S = 0.25  # between two progress notifications


class ChatResult(BaseModel):
    """What the tool chat returns."""

    model: str = Field(description="The model that answered.")
    answer: str = Field(description="Its answer.")
    finish_reason: str = Field(
        description="stop: the answer is complete; length: it was cut off at a token limit."
    )
    prompt_tokens: int = Field(description="Tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens of the answer.")


class InstalledModel(BaseModel):
    """One entry of list_models."""

    name: str = Field(description="What to pass as `model`.")
    quantization: str | None = Field(description="Precision of its weights, as Q4_1 or q8.")
    parameters: int | None = Field(description="Number of weights.")
    context_tokens: int | None = Field(description="Longest prompt and answer together, in tokens.")
    can_chat: bool = Field(description="Whether it has a chat template.")
    size_bytes: int = Field(description="Size on disk.")


class ModelList(BaseModel):
    """What the tool list_models returns."""

    models: list[InstalledModel] = Field(description="Installed models, newest first.")


class LoadedState(BaseModel):
    """One model in memory."""

    name: str
    state: str = Field(description="loading, ready, error or unloaded.")
    running: int = Field(description="Requests being answered.")
    waiting: int = Field(description="Requests in the queue.")
    memory_bytes: int


class Status(BaseModel):
    """What the tool status returns."""

    running: bool = Field(description="Whether the server answers.")
    message: str = Field(description="The same in words, with what to do when it does not run.")
    url: str | None = None
    version: str | None = None
    uptime_s: float | None = None
    loaded: list[LoadedState] = Field(default=[], description="Models in memory.")


def serve(settings: Settings) -> None:
    """Serve on stdin and stdout until the input ends."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    # A thread waits for the next line of input and no exception reaches it there: Ctrl-C must end
    # the process itself. There is nothing to clean up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    build(settings).run()


def build(settings: Settings) -> MCPServer:
    """The server with its three tools."""
    server = MCPServer("ohmygpu", version=__version__, instructions=INSTRUCTIONS)
    tools = Tools(settings)
    read_only = ToolAnnotations(
        read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
    )
    server.tool(title="Ask a local model", annotations=_asking())(tools.chat)
    server.tool(title="Installed models", annotations=read_only)(tools.list_models)
    server.tool(title="State of the server", annotations=read_only)(tools.status)
    return server


def _asking() -> ToolAnnotations:
    # changes nothing, but the same question may be answered differently
    return ToolAnnotations(
        read_only_hint=True, destructive_hint=False, idempotent_hint=False, open_world_hint=False
    )


class Tools:
    """The tools, each a call to the daemon."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def chat(
        self,
        ctx: Context,
        prompt: Annotated[str, Field(description="The message to answer.")],
        model: Annotated[
            str | None,
            Field(description="An installed model; without it the first of list_models answers."),
        ] = None,
        system: Annotated[str | None, Field(description="The system message.")] = None,
        temperature: Annotated[
            float | None,
            Field(ge=0, le=2, description="0 always takes the likeliest token."),
        ] = None,
        max_tokens: Annotated[
            int | None, Field(ge=1, le=2**31 - 1, description="Longest answer, in tokens.")
        ] = None,
    ) -> Annotated[CallToolResult, ChatResult]:
        """Ask a language model that runs on this machine and return its answer."""
        options = ChatOptions(temperature=temperature, max_tokens=max_tokens)
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", prompt))
        async with self._daemon() as (client, _):
            name = model or await _first_model(client)
            result = await _answer(ctx, client, name, messages, options)
        return CallToolResult(
            content=[TextContent(type="text", text=result.answer)],
            structured_content=result.model_dump(),
        )

    async def list_models(self) -> ModelList:
        """List the language models installed on this machine."""
        async with self._daemon() as (client, _):
            models = await client.models()
        return ModelList(models=[_describe(entry) for entry in models])

    async def status(self) -> Status:
        """Say whether the local model server runs, where, and which models it holds in memory."""
        try:
            _, health = await asyncio.to_thread(find_daemon, self._settings)
        except OhMyGPUError as error:
            return Status(running=False, message=error.message)
        count = len(health.models)
        return Status(
            running=True,
            message=f"running at {health.url} with {count} model{'s' * (count != 1)} in memory",
            url=health.url,
            version=health.version,
            uptime_s=health.uptime_s,
            loaded=[
                LoadedState(
                    name=entry.name,
                    state=entry.state,
                    running=entry.running,
                    waiting=entry.waiting,
                    memory_bytes=entry.memory_bytes,
                )
                for entry in health.models
            ],
        )

    @contextlib.asynccontextmanager
    async def _daemon(self) -> AsyncIterator[tuple[AsyncClient, Health]]:
        """A client of the running daemon; our errors become tool errors, which the model reads."""
        try:
            address, health = await asyncio.to_thread(find_daemon, self._settings)
            async with AsyncClient(address) as client:
                yield client, health
        except OhMyGPUError as error:
            near = [str(name) for name in error.details.get("suggestions") or ()]
            known = any(name in error.message for name in near)
            hint = f"; near names: {', '.join(near)}" if near and not known else ""
            raise ToolError(error.message + hint) from error


async def _first_model(client: AsyncClient) -> str:
    models = await client.models()
    for entry in models:
        if entry.has_template:
            return entry.name
    raise ModelNotFound(
        "no installed model can chat; the user can install one in a terminal with"
        " `omg pull smollm2`"
    )


async def _answer(
    ctx: Context, client: AsyncClient, model: str, messages: list[Message], options: ChatOptions
) -> ChatResult:
    """The whole answer, with progress while it grows; cancelling closes the HTTP stream."""
    pieces: list[str] = []
    finish: FinishReason | None = None
    usage: Usage | None = None
    reported_s = 0.0
    await ctx.report_progress(0, options.max_tokens, "waiting for the model")
    async with contextlib.aclosing(client.chat(model, messages, options)) as deltas:
        async for delta in deltas:
            finish, usage = delta.finish_reason or finish, delta.usage or usage
            if delta.text:
                pieces.append(delta.text)
            now_s = time.monotonic()
            if pieces and now_s - reported_s >= _PROGRESS_S:
                reported_s = now_s
                await ctx.report_progress(len(pieces), options.max_tokens, "generating")
    if finish is None or usage is None:
        raise OhMyGPUError("the daemon ended the answer without saying why")
    return ChatResult(
        model=model,
        answer="".join(pieces),
        finish_reason=str(finish),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _describe(entry: ModelInfo) -> InstalledModel:
    return InstalledModel(
        name=entry.name,
        quantization=entry.quantization,
        parameters=entry.parameters,
        context_tokens=entry.context_tokens,
        can_chat=entry.has_template,
        size_bytes=entry.record.compiled_bytes,
    )
