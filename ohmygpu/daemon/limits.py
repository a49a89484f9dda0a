"""Bounds on what a client may send: body size, time and encoding, and strict JSON."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ohmygpu.core.errors import InvalidRequest

from .errors import Family, HttpRefusal, send_error
from .security import Asgi, Receive, Scope, Send, header

BODY_STALL_S = 30.0  # longest wait for the next piece of a body
BODY_TOTAL_S = 300.0  # longest time for a whole body
BODYLESS_MAX_BYTES = 64 * 1024  # for methods and paths that take no body
LINGER_S = 2.0  # how long a refused client's bytes are read and dropped, so it sees the answer
MAX_JSON_DEPTH = 128
MAX_INT_CHARACTERS = 20  # those of -(2**63) and of 2**64 - 1
MAX_BUFFERED_BODIES = 8  # of the full size, over all connections together
_BODY_METHODS = {"POST", "PUT", "PATCH", "DELETE"}
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class BodyLimit:
    """ASGI middleware: reads the whole body within bounds before the application sees the request.

    Counting what arrives, not what Content-Length says, bounds chunked bodies too, on every route.
    Refuses with 413 (too large), 408 (too slow), 415 (Content-Encoding) and 503 (too many large
    bodies at once) in the shape of the path's API family.
    """

    def __init__(
        self,
        app: Asgi,
        max_body_bytes: int,
        *,
        stall_s: float = BODY_STALL_S,
        total_s: float = BODY_TOTAL_S,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._stall_s = stall_s
        self._total_s = total_s
        self._buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            try:
                gone = await self._read(scope, receive, body)
            except HttpRefusal as error:
                await _refuse(scope, receive, send, error)
                return
            if gone:
                return
            await self._app(scope, _replay(bytes(body), receive), send)
        finally:
            self._buffered_bytes -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Fill `body`; True when the client went away. Raises HttpRefusal."""
        encoding = header(scope, b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in {"", "identity"}:
            raise HttpRefusal(
                "compressed request bodies are not supported; send the body without "
                "Content-Encoding",
                status=415,
            )
        limit = self._limit(scope)
        declared = header(scope, b"content-length")
        if declared is not None and declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._total_s):
                while True:
                    message = await asyncio.wait_for(receive(), self._stall_s)
                    if message["type"] == "http.disconnect":
                        return True
                    piece = message.get("body", b"")
                    body += piece
                    self._buffered_bytes += len(piece)
                    if len(body) > limit:
                        raise _too_large(limit)
                    if self._buffered_bytes > MAX_BUFFERED_BODIES * self._max_body_bytes:
                        raise HttpRefusal(
                            "too many large requests at once; try again in a few seconds",
                            status=503,
                            retry_after_s=5,
                        )
                    if not message.get("more_body", False):
                        return False
        except TimeoutError:
            raise HttpRefusal("the request body did not arrive in time", status=408) from None

    def _limit(self, scope: Scope) -> int:
        takes_body = scope["method"] in _BODY_METHODS and scope["path"].startswith(
            ("/v1/", "/api/")
        )
        return self._max_body_bytes if takes_body else min(BODYLESS_MAX_BYTES, self._max_body_bytes)


def _too_large(limit: int) -> HttpRefusal:
    return HttpRefusal(
        f"the request body is larger than the {limit} bytes this server accepts",
        status=413,
        limit_bytes=limit,
    )


async def _refuse(scope: Scope, receive: Receive, send: Send, error: HttpRefusal) -> None:
    """Answer, then drop what still arrives for a moment: closing at once would reset the connection
    and the client, busy sending, would never read the answer."""
    await send_error(send, scope["path"], error, [("connection", "close")], more_body=True)
    try:
        async with asyncio.timeout(LINGER_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the connection says next (that it closed)."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict[str, Any]:
        return pending.pop() if pending else await receive()

    return replay


def parse_body(raw: bytes, family: Family) -> dict[str, Any]:
    """The JSON object in a request body, whatever its Content-Type says.

    Stricter than `json.loads`: NaN, Infinity, numbers beyond float or 64 bits, lone surrogates and
    deep nesting raise InvalidRequest, as does anything that is not an object. Ollama takes `null`
    for an empty object and fields in any case, and so do we on its API.
    """
    if not raw.strip():
        message = "missing request body" if family == "ollama" else "the request body is empty"
        raise InvalidRequest(message)
    try:
        text = raw.decode("utf-8-sig")
        data = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("the request body is not valid UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from None
    if data is None and family == "ollama":
        return {}
    if not isinstance(data, dict):
        raise InvalidRequest("the request body must be a JSON object")
    _check_depth(data)
    if _SURROGATE_ESCAPE.search(text):
        _check_encodable(data)
    if family == "ollama":
        return {field.lower(): value for field, value in data.items()}
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > MAX_INT_CHARACTERS:  # beyond any parameter, and float() of it would overflow
        raise ValueError("a number is out of range")
    return int(text)


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the request body is nested deeper than {MAX_JSON_DEPTH} levels")


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _check_encodable(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest(
            "the request body has half of a surrogate pair (\\ud800 to \\udfff) in a string"
        ) from None


def check_known(body: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise InvalidRequest naming a field that says something and is not one of `known`."""
    for field, value in body.items():
        if value is not None and field not in known:
            raise InvalidRequest(
                f"{field[:80]}: unknown field; this request takes {', '.join(sorted(known))}",
                param=field[:80],
            )


def boolean_field(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """A boolean of a request body, `default` when absent or null. Raises InvalidRequest."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return value


def text_field(body: Mapping[str, Any], *names: str) -> str | None:
    """The first of `names` that is there, a text that is not empty; else None. InvalidRequest."""
    for name in names:
        value = body.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be a string", param=name)
        return value
    return None
