"""Reads the bytes of one file from its server into its `Partial`, unit by unit, persistently.

Each request asks for what one unit lacks. Whatever goes wrong on the way (broken, stalled, short,
endless or misplaced answers, expired addresses, busy servers) costs at most that request: what
arrived is kept and the rest is asked for again, a bounded number of times without progress.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx2

from .errors import AccessDenied, Cancelled, CorruptFile, NetworkError, NotFound, OhMyGPUError
from .http import (
    GuardedClient,
    origin_of,
    rate_limited,
    refuse_compressed,
    retry_after_s,
    show_origin,
)
from .partial import Partial

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\Z")
_ADDRESS_EXPIRED = (400, 401, 403, 404, 410)
_BUSY = (408, 425, 500, 502, 503, 504)

Explain = Callable[[httpx2.Response], OhMyGPUError | None]
"""The provider's own error for a refusal, or None when it has nothing to say about it."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on with a server that does not deliver."""

    attempts: int = 7  # in a row without progress, per unit
    first_wait_s: float = 0.5  # doubles with each
    max_wait_s: float = 15.0
    max_retry_after_s: float = 60.0  # a server that asks for more ends the download
    stall_s: float = 30.0  # without `stall_bytes` in this time a connection counts as stalled
    stall_bytes: int = 4096
    progress_bytes: int = 16384  # an attempt that brings fewer did not make progress


class _Retry(Exception):
    """This attempt failed, the next may not. `error` is what to say when none succeeds."""

    def __init__(self, error: OhMyGPUError, wait_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait_s = wait_s


class _Expired(Exception):
    """The address that the hub gave earlier no longer works; the hub gives a new one."""


class Transfer:
    """One file on its way. `fetch_unit` may run on many threads, each with a unit of its own."""

    def __init__(
        self,
        client: GuardedClient,
        partial: Partial,
        stop: threading.Event,
        patience: Patience,
        explain: Explain,
    ) -> None:
        self.file = partial.file
        self._client = client
        self._partial = partial
        self._stop = stop
        self._patience = patience
        self._explain = explain
        self._location: str | None = None  # where the redirects ended; often signed, and expiring
        self._locating = threading.Lock()
        self._whole = threading.Lock()  # held while one thread reads a server without ranges

    @property
    def is_sequential(self) -> bool:
        """Whether the server ignores ranges and one thread is reading the file from its start."""
        return self._whole.locked()

    def is_complete(self, unit: int) -> bool:
        """Whether `unit` lacks nothing."""
        start, end = self._partial.missing(unit)
        return start == end

    def fetch_unit(self, unit: int) -> None:
        """Get what `unit` lacks; returns early when another thread is getting the whole file.

        Raises NetworkError, RateLimited, AccessDenied, NotFound, CorruptFile, DiskFull, Cancelled.
        """
        failures = 0
        location = self._location
        while True:
            start, end = self._partial.missing(unit)
            if start == end:
                return
            gained = [0]
            try:
                self._attempt(location, start, end, gained)
                if self.is_sequential:
                    return
                failures, location = 0, self._location
            except _Expired:
                location = None
            except _Retry as problem:
                failures = 1 if gained[0] >= self._patience.progress_bytes else failures + 1
                if failures >= self._patience.attempts:
                    raise problem.error from problem
                self._pause(failures, problem.wait_s)
                location = None

    def _pause(self, failures: int, asked_s: float | None) -> None:
        patience = self._patience
        wait_s = min(patience.max_wait_s, patience.first_wait_s * 2 ** (failures - 1))
        wait_s *= random.uniform(0.75, 1.25)  # noqa: S311 - spreads retries, guards nothing
        if self._stop.wait(max(wait_s, asked_s or 0.0)):
            raise Cancelled("the download was stopped")

    def _attempt(self, location: str | None, start: int, end: int, gained: list[int]) -> None:
        """One request, to the hub unless `location` tells where it redirects.

        Asks for the bytes from `start` to `end` and counts new bytes into `gained[0]`.
        """
        try:
            response = self._send(location, start, end) if location else self._locate(start, end)
            try:
                if not self._receive(response, start, end, gained):
                    if location and response.status_code in _ADDRESS_EXPIRED:
                        raise _Expired
                    self._refused(response)
            finally:
                response.close()
        except httpx2.HTTPError as error:
            where = show_origin(location or self.file.url)
            reason = str(error) or type(error).__name__
            raise _Retry(
                NetworkError(f"{where} keeps failing to send {self.file.filename}: {reason}")
            ) from error
        except NetworkError as error:
            if error.details.get("transient"):
                raise _Retry(error) from error
            raise

    def _locate(self, start: int, end: int) -> httpx2.Response:
        """The hub's answer, wherever it redirects; remembers where that is.

        One thread at a time, so that the first of them finds the address for all.
        """
        before = self._location
        with self._locating:
            if self._location is not before and self._location is not None:
                return self._send(self._location, start, end)
            response = self._send(self.file.url, start, end)
            if response.is_success:
                self._location = str(response.request.url)
            return response

    def _send(self, url: str, start: int, end: int) -> httpx2.Response:
        headers = {}
        if start > 0 or end < self.file.size:
            headers["Range"] = f"bytes={start}-{end - 1}"
        if self._stop.is_set():
            raise Cancelled("the download was stopped")
        return self._client.send(
            self._client.build_request("GET", url, headers=headers), stream=True
        )

    def _receive(self, response: httpx2.Response, start: int, end: int, gained: list[int]) -> bool:
        """Store what the answer brings; False when it brings nothing but its status."""
        status = response.status_code
        if status == 206:
            self._check_range(response, start)
            self._store(response, start, end, gained)
        elif status == 200 and start == 0 and end == self.file.size:
            self._store(response, 0, end, gained)
        elif status == 200:  # the server ignores ranges: one thread reads it all from the start
            if self._whole.acquire(blocking=False):
                try:
                    self._store(response, 0, self.file.size, gained)
                finally:
                    self._whole.release()
        else:
            return False
        return True

    def _check_range(self, response: httpx2.Response, start: int) -> None:
        value = response.headers.get("content-range", "").strip()
        match = _CONTENT_RANGE.match(value)
        name = self.file.filename
        if match is None or int(match[1]) != start:
            raise _Retry(
                NetworkError(
                    f"{show_origin(self.file.url)} sends other bytes of {name} than asked "
                    f"({value[:60]!r} for byte {start}); try again later"
                )
            )
        if match[3] != "*" and int(match[3]) != self.file.size:
            raise _Retry(self._wrong_size(match[3]))

    def _wrong_size(self, size: str) -> CorruptFile:
        return CorruptFile(
            f"{self.file.filename} has {size} bytes at the server, but {self.file.size} are "
            "listed; try again later",
            filename=self.file.filename,
        )

    def _store(self, response: httpx2.Response, offset: int, end: int, gained: list[int]) -> None:
        """Write the body's bytes, which are to be those from `offset` to `end`."""
        refuse_compressed(response)
        has_length = "content-length" in response.headers
        patience = self._patience
        window_end, window_bytes = time.monotonic() + patience.stall_s, 0
        for piece in response.iter_raw():
            if self._stop.is_set():
                raise Cancelled("the download was stopped")
            if offset >= end:
                break  # more than was asked for; closing the connection is the answer
            gained[0] += self._partial.write(offset, piece[: end - offset])
            offset += len(piece)
            if offset >= end and not has_length:
                break
            window_bytes += len(piece)
            if time.monotonic() > window_end:
                if window_bytes < patience.stall_bytes:
                    raise _Retry(
                        NetworkError(
                            f"{show_origin(self.file.url)} sends {self.file.filename} too slowly "
                            f"(less than {patience.stall_bytes} bytes in {patience.stall_s:.0f} s)"
                        )
                    )
                window_end, window_bytes = time.monotonic() + patience.stall_s, 0
        if offset < end:
            raise _Retry(
                NetworkError(
                    f"{show_origin(self.file.url)} keeps ending {self.file.filename} too early "
                    f"(at byte {offset} of {self.file.size}); try again later"
                )
            )

    def _refused(self, response: httpx2.Response) -> None:
        """Raise what an answer without content means."""
        status, url = response.status_code, str(response.request.url)
        name, where = self.file.filename, show_origin(url)
        if status in _ADDRESS_EXPIRED and origin_of(url) != origin_of(self.file.url):
            # Not the hub's own refusal: the content network may not know the address yet.
            raise _Retry(AccessDenied(f"{where} refuses to send {name} (error {status})"))
        if status == 416:
            raise _Retry(self._wrong_size(_total_of_416(response)))
        if status == 429 or status in _BUSY:
            wait_s = retry_after_s(response.headers)
            error: OhMyGPUError = NetworkError(
                f"{where} keeps answering with error {status} for {name}; try again later"
            )
            if status == 429:
                error = rate_limited(url, response.headers)
            if wait_s is not None and wait_s > self._patience.max_retry_after_s:
                raise error
            raise _Retry(error, wait_s)
        explained = self._explain(response)
        if explained is not None:
            raise explained
        if status in (401, 403):
            raise AccessDenied(f"{where} refuses to send {name} (error {status})")
        if status in (404, 410):
            raise NotFound(f"{where} no longer has {name}; try again")
        raise NetworkError(f"{where} answers with error {status} for {name}; try again later")


def _total_of_416(response: httpx2.Response) -> str:
    match = re.match(r"bytes \*/(\d{1,18})\Z", response.headers.get("content-range", "").strip())
    return match[1] if match else "fewer"
