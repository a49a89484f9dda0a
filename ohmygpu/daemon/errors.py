"""Errors as HTTP: which status each error has, and which API family's body a path answers with."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from ohmygpu.core.errors import (
    AccessDenied,
    Busy,
    Cancelled,
    Conflict,
    CorruptFile,
    DaemonError,
    DiskFull,
    InvalidRequest,
    NetworkError,
    NotFound,
    OhMyGPUError,
    OutOfMemory,
    RateLimited,
    RuntimeFailure,
    UnsupportedModel,
)

from . import ollama, openai

Family = Literal["openai", "ollama"]
Headers = list[tuple[str, str]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

JSON_TYPE = "application/json; charset=utf-8"
CLIENT_CLOSED = 499  # the status nginx and Ollama give a request whose client went away

# First match wins, so a subclass stands before its base.
_STATUSES: tuple[tuple[type[OhMyGPUError], int], ...] = (
    (InvalidRequest, 400),
    (NotFound, 404),
    (AccessDenied, 403),
    (Conflict, 409),
    (UnsupportedModel, 422),
    (RateLimited, 429),
    (NetworkError, 502),
    (Busy, 503),
    (OutOfMemory, 503),
    (RuntimeFailure, 500),
    (CorruptFile, 500),
    (DiskFull, 507),
    (DaemonError, 503),
    (Cancelled, CLIENT_CLOSED),
)


class HttpRefusal(InvalidRequest):
    """A request refused for its HTTP form; `details["status"]` is the status to answer with."""

    code = "http_refusal"


def status_of(error: OhMyGPUError) -> int:
    """HTTP status of an error; 500 for one without a rule."""
    if isinstance(error, HttpRefusal):
        return int(error.details["status"])
    if isinstance(error, RuntimeFailure) and error.retry_after_s is not None:
        return 503  # the worker died; the next request gets a fresh one
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return 500


def family_of(path: str) -> Family:
    """The API family that owns a path: Ollama's for /api and `/`, else OpenAI's."""
    return "ollama" if path in {"/", "/api"} or path.startswith("/api/") else "openai"


def error_body(error: OhMyGPUError, family: Family) -> dict[str, Any]:
    """Body of an error in the shape of one API family."""
    if family == "ollama":
        return dict(ollama.error_body(error))
    return openai.error_body(error, status_of(error))


def error_headers(error: OhMyGPUError) -> Headers:
    """Retry-After where a wait helps, and a word to SDKs where a retry cannot."""
    if error.retry_after_s is not None:
        return [("retry-after", str(max(1, math.ceil(error.retry_after_s))))]
    if status_of(error) >= 500 and not isinstance(error, NetworkError):
        return [("x-should-retry", "false")]
    return []


def to_json(data: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON; a lone surrogate, which UTF-8 cannot carry, becomes `?`."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def send_error(
    send: Send, path: str, error: OhMyGPUError, headers: Headers, *, more_body: bool = False
) -> None:
    """Answer with an error at ASGI level. With `more_body` the caller ends the response later."""
    body = to_json(error_body(error, family_of(path)))
    fields = [("content-type", JSON_TYPE), ("content-length", str(len(body)))]
    fields += error_headers(error) + headers
    await send(
        {
            "type": "http.response.start",
            "status": status_of(error),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": more_body})
