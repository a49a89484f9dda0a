"""Answers as HTTP: streamed frames with an honest end, or one JSON object, from one generator.

An error before the first item is a real HTTP status (`primed`); after it, one error frame and a
clean end of the stream. However a request ends, its generators are closed before the connection
is done with it (`defer_close`): closing is what frees an engine slot.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeVar

from quart import Response, request

from ohmygpu.core.errors import OhMyGPUError, RuntimeFailure
from ohmygpu.runtime_api import Delta

from .errors import JSON_TYPE, error_body, to_json
from .openai import finish_word

EXIT_STACK = "ohmygpu.exit_stack"  # the key of a request's AsyncExitStack in its ASGI scope
SSE_TYPE = "text/event-stream; charset=utf-8"
NDJSON_TYPE = "application/x-ndjson"
SSE_DONE = b"data: [DONE]\n\n"

_logger = logging.getLogger("ohmygpu.http")
T = TypeVar("T")


def sse(objects: Iterable[Mapping[str, Any]]) -> bytes:
    """Server-sent events, one per object; empty for none."""
    return b"".join(b"data: " + to_json(item) + b"\n\n" for item in objects)


def ndjson(objects: Iterable[Mapping[str, Any]]) -> bytes:
    """Lines of JSON, one per object; empty for none."""
    return b"".join(to_json(item) + b"\n" for item in objects)


def defer_close(generator: AsyncGenerator[Any, None]) -> None:
    """Close `generator` when the current request ends, whether it was answered or given up."""
    scope: Mapping[str, Any] = request.scope
    stack: contextlib.AsyncExitStack = scope[EXIT_STACK]
    stack.push_async_callback(generator.aclose)


async def primed(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """`source`, with its first item already there; what it raises before that is raised here."""
    defer_close(source)
    first = await anext(source)

    async def chained() -> AsyncGenerator[T, None]:
        yield first
        async for item in source:
            yield item

    return chained()


async def collect(deltas: AsyncIterator[Delta]) -> tuple[str, Delta]:
    """The whole text and the last Delta. Raises RuntimeFailure when the answer was cut off."""
    texts = []
    async for delta in deltas:
        texts.append(delta.text)
        if delta.finish_reason is not None:
            finish_word(delta.finish_reason)  # raises for an answer that was cut off
            return "".join(texts), delta
    raise RuntimeFailure("the model stopped without finishing its answer", retry_after_s=1)


async def frames(
    source: AsyncGenerator[T, None],
    encode: Callable[[T], bytes],
    encode_error: Callable[[OhMyGPUError], bytes],
    end: bytes = b"",
) -> AsyncGenerator[bytes, None]:
    """Each item encoded, then `end`; an error becomes one last frame without `end`."""
    try:
        async for item in source:
            if frame := encode(item):
                yield frame
    except OhMyGPUError as error:
        _logger.warning("the stream ended with an error: %s", error.message)
        yield encode_error(error)
    except Exception:
        _logger.exception("the stream failed")
        yield encode_error(internal_error())
    else:
        if end:
            yield end


def stream_response(body: AsyncGenerator[bytes, None], content_type: str) -> Response:
    """A response without deadline that no proxy should buffer."""
    defer_close(body)
    response = Response(body, content_type=content_type)
    response.timeout = None  # the default would cut every stream after a minute
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def json_response(data: Mapping[str, Any], status: int = 200) -> Response:
    """A JSON object as UTF-8."""
    return Response(to_json(data), status=status, content_type=JSON_TYPE)


def error_line(error: OhMyGPUError) -> bytes:
    """The last line of a failed NDJSON stream of Ollama's API."""
    return ndjson([error_body(error, "ollama")])


def error_event(error: OhMyGPUError) -> bytes:
    """The last event of a failed SSE stream."""
    return sse([error_body(error, "openai")])


def internal_error() -> OhMyGPUError:
    """What a client learns of a failure nobody foresaw; the log has the rest."""
    return OhMyGPUError("an internal error; daemon.log has the details under this request's id")
