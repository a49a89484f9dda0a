from __future__ import annotations

from typing import Any

import pytest

from ohmygpu.daemon.security import AccessRules, Guard, host_name, is_loopback

LOCAL = AccessRules("127.0.0.1", ["https://chat.example.com", "https://*.trusted.org"])


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:10692",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1:10692",
        "127.8.8.8",
        "[::1]:10692",
        "192.168.1.5",
        "10.0.0.1:80",
        "0.0.0.0:10692",
        "box.local",
        "a.b.localhost:8080",
        "host.docker.internal:10692",
        "chat.example.com",
    ],
)
def test_local_names_are_answered(host: str) -> None:
    assert LOCAL.host_allowed(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:10692",
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "8.8.8.8",
        "[2606:4700::1]",
        "a/health?x=",
        "localhost/@evil.com",
        "user@localhost",
        "localhost#evil",
        "localhost:99999",
        "localhost:x",
        "localhost,evil.com",
        "",
        "local",
        "[::1",
        "x" * 600 + ".local",
    ],
)
def test_other_names_are_not(host: str) -> None:
    assert not LOCAL.host_allowed(host)


def test_beyond_loopback_any_address_is_answered_and_no_unknown_name() -> None:
    rules = AccessRules("0.0.0.0", ["https://ai.example.com:8443"])
    assert rules.host_allowed("8.8.8.8:10692")
    assert rules.host_allowed("ai.example.com")
    assert not rules.host_allowed("evil.com")


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "https://localhost:3000",
        "http://127.0.0.1:8080",
        "http://0.0.0.0",
        "http://[::1]:5173",
        "app://obsidian.md",
        "file://",
        "tauri://localhost",
        "vscode-webview://1a2b",
        "vscode-file://vscode-app",
        "https://chat.example.com",
        "HTTPS://Chat.Example.com",
        "https://a.trusted.org",
        "http://box.local:10692",
    ],
)
def test_local_and_configured_origins_are_allowed(origin: str) -> None:
    assert LOCAL.origin_allowed(origin, "box.local:10692")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.com",
        "null",
        "",
        "http://localhost.evil.com",
        "https://trusted.org.evil.com",
        "http://chat.example.com",
        "https://chat.example.com:444",
        "chrome-extension://abc",
        "http://evil.com/localhost",
        "http://localhost@evil.com",
        "https://" + "a" * 10_000 + ".trusted.org",
    ],
)
def test_other_origins_are_refused(origin: str) -> None:
    assert not LOCAL.origin_allowed(origin, "localhost:10692")


def test_the_null_origin_is_allowed_when_configured() -> None:
    assert AccessRules("127.0.0.1", ["null"]).origin_allowed("null", "localhost")


def test_loopback_is_told_from_the_rest() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "[::1]"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "192.168.1.2", "example.com", "::"))


def test_the_host_is_read_without_port_and_trailing_dot() -> None:
    assert host_name("Example.COM.:80") == "example.com"
    assert host_name("[fe80::1]:80") == "fe80::1"
    assert host_name("a b") is None


async def call(
    headers: dict[str, str],
    *,
    method: str = "GET",
    path: str = "/v1/models",
    client: tuple[str, int] | None = ("127.0.0.1", 1),
    kind: str = "http",
) -> tuple[list[dict[str, Any]], bool]:
    """(messages sent, whether the application was reached)."""
    sent: list[dict[str, Any]] = []
    reached = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal reached
        reached = True
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        raise AssertionError("the guard must not read the body")

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "client": client,
        "server": client,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    await Guard(app, LOCAL)(scope, receive, send)
    return sent, reached


def fields(message: dict[str, Any]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in message["headers"]}


async def test_a_foreign_host_gets_403_before_anything_is_read() -> None:
    sent, reached = await call({"Host": "evil.com"}, method="POST")
    assert sent[0]["status"] == 403
    assert not reached


async def test_a_foreign_origin_gets_403_whatever_the_method() -> None:
    for method in ("GET", "POST", "OPTIONS", "DELETE", "HEAD"):
        headers = {"Host": "localhost", "Origin": "https://evil.com", "Content-Type": "text/plain"}
        sent, reached = await call(headers, method=method)
        assert sent[0]["status"] == 403
        assert "access-control-allow-origin" not in fields(sent[0])
        assert not reached


async def test_an_allowed_origin_is_named_in_the_answer_never_a_star() -> None:
    sent, reached = await call({"Host": "localhost", "Origin": "http://localhost:3000"})
    assert reached
    answer = fields(sent[0])
    assert answer["access-control-allow-origin"] == "http://localhost:3000"
    assert answer["vary"] == "Origin"


async def test_a_request_without_origin_gets_no_cors_headers() -> None:
    sent, reached = await call({"Host": "localhost"})
    assert reached
    assert sent[0]["headers"] == []


async def test_a_preflight_allows_the_headers_that_sdks_send() -> None:
    sent, reached = await call(
        {
            "Host": "127.0.0.1:10692",
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Private-Network": "true",
        },
        method="OPTIONS",
    )
    assert not reached
    assert sent[0]["status"] == 204
    answer = fields(sent[0])
    for name in ("authorization", "content-type", "x-stainless-retry-count", "x-stainless-timeout"):
        assert name in answer["access-control-allow-headers"]
    assert "DELETE" in answer["access-control-allow-methods"]
    assert answer["access-control-allow-private-network"] == "true"


async def test_the_unix_socket_is_exempt_from_the_host_rule() -> None:
    _, reached = await call({"Host": "anything.example"}, client=None)
    assert reached


async def test_websockets_are_refused() -> None:
    sent, reached = await call({"Host": "localhost"}, kind="websocket")
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert not reached


async def test_two_host_headers_cannot_hide_one_another() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def never(*_: Any) -> Any:
        raise AssertionError("the application must not be reached")

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"localhost"), (b"host", b"evil.com")],
    }
    await Guard(never, LOCAL)(scope, never, send)
    assert sent[0]["status"] == 403
