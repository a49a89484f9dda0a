from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters, stdio_client
from mcp.types import CallToolResult

from ohmygpu.core.errors import ModelNotFound
from ohmygpu.core.settings import load_settings
from ohmygpu.mcp.server import build
from tests.cli.fake_daemon import FakeDaemon
from tests.cli.fake_models import install_fake

Connect = Callable[[], AbstractAsyncContextManager[Client]]
COMMAND = [sys.executable, "-m", "ohmygpu", "mcp"]


@pytest.fixture(params=["legacy", "auto"])
def era(request: pytest.FixtureRequest) -> str:
    """Which era of the protocol the SDK's own client speaks."""
    return str(request.param)


@pytest.fixture
def connect(era: str) -> Connect:
    """A client of a server in this process."""
    return lambda: Client(build(load_settings()), mode=era)


@pytest.fixture
def spawn(era: str) -> Connect:
    """A client of `omg mcp`, started as assistants start it."""

    @asynccontextmanager
    async def connected() -> AsyncIterator[Client]:
        environment = {key: os.environ[key] for key in os.environ if key.startswith("OHMYGPU")}
        server = StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=environment)
        async with Client(stdio_client(server), mode=era) as client:
            yield client

    return connected


@pytest.fixture
def daemon(home: Path, fake_daemon: FakeDaemon) -> FakeDaemon:
    fake_daemon.models.append(install_fake(home))
    return fake_daemon


async def test_over_stdio_tools_are_listed_answer_and_can_be_cancelled(
    daemon: FakeDaemon, spawn: Connect
) -> None:
    daemon.enqueue("Paris.")
    daemon.enqueue("One ", "two", hold_after=1)
    daemon.enqueue("Still here.")
    async with spawn() as client:
        tools = (await client.list_tools()).tools
        assert sorted(tool.name for tool in tools) == ["chat", "list_models", "status"]
        result = await client.call_tool("chat", {"prompt": "Capital of France?"})
        assert answer_of(result) == "Paris."
        call = asyncio.create_task(client.call_tool("chat", {"prompt": "count"}))
        assert await asyncio.to_thread(daemon.holding.wait, 20)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(daemon.client_left.wait, 20)
        assert answer_of(await client.call_tool("chat", {"prompt": "well?"})) == "Still here."


def answer_of(result: CallToolResult) -> str:
    assert result.structured_content is not None
    return str(result.structured_content["answer"])


async def test_the_three_tools_are_listed_with_schemas_and_hints(connect: Connect) -> None:
    async with connect() as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"chat", "list_models", "status"}
    chat = tools["chat"]
    assert chat.input_schema["required"] == ["prompt"]
    assert set(chat.input_schema["properties"]) == {
        "prompt",
        "model",
        "system",
        "temperature",
        "max_tokens",
    }
    for tool in tools.values():
        assert tool.description
        assert tool.output_schema is not None
        assert tool.output_schema["type"] == "object"
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint is True
        assert tool.annotations.open_world_hint is False


async def test_chat_answers_and_says_which_model_did(daemon: FakeDaemon, connect: Connect) -> None:
    daemon.enqueue("Par", "is.")
    async with connect() as client:
        result = await client.call_tool(
            "chat", {"prompt": "Capital of France?", "system": "Be brief.", "temperature": 0}
        )
    assert not result.is_error
    assert [block.text for block in result.content if block.type == "text"] == ["Paris."]
    assert result.structured_content == {
        "model": "org/tiny",
        "answer": "Paris.",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 2,
    }
    (body,) = daemon.chats()
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["temperature"] == 0


async def test_models_and_status_are_structured(daemon: FakeDaemon, connect: Connect) -> None:
    async with connect() as client:
        models = await client.call_tool("list_models", {})
        status = await client.call_tool("status", {})
    assert models.structured_content is not None
    (model,) = models.structured_content["models"]
    assert model == {
        "name": "org/tiny",
        "quantization": "q8",
        "parameters": 134_515_008,
        "context_tokens": 2048,
        "can_chat": True,
        "size_bytes": 138_000_000,
    }
    assert status.structured_content is not None
    assert status.structured_content["running"] is True
    assert status.structured_content["url"] == daemon.url


async def test_without_a_daemon_every_tool_answers_at_once_and_says_what_to_do(
    home: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "1")
    async with connect() as client:
        assert len((await client.list_tools()).tools) == 3
        for name, arguments in (("chat", {"prompt": "hi"}), ("list_models", {})):
            result = await client.call_tool(name, arguments)
            assert result.is_error
            assert result.content[0].type == "text"
            assert "omg serve" in result.content[0].text
        status = await client.call_tool("status", {})
    assert status.structured_content is not None
    assert status.structured_content["running"] is False
    assert "omg serve" in status.structured_content["message"]


async def test_errors_of_the_daemon_reach_the_model_with_near_names(
    daemon: FakeDaemon, connect: Connect
) -> None:
    daemon.enqueue(refusal=ModelNotFound("no model tinny", suggestions=["org/tiny"]), status=404)
    async with connect() as client:
        result = await client.call_tool("chat", {"prompt": "hi", "model": "tinny"})
    assert result.is_error
    assert result.content[0].type == "text"
    assert "no model tinny" in result.content[0].text
    assert "org/tiny" in result.content[0].text


async def test_a_machine_without_models_is_told_how_to_get_one(
    fake_daemon: FakeDaemon, connect: Connect
) -> None:
    async with connect() as client:
        result = await client.call_tool("chat", {"prompt": "hi"})
    assert result.is_error
    assert result.content[0].type == "text"
    assert "omg pull" in result.content[0].text


@pytest.mark.parametrize(
    "arguments",
    [{}, {"prompt": 3}, {"prompt": "x", "temperature": -1}, {"prompt": "x", "max_tokens": 0}],
)
async def test_bad_arguments_are_a_tool_error_and_reach_no_model(
    daemon: FakeDaemon, connect: Connect, arguments: dict[str, object]
) -> None:
    async with connect() as client:
        assert (await client.call_tool("chat", arguments)).is_error
    assert daemon.chats() == []


async def test_progress_is_reported_while_the_answer_grows(
    daemon: FakeDaemon, connect: Connect
) -> None:
    answer = daemon.enqueue("One ", "two ", "three", hold_after=2)
    seen: list[tuple[float, float | None]] = []
    reported = asyncio.Event()  # that text has come, not only that the call has begun

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total))
        if progress:
            reported.set()

    async with connect() as client:
        call = asyncio.create_task(
            client.call_tool(
                "chat", {"prompt": "count", "max_tokens": 9}, progress_callback=on_progress
            )
        )
        await asyncio.wait_for(reported.wait(), 20)
        answer.released.set()
        result = await call
    assert not result.is_error
    assert seen[:2] == [(0, 9), (1, 9)]
    assert [progress for progress, _ in seen] == sorted({progress for progress, _ in seen})


def test_the_end_of_input_ends_the_server_with_nothing_on_stdout(home: Path) -> None:
    result = subprocess.run(
        COMMAND, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_ctrl_c_and_sigterm_end_the_server_without_a_traceback(home: Path) -> None:
    request = (
        b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25",'
        b'"capabilities":{},"clientInfo":{"name":"t","version":"1"}}}\n'
    )
    for sign in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdin.write(request)
            process.stdin.flush()
            assert b'"serverInfo"' in process.stdout.readline()  # it serves now
            process.send_signal(sign)
            assert process.wait(20) == -sign
            assert b"Traceback" not in process.stderr.read()


def test_bad_settings_are_a_sentence_on_stderr(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "many")
    result = subprocess.run(
        COMMAND, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: server.port")
