"""An HTTP client that treats every server as a stranger.

Credentials go to one origin only and are dropped at every hop to another one; each redirect is
checked (http and https only, never from https to http, never from a public host into the local
network, a bounded number); replies are read whole only up to a limit of bytes and of time, and
compressed replies, which were not asked for, are refused. This module knows nothing of models.
"""

from __future__ import annotations

import email.utils
import functools
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2

from .errors import ConfigError, NetworkError, OhMyGPUError, RateLimited

MAX_REDIRECTS = 10
MAX_REPLY_BYTES = 32 << 20  # a metadata reply; the largest known file lists are a few MiB
REPLY_DEADLINE_S = 60.0
_DEFAULT_PORTS = {"http": 80, "https": 443}
_RATE_LIMIT_RESET = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,6})")

T = TypeVar("T")


def origin_of(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of `url`, lower case, with the scheme's own port filled in."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise NetworkError(f"{url[:200]!r} is not a URL: {error}") from error
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), port or _DEFAULT_PORTS.get(scheme, 0)


def show_origin(url: str) -> str:
    """`url`'s scheme and host for a message: no path, no user name, no signature."""
    scheme, host, port = origin_of(url)
    return f"{scheme}://{host}" + ("" if port == _DEFAULT_PORTS.get(scheme) else f":{port}")


def check_hop(source: str, target: str) -> None:
    """Raise NetworkError unless going from `source` to `target` is safe."""
    (from_scheme, from_host, _), (to_scheme, to_host, _) = origin_of(source), origin_of(target)
    if to_scheme not in _DEFAULT_PORTS or not to_host:
        raise NetworkError(
            f"{show_origin(source)} points to a {to_scheme or 'nameless'}: address; refused"
        )
    if from_scheme == "https" and to_scheme == "http":
        raise NetworkError(
            f"{show_origin(source)} points to the unencrypted {show_origin(target)}; refused"
        )
    minute = int(time.monotonic() // 60)
    if from_host != to_host and _depth(to_host, minute) > _depth(from_host, minute):
        raise NetworkError(
            f"{show_origin(source)} points into the local network ({to_host}); refused"
        )


@functools.lru_cache(maxsize=256)
def _depth(host: str, minute: int) -> int:
    """How far inside a host lies: 0 public, 1 private network, 2 this machine, 3 link-local.

    `minute` lets an answer be remembered for that long.
    """
    try:
        addresses = {ipaddress.ip_address(host)}
    except ValueError:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return 0  # behind a proxy names need not resolve here; the request itself will tell
        addresses = {ipaddress.ip_address(str(info[4][0]).split("%")[0]) for info in found}
    return max(map(_address_depth, addresses), default=0)


def _address_depth(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        address = mapped
    if address.is_link_local:
        return 3
    if address.is_loopback or address.is_unspecified:
        return 2
    return 0 if address.is_global else 1


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds a reply asks to wait (`Retry-After` in either form, or `RateLimit`), or None."""
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value[:9])
    if value:
        try:
            then = email.utils.parsedate_to_datetime(value).timestamp()
        except (TypeError, ValueError):
            return None
        return max(0.0, then - time.time())
    reset = _RATE_LIMIT_RESET.search(headers.get("ratelimit", ""))
    return float(reset.group(1)) if reset else None


def rate_limited(url: str, headers: Mapping[str, str]) -> RateLimited:
    """The error for a 429 reply."""
    wait_s = retry_after_s(headers)
    when = f"in {wait_s:.0f} seconds" if wait_s is not None else "in a few minutes"
    facts: dict[str, Any] = {} if wait_s is None else {"retry_after_s": wait_s}
    return RateLimited(
        f"{show_origin(url)} limits how often it can be asked: try again {when} "
        "(what is already downloaded is kept)",
        **facts,
    )


def unreachable(error: httpx2.HTTPError, url: str) -> NetworkError:
    """The error for a request without a usable answer; `details["transient"]`: worth a retry."""
    where = show_origin(url)
    if isinstance(error, httpx2.ConnectTimeout):
        return NetworkError(f"{where} does not answer; check the network", transient=True)
    if isinstance(error, httpx2.TimeoutException):
        return NetworkError(f"{where} stopped answering; try again", transient=True)
    if isinstance(error, httpx2.ConnectError):
        return NetworkError(
            f"cannot reach {where} ({error}); check the network and the address", transient=True
        )
    if isinstance(error, httpx2.UnsupportedProtocol):
        return NetworkError(f"{where} is not an http or https address", transient=False)
    reason = str(error) or type(error).__name__
    return NetworkError(f"the connection to {where} broke ({reason}); try again", transient=True)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """The system's trusted certificates; reading them takes a tenth of a second, so once."""
    try:
        return httpx2.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the trusted certificates cannot be read ({error}); check SSL_CERT_FILE and "
            "SSL_CERT_DIR",
            key="SSL_CERT_FILE",
        ) from error


class GuardedClient(httpx2.Client):
    """An httpx2 client bound to one endpoint whose credentials never leave that origin."""

    def __init__(
        self,
        endpoint: str,
        authorization: str | None = None,
        *,
        connections: int = 8,
        read_timeout_s: float = 30.0,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        check_hop(endpoint, endpoint)
        self._endpoint = endpoint
        self._authorization = authorization
        self._max_reply_bytes = max_reply_bytes
        super().__init__(
            verify=_tls_context(),
            headers={"User-Agent": "ohmygpu", "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(read_timeout_s, connect=10.0, pool=None),
            limits=httpx2.Limits(max_connections=connections + 2, keepalive_expiry=30.0),
            event_hooks={"request": [self._before]},
        )

    def _before(self, request: httpx2.Request) -> None:
        url = str(request.url)
        check_hop(self._endpoint, url)
        request.headers["Accept-Encoding"] = "identity"
        request.headers.pop("Authorization", None)
        if self._authorization and origin_of(url) == origin_of(self._endpoint):
            request.headers["Authorization"] = self._authorization

    def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        follow_redirects: Any = True,
        **options: Any,
    ) -> httpx2.Response:
        """The response. Without `stream` it is read whole, within the limits.

        Raises NetworkError when there is no usable answer and, without `stream`, also for a
        status of 5xx, and RateLimited for 429; all other statuses are the caller's.
        """
        try:
            response = self._send(request, follow_redirects is not False, options)
            if stream:
                return response
            try:
                return self._read_whole(response)
            finally:
                response.close()
        except httpx2.HTTPError as error:
            raise unreachable(error, str(request.url)) from error

    def _send(
        self, request: httpx2.Request, follow_redirects: bool, options: dict[str, Any]
    ) -> httpx2.Response:
        """The open response at the end of the redirects, none of whose bodies is trusted."""
        for _ in range(MAX_REDIRECTS + 1):
            response = super().send(request, stream=True, follow_redirects=False, **options)
            if not (follow_redirects and response.has_redirect_location):
                return response
            here, location = str(request.url), response.headers["location"]
            _drain(response)
            check_hop(here, urljoin(here, location))
            if response.next_request is None:
                raise NetworkError(f"{show_origin(here)} redirects to an invalid address; refused")
            request = response.next_request
        raise NetworkError(f"{show_origin(str(request.url))} redirects in a loop; refused")

    def _read_whole(self, response: httpx2.Response) -> httpx2.Response:
        url = str(response.request.url)
        if response.status_code == 429:
            raise rate_limited(url, response.headers)
        if response.status_code >= 500:
            raise NetworkError(
                f"{show_origin(url)} answers with error {response.status_code}; try again later",
                transient=True,
                status=response.status_code,
            )
        refuse_compressed(response)
        body = bytearray()
        deadline = time.monotonic() + REPLY_DEADLINE_S
        for piece in response.iter_raw():
            body += piece
            if len(body) > self._max_reply_bytes:
                raise NetworkError(
                    f"{show_origin(url)} sends more than {self._max_reply_bytes} bytes where a "
                    "short reply is expected; refused"
                )
            if time.monotonic() > deadline:
                raise NetworkError(f"{show_origin(url)} answers too slowly; try again later")
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            content=bytes(body),
            request=response.request,
            history=response.history,
        )


def _drain(response: httpx2.Response) -> None:
    """Close `response`, reading what little a redirect's body has so that the connection lives."""
    try:
        for size, piece in enumerate(response.iter_raw(), start=1):
            if size > 8 or len(piece) > 1 << 16:
                break
    finally:
        response.close()


def refuse_compressed(response: httpx2.Response) -> None:
    """Raise NetworkError for a compressed body: none was asked for, and it could hide any size."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise NetworkError(
            f"{show_origin(str(response.request.url))} sends {encoding[:20]!r}-compressed data "
            "that was not asked for; refused",
            transient=True,
        )


def with_retries(call: Callable[[], T], *, attempts: int = 2, first_wait_s: float = 0.5) -> T:
    """What `call` returns, trying again after transient network errors, briefly and boundedly."""
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except RateLimited as error:
            wait_s = error.retry_after_s
            if attempt == attempts or wait_s is None or wait_s > 5:
                raise
            time.sleep(wait_s)
        except OhMyGPUError as error:
            if attempt == attempts or not error.details.get("transient"):
                raise
            time.sleep(first_wait_s * 2 ** (attempt - 1))
    raise NetworkError("no attempt was allowed")
