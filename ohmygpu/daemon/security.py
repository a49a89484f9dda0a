"""Who may call: Host and Origin rules, and CORS for the origins allowed.

Two attacks reach a server that listens on loopback only. *DNS rebinding*: a web page's own name is
made to resolve to 127.0.0.1, so the browser takes our answers for the page's own; the Host header
still carries that name, so unknown names are refused. *Cross-site requests*: a page posts to
127.0.0.1 blindly (text/plain needs no preflight); the browser adds an Origin it cannot forge, so
origins that are not local or configured are refused, whatever the method or the body's type.

The lists of names and origins are Ollama's, so what works with it works here.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from .errors import Headers, HttpRefusal, send_error

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
_LOCAL_ORIGIN_HOSTS = {"localhost", "127.0.0.1", "0.0.0.0", "::1"}  # noqa: S104 (a name, no bind)
_APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
_ALLOWED_HEADERS = (
    "authorization, content-type, accept, user-agent, x-requested-with, openai-beta, "
    "openai-organization, openai-project, x-api-key, x-request-id, idempotency-key, "
    "x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, "
    "x-stainless-helper-method, x-stainless-lang, x-stainless-os, x-stainless-package-version, "
    "x-stainless-poll-helper, x-stainless-raw-response, x-stainless-read-timeout, "
    "x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout"
)
_ALLOWED_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_EXPOSED_HEADERS = "x-request-id, retry-after"
_MAX_HEADER_CHARACTERS = 512


def is_loopback(host: str) -> bool:
    """Whether listening on `host` is reachable from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str | None:
    """The host of a Host header in lower case, without port; None when it is not one."""
    if len(header) > _MAX_HEADER_CHARACTERS or any(c in header for c in " /?#@\\\t"):
        return None
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018 (raises when the port is not a number in range)
        name = parts.hostname
    except ValueError:
        return None
    return name.removesuffix(".") if name else None


class AccessRules:
    """The names this server answers to and the web origins that may call it.

    `origins` are further allowed origins, with `*` as a wildcard; their hosts are also accepted as
    Host. Listening on loopback, private and loopback addresses are accepted as Host; listening
    beyond it, any address is: an address cannot be rebound.
    """

    def __init__(self, bind_host: str, origins: Iterable[str] = ()) -> None:
        self._loopback = is_loopback(bind_host)
        self._origins = tuple(origin.strip().lower() for origin in origins)
        self._names = {"localhost", socket.gethostname().lower(), bind_host.strip("[]").lower()}
        for origin in self._origins:
            host = urlsplit(origin).hostname if "://" in origin else None
            if host and "*" not in host:
                self._names.add(host)

    def host_allowed(self, header: str) -> bool:
        """Whether a request with this Host header may be answered."""
        name = host_name(header)
        if name is None:
            return False
        if name in self._names or name.endswith(_LOCAL_SUFFIXES):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        local = address.is_loopback or address.is_private or address.is_unspecified
        return local or not self._loopback

    def origin_allowed(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` may call us, having addressed us as `host`."""
        origin = origin.strip().lower()
        if len(origin) > _MAX_HEADER_CHARACTERS:
            return False
        scheme, separator, rest = origin.partition("://")
        if not separator:
            return "null" in self._origins and origin == "null"
        if scheme in _APP_SCHEMES:
            return True
        if scheme in {"http", "https"}:
            if rest == host.lower():
                return True  # our own page
            name = host_name(rest)
            if name in _LOCAL_ORIGIN_HOSTS:
                return True
        return any(fnmatch.fnmatchcase(origin, pattern) for pattern in self._origins)


class Guard:
    """ASGI middleware: refuses foreign hosts and origins with 403, answers OPTIONS, adds CORS.

    Requests over the Unix socket are exempt from the Host rule: no browser reaches one.
    """

    def __init__(self, app: Asgi, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # we have no such endpoint
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host, origin = header(scope, b"host"), header(scope, b"origin")
        refusal = self._refusal(scope, host, origin)
        if refusal is not None:
            await send_error(send, scope["path"], refusal, [("connection", "close")])
            return
        extra = _cors_headers(origin)
        if scope["method"] == "OPTIONS":
            await _preflight(scope, send, extra)
            return

        async def send_with_cors(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_encoded(extra)]
            await send(message)

        await self._app(scope, receive, send_with_cors if extra else send)

    def _refusal(self, scope: Scope, host: str | None, origin: str | None) -> HttpRefusal | None:
        over_unix_socket = scope.get("client") is None and scope.get("server") is None
        # Only HTTP/1.0 can lack a Host (the server refuses it elsewhere), and no browser speaks it.
        if host is not None and not over_unix_socket and not self._rules.host_allowed(host):
            return HttpRefusal(
                "this server does not answer to the name in the Host header; use 127.0.0.1 or "
                "localhost, or add the name's origin to server.origins",
                status=403,
            )
        if origin is not None and not self._rules.origin_allowed(origin, host or ""):
            return HttpRefusal(
                "requests from this web origin are not allowed; add the origin to server.origins "
                "to allow them",
                status=403,
            )
        return None


def header(scope: Scope, name: bytes) -> str | None:
    """A request header's value; None without it, and repeated ones joined, so that none hides."""
    values = [value for key, value in scope["headers"] if key.lower() == name]
    return b",".join(values).decode("latin-1") if values else None


def _cors_headers(origin: str | None) -> Headers:
    if origin is None:
        return []
    return [
        ("access-control-allow-origin", origin),
        ("access-control-expose-headers", _EXPOSED_HEADERS),
        ("vary", "Origin"),
    ]


async def _preflight(scope: Scope, send: Send, headers: Headers) -> None:
    if headers:
        headers = [
            *headers,
            ("access-control-allow-methods", _ALLOWED_METHODS),
            ("access-control-allow-headers", _ALLOWED_HEADERS),
            ("access-control-max-age", "43200"),
        ]
        if header(scope, b"access-control-request-private-network") == "true":
            headers.append(("access-control-allow-private-network", "true"))
    headers = [*headers, ("allow", _ALLOWED_METHODS)]
    await send({"type": "http.response.start", "status": 204, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _encoded(headers: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
