from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.daemon import limits
from ohmygpu.daemon.limits import BodyLimit, boolean_field, parse_body, text_field


async def call(
    pieces: Iterable[bytes | None],
    *,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    limit: int = 1000,
    **how: float,
) -> tuple[int, bytes | None]:
    """(status, the body the application saw); a piece of None is a client that stalls."""
    queue = list(pieces)
    status = 0
    seen: bytes | None = None

    async def receive() -> dict[str, Any]:
        if not queue:
            return {"type": "http.disconnect"}
        piece = queue.pop(0)
        if piece is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": piece, "more_body": bool(queue)}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal seen
        message = await receive()
        assert not message["more_body"]
        seen = message["body"]
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    fields = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": fields}
    middleware = BodyLimit(app, limit, **how)
    await middleware(scope, receive, send)
    assert middleware._buffered_bytes == 0
    return status, seen


async def test_a_body_in_pieces_reaches_the_application_whole() -> None:
    assert await call([b"ab", b"", b"cd"]) == (200, b"abcd")
    assert await call([b"x" * 1000]) == (200, b"x" * 1000)


async def test_a_declared_length_beyond_the_limit_is_refused_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.01)
    assert await call([None], headers={"content-length": "1001"}) == (413, None)


async def test_a_chunked_body_is_counted_and_refused_when_it_grows_too_large() -> None:
    assert await call([b"x" * 400, b"x" * 400, b"x" * 201]) == (413, None)


async def test_paths_and_methods_that_take_no_body_have_a_small_limit() -> None:
    too_much = [b"x" * (limits.BODYLESS_MAX_BYTES + 1)]
    assert await call(too_much, path="/nowhere", limit=10**9) == (413, None)
    assert await call(too_much, method="GET", limit=10**9) == (413, None)
    assert (await call(too_much, limit=10**9))[0] == 200


async def test_many_large_bodies_at_once_are_refused_as_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_BUFFERED_BODIES", 0)
    assert await call([b"x"]) == (503, None)


async def test_a_body_that_stalls_or_drips_is_timed_out() -> None:
    assert await call([b"x", None], stall_s=0.01) == (408, None)
    assert await call([b"x", None], total_s=0.01) == (408, None)


async def test_a_client_that_leaves_while_sending_is_not_served() -> None:
    queue = [{"type": "http.request", "body": b"x", "more_body": True}]

    async def receive() -> dict[str, Any]:
        return queue.pop() if queue else {"type": "http.disconnect"}

    async def never(*_: Any) -> None:
        raise AssertionError("nobody is there")

    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": []}
    await BodyLimit(never, 1000)(scope, receive, never)


async def test_compressed_bodies_are_refused_and_identity_is_not() -> None:
    for encoding in ("gzip", "zstd", "br", "gzip, identity"):
        assert await call([b"x"], headers={"content-encoding": encoding}) == (415, None)
    assert await call([b"x"], headers={"content-encoding": "identity"}) == (200, b"x")


def test_an_object_is_read_whatever_stands_before_it() -> None:
    assert parse_body(b'\xef\xbb\xbf {"a": [1, 2.5, null, true, "\\u00e9"]}', "openai") == {
        "a": [1, 2.5, None, True, "é"]
    }
    assert parse_body(b'{"a": "\\ud83d\\ude00"}', "openai") == {"a": "😀"}
    assert parse_body(b"null", "ollama") == {}
    assert parse_body(b'{"seed": 18446744073709551615}', "openai") == {"seed": 2**64 - 1}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"   ",
        b"{",
        b"[]",
        b'"text"',
        b"42",
        b"null",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 21 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b'{"a": 1} {"b": 2}',
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_not_a_strict_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(raw, "openai")
    assert len(caught.value.message) < 300


def test_an_empty_body_is_told_in_each_familys_words() -> None:
    with pytest.raises(InvalidRequest, match=r"^missing request body$"):
        parse_body(b"", "ollama")
    with pytest.raises(InvalidRequest, match="is empty"):
        parse_body(b"", "openai")


def test_many_siblings_are_not_depth() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text"}]}] * 10_000}
    assert parse_body(json.dumps(body).encode(), "openai") == body


def test_fields_are_typed() -> None:
    assert boolean_field({"a": False}, "a", default=True) is False
    assert boolean_field({"a": None}, "a", default=True) is True
    assert text_field({"model": "", "name": "x"}, "model", "name") == "x"
    assert text_field({}, "model") is None
    with pytest.raises(InvalidRequest) as caught:
        boolean_field({"stream": "yes"}, "stream", default=True)
    assert caught.value.details["param"] == "stream"
    with pytest.raises(InvalidRequest):
        text_field({"model": 5}, "model")
