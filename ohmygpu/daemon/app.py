"""The ASGI application: middleware outside, routes inside, every error as JSON."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from typing import Any

from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from ohmygpu.core.errors import Busy, OhMyGPUError

from . import routes_embeddings, routes_manage, routes_ollama, routes_openai
from .errors import HttpRefusal, error_body, error_headers, family_of, send_error, status_of
from .limits import BodyLimit
from .request_id import REQUEST_ID
from .security import AccessRules, Asgi, Guard, Receive, Scope, Send
from .services import EXTENSION, DaemonState, Services
from .streams import EXIT_STACK, internal_error, json_response

_WHILE_DRAINING = {"/health"}  # still answered when new work is refused

_logger = logging.getLogger("ohmygpu.http")


def create_app(services: Services) -> Quart:
    """The application, with all middleware: what it serves is what tests see."""
    app = Quart("ohmygpu.daemon")
    app.extensions[EXTENSION] = services
    app.config.update(
        MAX_CONTENT_LENGTH=None,  # BodyLimit counts what arrives; this setting does not
        BODY_TIMEOUT=None,
        RESPONSE_TIMEOUT=None,  # a slow model is not an error
    )
    app.url_map.merge_slashes = False  # else a redirect, in HTML
    app.url_map.strict_slashes = False
    for module in (routes_openai, routes_ollama, routes_embeddings, routes_manage):
        app.register_blueprint(module.routes)
    app.register_error_handler(OhMyGPUError, _known_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unknown_error)
    rules = AccessRules(services.settings.server.host, services.settings.server.origins)
    inner: Asgi = app.asgi_app  # type: ignore[assignment]
    limited = BodyLimit(inner, services.settings.server.max_body_bytes)
    app.asgi_app = Front(Guard(limited, rules), services.state)  # type: ignore[method-assign,assignment]
    return app


class Front:
    """Outermost ASGI middleware: request ids, the access log, draining, and a clean end.

    Whatever a request opened (generators that hold an engine slot) is closed when it ends, however
    it ends: the exit stack in the scope is unwound here.
    """

    def __init__(self, app: Asgi, state: DaemonState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        REQUEST_ID.set(request_id)
        started, status = time.monotonic(), 0

        async def send_with_id(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        self._state.requests += 1
        try:
            if self._state.draining and scope["path"] not in _WHILE_DRAINING:
                error = Busy("the daemon is shutting down", retry_after_s=5)
                await send_error(send_with_id, scope["path"], error, [("connection", "close")])
                return
            async with contextlib.AsyncExitStack() as stack:
                scope[EXIT_STACK] = stack
                await self._app(scope, receive, send_with_id)
        finally:
            self._state.requests -= 1
            self._state.changed.set()
            _logger.log(
                logging.DEBUG if scope["path"] == "/health" else logging.INFO,
                "%s %s %s %.3f s",
                scope["method"],
                scope["path"],
                status or "gave up",
                time.monotonic() - started,
            )


async def _known_error(error: OhMyGPUError) -> Response:
    response = json_response(error_body(error, family_of(request.path)), status_of(error))
    for name, value in error_headers(error):
        response.headers[name] = value
    return response


async def _http_error(error: HTTPException) -> Response:
    """What Quart itself refuses: unknown paths and wrong methods."""
    status = error.code or 500
    if isinstance(error, MethodNotAllowed):
        message = f"{request.method} is not allowed here; use {' or '.join(_methods(error))}"
    elif status == 404:
        message = "this server has no such path; docs/http-api.md lists what it has"
    else:
        message = f"{error.name.lower()}: the request cannot be processed"
    response = await _known_error(HttpRefusal(message, status=status))
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(_methods(error))
    return response


def _methods(error: MethodNotAllowed) -> list[str]:
    return sorted(set(error.valid_methods or ()) - {"OPTIONS"})


async def _unknown_error(error: Exception) -> Response:
    if isinstance(error, RecursionError):
        return await _known_error(HttpRefusal("the request is nested too deeply", status=400))
    _logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return await _known_error(internal_error())
