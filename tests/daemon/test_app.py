"""What holds for every path: errors as JSON, ids, limits, draining."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from quart import Quart

from ohmygpu.core.errors import (
    Busy,
    Cancelled,
    ContextLengthExceeded,
    DiskFull,
    ModelNotFound,
    NetworkError,
    OhMyGPUError,
    OutOfMemory,
    RateLimited,
    RuntimeFailure,
    UnsupportedModel,
)
from ohmygpu.daemon.app import create_app
from ohmygpu.daemon.errors import error_headers, status_of
from ohmygpu.daemon.services import Services
from tests.daemon.fakes import (
    END,
    RawClient,
    Runtimes,
    install_model,
    listening,
    make_services,
    settings_of,
)

CHAT = {"model": "org/m", "messages": [{"role": "user", "content": "hi"}]}


class Setup:
    def __init__(self, home: Path) -> None:
        install_model(home, "org/m")
        self.runtimes = Runtimes()
        self.services: Services = make_services(
            settings_of(home, max_body_bytes=100_000), self.runtimes
        )
        self.app: Quart = create_app(self.services)
        self.client = self.app.test_client()


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    setup = Setup(tmp_path)
    yield setup
    await setup.services.manager.shutdown()


async def test_an_unknown_path_is_404_in_the_shape_of_its_family(setup: Setup) -> None:
    for send in (setup.client.get, setup.client.post, setup.client.delete, setup.client.put):
        for path in ("/v1/rerank", "/v1/", "/v1/decisions", "/nowhere", "/v1"):
            response = await send(path)
            assert response.status_code == 404, path
            error = (await response.get_json())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "not_found_error"
        for path in ("/api/rerank", "/api/", "/api/blobs/sha256:0"):
            response = await send(path)
            assert response.status_code == 404
            assert isinstance((await response.get_json())["error"], str)


async def test_a_wrong_method_is_405_with_allow_and_json(setup: Setup) -> None:
    get, post = setup.client.get, setup.client.post
    for send, path in ((get, "/v1/chat/completions"), (get, "/api/show"), (post, "/health")):
        response = await send(path)
        assert response.status_code == 405
        assert response.headers["Allow"]
        assert response.content_type.startswith("application/json")
        assert "error" in await response.get_json()


async def test_every_answer_has_an_id_of_its_own_and_says_nothing_about_the_server(
    setup: Setup,
) -> None:
    ids = set()
    for path in ("/health", "/nowhere", "/v1/models", "/"):
        response = await setup.client.get(path)
        ids.add(response.headers["x-request-id"])
        assert "server" not in {name.lower() for name, _ in response.headers.items()}
    assert len(ids) == 4


async def test_bad_bodies_are_400_in_the_shape_of_their_family(setup: Setup) -> None:
    bodies = [b"", b"{", b"[]", b"42", b'"x"', b'{"model": NaN}', b"\xff", b'{"model": "\\ud800"}']
    for body in bodies:
        response = await setup.client.post("/v1/chat/completions", data=body)
        assert response.status_code == 400, body
        assert (await response.get_json())["error"]["type"] == "invalid_request_error"
        response = await setup.client.post("/api/chat", data=body)
        assert response.status_code == 400, body
        assert isinstance((await response.get_json())["error"], str)
    response = await setup.client.post("/api/generate", data=b"")
    assert await response.get_json() == {"error": "missing request body"}


async def test_json_is_read_whatever_its_content_type(setup: Setup) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
        setup.runtimes.enqueue("ok", END)
        response = await setup.client.post(
            "/v1/chat/completions", data=json.dumps(CHAT).encode(), headers={"Content-Type": kind}
        )
        assert response.status_code == 200


async def test_the_middleware_stands_before_the_application(setup: Setup) -> None:
    response = await setup.client.get("/health", headers={"Origin": "https://evil.com"})
    assert response.status_code == 403
    response = await setup.client.post("/api/chat", data=b"x" * 100_001)
    assert response.status_code == 413
    assert isinstance((await response.get_json())["error"], str)
    response = await setup.client.options("/v1/chat/completions")
    assert response.status_code == 204


async def test_an_unforeseen_error_is_500_without_a_word_about_the_inside(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    setup.runtimes.enqueue(ZeroDivisionError("/home/secret"))
    with caplog.at_level(logging.ERROR):
        response = await setup.client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    text = await response.get_data(as_text=True)
    assert "secret" not in text
    assert "Traceback" not in text
    assert json.loads(text)["error"]["code"] == "internal_error"
    assert "/home/secret" in caplog.text


async def test_while_it_stops_new_work_is_503_and_health_still_answers(setup: Setup) -> None:
    setup.services.state.draining = True
    response = await setup.client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    response = await setup.client.get("/health")
    assert response.status_code == 503
    assert (await response.get_json())["status"] == "stopping"


async def test_requests_in_progress_are_counted_down_to_zero(setup: Setup) -> None:
    setup.runtimes.enqueue(ZeroDivisionError())
    await setup.client.post("/v1/chat/completions", json=CHAT)
    await setup.client.get("/nowhere")
    assert setup.services.state.requests == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ContextLengthExceeded("x"), 400),
        (ModelNotFound("x"), 404),
        (UnsupportedModel("x"), 422),
        (RateLimited("x", retry_after_s=3), 429),
        (NetworkError("x"), 502),
        (Busy("x"), 503),
        (OutOfMemory("x"), 503),
        (RuntimeFailure("a load that cannot succeed"), 500),
        (RuntimeFailure("a worker that died", retry_after_s=1), 503),
        (DiskFull("x"), 507),
        (Cancelled("x"), 499),
        (OhMyGPUError("x"), 500),
    ],
)
def test_errors_have_the_status_that_clients_act_on(error: OhMyGPUError, status: int) -> None:
    assert status_of(error) == status


def test_clients_are_told_when_a_retry_helps_and_when_it_does_not() -> None:
    assert error_headers(Busy("x", retry_after_s=0.2)) == [("retry-after", "1")]
    assert error_headers(OutOfMemory("x")) == [("x-should-retry", "false")]
    assert error_headers(NetworkError("x")) == []
    assert error_headers(ModelNotFound("x")) == []


async def test_an_endless_chunked_body_is_cut_off_on_every_path(setup: Setup) -> None:
    async with listening(setup.services) as port:
        for path in ("/v1/chat/completions", "/nowhere", "/api/chat", "/health"):
            client = await RawClient.connect(port)
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.writer.write(head.encode())
            sent = 0
            answer = asyncio.create_task(client.until(b"\r\n\r\n"))
            while not answer.done() and sent < 100_000_000:
                client.writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
                try:
                    await client.writer.drain()
                except ConnectionError:
                    break
            assert b" 413 " in await answer, path
            assert sent < 20_000_000
            await client.close()


async def test_a_declared_body_that_is_too_long_gets_its_answer_before_it_is_sent(
    setup: Setup,
) -> None:
    async with listening(setup.services) as port:
        client = await RawClient.connect(port)
        client.writer.write(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n"
        )
        assert b" 413 " in await client.until(b"\r\n\r\n")
        await client.close()


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("/health", "localhost", 200),
        ("/health", "evil.com", 403),
        ("http://localhost/health", "evil.com", 403),
        ("/health", "localhost/health?x=", 403),
        ("//v1/models", "localhost", 200),
        ("/v1/../v1/models", "localhost", 404),
        ("/V1/models", "localhost", 404),
        ("/v1/models/", "localhost", 200),
        ("/v1/models/org%2Fm:latest", "127.0.0.1", 200),
        ("/v1/models/ORG/m", "127.0.0.1", 200),
        ("/v1/models/%F0%9F%98%80", "localhost", 400),
        ("/v1/models/..%2f..%2fetc%2fpasswd", "localhost", 404),
        ("/v1/models/org/n", "localhost", 404),
    ],
)
async def test_paths_and_hosts_are_taken_as_sent(
    setup: Setup, path: str, host: str, status: int
) -> None:
    async with listening(setup.services) as port:
        client = await RawClient.connect(port)
        client.writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = await client.until(b"\r\n\r\n")
        await client.close()
    assert int(head.split()[1]) == status
    assert b"application/json" in head


async def test_a_websocket_is_refused(setup: Setup) -> None:
    async with listening(setup.services) as port:
        client = await RawClient.connect(port)
        client.writer.write(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 403 " in await client.until(b"\r\n\r\n")
        await client.close()


async def test_two_hundred_clients_at_once_all_get_their_answer(setup: Setup) -> None:
    for _ in range(200):
        setup.runtimes.enqueue("ok", END)

    async def ask(port: int) -> bytes:
        client = await RawClient.connect(port)
        await client.post("/v1/chat/completions", CHAT | {"stream": True}, Connection="close")
        answer = await client.rest()
        await client.close()
        return answer

    async with listening(setup.services) as port:
        answers = await asyncio.gather(*(ask(port) for _ in range(200)))
    assert all(b"data: [DONE]" in answer for answer in answers)
    assert len(setup.runtimes.loads) == 1
    assert setup.services.state.requests == 0
