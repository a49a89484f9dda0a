"""What the local hub can do wrong, and the record of what it was asked.

A fault is a dict, so that it can come from a test, the command line or a file:

    {"kind": "drop", "match": "/resolve/.*safetensors", "times": 3, "after": 100000}

`match` is a regular expression searched in "METHOD path" ("" = all), `times` how often it applies
(default: always), `skip` how many matching requests it lets pass first. Kinds:

    status         answer `status` (with `headers`)
    drop           close the connection after `after` bytes of the body
    stall          send `after` bytes of the body, then nothing until the server stops
    silence        accept the request and never answer
    slow           `bytes_per_s`
    corrupt        flip the bits of the byte at offset `at` of the file
    ignore_range   answer 200 with the whole file
    range_start    say and send a range that starts `by` bytes later
    range_total    say that the file has `by` more bytes
    length         say a Content-Length that is `by` bytes off
    endless        send the body and then bytes without end, without Content-Length
    gzip           compress the body, asked or not; with `bomb_bytes` a body that inflates to that
    etag           say another ETag, `value`
    redirect       302 to `location` ("" = to itself)
"""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

Fault = dict[str, Any]


class Faults:
    """The faults in force. Thread-safe."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, kind: str, match: str = "", **options: Any) -> None:
        with self._lock:
            self._faults.append({"kind": kind, "match": match, **options})

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, method: str, path: str) -> dict[str, Fault]:
        """The faults that apply to this request, by kind; each use is counted."""
        found: dict[str, Fault] = {}
        with self._lock:
            for fault in self._faults:
                if fault["kind"] in found or not re.search(fault["match"], f"{method} {path}"):
                    continue
                if fault.get("skip", 0) > 0:
                    fault["skip"] -= 1
                elif fault.get("times", 1) > 0:
                    if "times" in fault:
                        fault["times"] -= 1
                    found[fault["kind"]] = fault
        return found


class RequestLog:
    """Every request that was answered, as dicts, and as JSON lines in `path` if there is one.

    Reading waits for the requests that are being answered; those that a fault lets hang count as
    answered.
    """

    def __init__(self, path: Path | None) -> None:
        self._entries: list[dict[str, Any]] = []
        self._lock = threading.Condition()
        self._running = 0
        self._file = path.open("a", buffering=1) if path else None

    def begin(self) -> None:
        with self._lock:
            self._running += 1

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All of them so far."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._running == 0, timeout=30):
                raise TimeoutError("the hub is still answering a request")
            return list(self._entries)

    def add(self, entry: dict[str, Any]) -> None:
        with self._lock:
            self._running -= 1
            self._lock.notify_all()
            self._entries.append(entry)
            if self._file:
                self._file.write(json.dumps(entry) + "\n")

    def clear(self) -> None:
        """Forget all so far."""
        if self.entries:
            with self._lock:
                self._entries.clear()

    def close(self) -> None:
        """Close the file, after the last entry."""
        with self._lock:
            self._lock.wait_for(lambda: self._running == 0, timeout=5)
            if self._file:
                self._file.close()

    def of(self, match: str) -> list[dict[str, Any]]:
        """The requests whose "METHOD path" matches."""
        return [e for e in self.entries if re.search(match, f"{e['method']} {e['path']}")]


def bytes_asked_twice(entries: list[dict[str, Any]]) -> int:
    """Bytes of files that were asked for more than once, by the ranges of successful requests."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for entry in entries:
        if entry["method"] == "GET" and entry["status"] in (200, 206) and entry.get("file"):
            ranges.setdefault(entry["file"], []).append((entry["start"], entry["end"]))
    asked = sum(end - start for spans in ranges.values() for start, end in spans)
    return asked - sum(map(_covered, ranges.values()))


def _covered(spans: list[tuple[int, int]]) -> int:
    total = last = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, last))
        last = max(last, end)
    return total
