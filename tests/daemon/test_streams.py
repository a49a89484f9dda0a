"""Streams over real sockets: honest errors, clean ends, and clients that vanish or do not read."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from h2.connection import H2Connection

from ohmygpu.core.errors import ContextLengthExceeded, OhMyGPUError, RuntimeFailure
from ohmygpu.daemon.streams import collect, frames, ndjson, sse
from ohmygpu.runtime_api import Delta, FinishReason
from tests.daemon.fakes import (
    END,
    RawClient,
    Runtimes,
    install_model,
    listening,
    make_services,
    settings_of,
    until,
)

OPENAI = ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}]})
CHAT = ("/api/chat", {"model": "m", "messages": [{"role": "user", "content": "hi"}]})
GENERATE = ("/api/generate", {"model": "m", "prompt": "hi"})
APIS = (OPENAI, CHAT, GENERATE)
Api = tuple[str, dict[str, Any]]


class Setup:
    def __init__(self, home: Path) -> None:
        install_model(home, "m")
        self.runtimes = Runtimes()
        self.services = make_services(settings_of(home), self.runtimes)

    @asynccontextmanager
    async def client(self, api: Api, *, stream: bool) -> AsyncIterator[RawClient]:
        """A client that has sent a request to a daemon."""
        async with listening(self.services) as port:
            client = await RawClient.connect(port)
            await client.post(api[0], api[1] | {"stream": stream}, Connection="close")
            yield client
            await client.close()

    async def users(self) -> int:
        return sum(model.users for model in await self.services.manager.loaded())


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def body_of(answer: bytes) -> bytes:
    """The body of an HTTP answer whose chunks are taken apart."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"chunked" not in head.lower():
        return rest
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            assert rest == b"\r\n", "the body must end cleanly"
            return body
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


def status_of_answer(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("api", APIS, ids=lambda api: api[0])
async def test_a_stream_is_chunks_and_one_clean_end(setup: Setup, api: Api) -> None:
    setup.runtimes.enqueue("Hel", "lo", END)
    async with setup.client(api, stream=True) as client:
        answer = await client.rest()
    assert status_of_answer(answer) == 200
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"cache-control: no-cache" in head
    body = body_of(answer)
    if api is OPENAI:
        assert b"content-type: text/event-stream" in head
        events = body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello"
    else:
        assert b"content-type: application/x-ndjson" in head
        lines = [json.loads(line) for line in body.splitlines()]
        assert [line["done"] for line in lines].count(True) == 1
        assert lines[-1]["done"]
        assert lines[-1]["load_duration"] > 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("api", APIS, ids=lambda api: api[0])
async def test_an_error_before_the_first_piece_is_a_real_status(
    setup: Setup, api: Api, stream: bool
) -> None:
    setup.runtimes.enqueue(
        ContextLengthExceeded(
            "the prompt has 9000 tokens, the context 2048",
            prompt_tokens=9000,
            context_tokens=2048,
        )
    )
    async with setup.client(api, stream=stream) as client:
        answer = await client.rest()
    assert status_of_answer(answer) == 400
    error = json.loads(body_of(answer))["error"]
    text = error if isinstance(error, str) else error["message"]
    assert "9000" in text
    assert "2048" in text
    assert setup.runtimes.running == 0


@pytest.mark.parametrize("api", APIS, ids=lambda api: api[0])
async def test_an_error_in_the_middle_is_one_last_error_and_a_clean_end(
    setup: Setup, api: Api
) -> None:
    setup.runtimes.enqueue("Hel", RuntimeFailure("the worker was killed", retry_after_s=1))
    async with setup.client(api, stream=True) as client:
        body = body_of(await client.rest())
    last = body.rstrip().split(b"\n")[-1].removeprefix(b"data: ")
    assert "the worker was killed" in json.dumps(json.loads(last)["error"])
    assert b"[DONE]" not in body
    assert b'"done":true' not in body


@pytest.mark.parametrize("api", APIS, ids=lambda api: api[0])
async def test_an_unforeseen_error_in_the_middle_says_nothing_about_the_inside(
    setup: Setup, api: Api
) -> None:
    setup.runtimes.enqueue("Hel", ZeroDivisionError("/secret"))
    async with setup.client(api, stream=True) as client:
        body = body_of(await client.rest())
    assert b"internal error" in body
    assert b"secret" not in body


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("api", APIS, ids=lambda api: api[0])
async def test_a_client_that_vanishes_frees_its_slot(setup: Setup, api: Api, stream: bool) -> None:
    never = asyncio.Event()
    setup.runtimes.enqueue("Hel", never, END)
    async with setup.client(api, stream=stream) as client:
        if stream:
            await client.until(b"Hel")
        else:
            await until(lambda: setup.runtimes.running > 0)
        assert await setup.users() == 1
        client.abort()
        async with asyncio.timeout(60):
            await setup.runtimes.finished.wait()
        assert setup.runtimes.running == 0
        await until(lambda: setup.services.state.requests == 0)
        assert await setup.users() == 0


async def test_a_client_that_vanishes_while_the_model_loads_ends_the_load(setup: Setup) -> None:
    setup.runtimes.may_load.clear()
    async with setup.client(OPENAI, stream=True) as client:
        await until(lambda: bool(setup.runtimes.loads))
        client.abort()
        async with asyncio.timeout(60):
            await setup.runtimes.stopping.wait()
        assert await setup.services.manager.loaded() == []


async def test_a_client_that_does_not_read_holds_up_nobody_and_is_held_back(setup: Setup) -> None:
    setup.runtimes.enqueue(*["x" * 65536] * 1000, END)
    async with listening(setup.services) as port:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", port))
        body = json.dumps(OPENAI[1] | {"stream": True})
        head = f"POST {OPENAI[0]} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        stalled.sendall(f"{head}\r\n\r\n{body}".encode())
        await until(lambda: setup.runtimes.running > 0)
        for _ in range(5):
            setup.runtimes.enqueue("ok", END)
            client = await RawClient.connect(port)
            await client.post(OPENAI[0], OPENAI[1], Connection="close")
            assert b'"ok"' in await client.rest()
            await client.close()
        assert setup.runtimes.running == 1  # 65 MB did not go into a buffer
        stalled.close()
        await until(lambda: setup.runtimes.running == 0)


async def test_the_next_request_on_a_connection_works_after_a_failed_one(setup: Setup) -> None:
    setup.runtimes.enqueue("Hel", RuntimeFailure("died"))
    setup.runtimes.enqueue("again", END)
    async with listening(setup.services) as port:
        client = await RawClient.connect(port)
        await client.post(OPENAI[0], OPENAI[1] | {"stream": True})
        await client.until(b"0\r\n\r\n")
        await client.post(OPENAI[0], OPENAI[1], Connection="close")
        assert b"again" in await client.rest()
        await client.close()


async def pieces(*items: Any) -> AsyncGenerator[Any, None]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


async def test_frames_leave_out_what_encodes_to_nothing_and_end_only_on_success() -> None:
    def encode(item: str) -> bytes:
        return item.encode()

    def encode_error(error: OhMyGPUError) -> bytes:
        return error.message.encode()

    good = [frame async for frame in frames(pieces("a", "", "b"), encode, encode_error, b"END")]
    assert good == [b"a", b"b", b"END"]
    failing = pieces("a", OhMyGPUError("broken"))
    assert [frame async for frame in frames(failing, encode, encode_error, b"END")] == [
        b"a",
        b"broken",
    ]


async def test_collecting_an_aborted_or_broken_off_answer_is_an_error() -> None:
    text, last = await collect(pieces(Delta(text="a"), Delta(text="b"), END))
    assert (text, last) == ("ab", END)
    with pytest.raises(RuntimeFailure, match="unloaded"):
        await collect(pieces(Delta(text="a"), Delta(finish_reason=FinishReason.ABORT)))
    with pytest.raises(RuntimeFailure):
        await collect(pieces(Delta(text="a")))


def test_frames_on_the_wire_are_exact() -> None:
    assert sse([{"a": "é"}, {"b": 1}]) == 'data: {"a":"é"}\n\ndata: {"b":1}\n\n'.encode()
    assert ndjson([{"a": "x\ny"}]) == b'{"a":"x\\ny"}\n'
    assert sse([]) == b""
    assert ndjson([{"a": "\ud800"}]) == b'{"a":"?"}\n'


async def test_over_http2_a_reset_stream_frees_its_slot_and_the_connection_lives_on(
    setup: Setup,
) -> None:
    setup.runtimes.enqueue("Hel", asyncio.Event(), END)
    setup.runtimes.enqueue("again", END)
    async with listening(setup.services) as port:
        raw = await RawClient.connect(port)
        http2 = H2Connection()
        http2.initiate_connection()
        body = json.dumps(OPENAI[1] | {"stream": True}).encode()

        async def ask() -> int:
            stream = http2.get_next_available_stream_id()
            head = {":method": "POST", ":path": OPENAI[0], ":scheme": "http"}
            fields = head | {":authority": "localhost", "content-length": str(len(body))}
            http2.send_headers(stream, list(fields.items()))
            http2.send_data(stream, body, end_stream=True)
            raw.writer.write(http2.data_to_send())
            return int(stream)

        async def until_data(stream: int, text: bytes) -> None:
            received = b""
            async with asyncio.timeout(60):
                while text not in received:
                    for event in http2.receive_data(await raw.reader.read(65536)):
                        if getattr(event, "stream_id", None) == stream:
                            received += getattr(event, "data", None) or b""
                    raw.writer.write(http2.data_to_send())

        stream = await ask()
        await until_data(stream, b"Hel")
        http2.reset_stream(stream)
        raw.writer.write(http2.data_to_send())
        await until(lambda: setup.runtimes.running == 0)
        await until_data(await ask(), b"[DONE]")
        await raw.close()
