"""A file that is being downloaded, in a form that survives a kill at any instant.

In `models/partial/`, `<key>` being the file's digest:

    <key>.part   the bytes, at their final offsets; sparse where nothing has arrived yet
    <key>.map    per unit of UNIT_BYTES a little-endian 64-bit count of the bytes that are there
    <key>.json   what the file is: size, digests, unit; written last, so that it vouches for both
    <key>.lock   held by whoever downloads the file, while it lives

Bytes are written before they are counted, so after a kill the counts never exceed what is there.
Against a loss of power nothing is promised here: the digest over the whole file decides, always.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from pathlib import Path
from typing import Any, BinaryIO

from .errors import Cancelled, OhMyGPUError
from .files import explain
from .locks import FileLock
from .provider import RemoteFile

UNIT_BYTES = 4 << 20
"""What one request asks for at most, hence the most that one connection can lose to a kill."""


class Partial:
    """One file's bytes so far. Thread-safe; opened with `try_open`, closed by its opener."""

    def __init__(self, folder: Path, file: RemoteFile, lock: FileLock) -> None:
        self.file = file
        self.path = folder / f"{file.digest}.part"
        self._map_path = folder / f"{file.digest}.map"
        self._json_path = folder / f"{file.digest}.json"
        self._file_lock = lock
        self._mutex = threading.Lock()
        self._closed = False
        self._counts = [0] * unit_count(file.size)
        self._data, self._map = self._open()

    @staticmethod
    def try_open(folder: Path, file: RemoteFile) -> Partial | None:
        """The partial of `file`, or None while another process or thread has it."""
        lock = FileLock(folder / f"{file.digest}.lock")
        try:
            if not lock.try_acquire():
                return None
            return Partial(folder, file, lock)
        except BaseException as error:
            lock.release()
            if isinstance(error, OSError):
                raise storage_error(error, folder, file.filename) from error
            raise

    @property
    def done_bytes(self) -> int:
        """Bytes that are there."""
        return sum(self._counts)

    @property
    def ready_bytes(self) -> int:
        """Bytes from the start without a gap."""
        ready = 0
        for unit, count in enumerate(self._counts):
            ready += count
            if count < self._unit_size(unit):
                break
        return ready

    def missing(self, unit: int) -> tuple[int, int]:
        """(start, end) of the bytes that `unit` still lacks, as offsets in the file."""
        start = unit * UNIT_BYTES
        return start + self._counts[unit], start + self._unit_size(unit)

    def write(self, offset: int, data: bytes) -> int:
        """Store `data` and return how many of its bytes were missing.

        `data` must start at or before the first byte that its unit lacks. Bytes that are already
        there stay as they are, since they may have been hashed. Raises DiskFull, Cancelled after
        `close`.
        """
        gained = 0
        view = memoryview(data)
        with self._mutex:
            if self._closed:
                raise Cancelled("the download was stopped")
            try:
                while view:
                    unit = offset // UNIT_BYTES
                    piece = view[: (unit + 1) * UNIT_BYTES - offset]
                    gained += self._append(unit, offset - unit * UNIT_BYTES, piece)
                    offset += len(piece)
                    view = view[len(piece) :]
            except OSError as error:
                raise storage_error(error, self.path.parent, self.file.filename) from error
        return gained

    def _append(self, unit: int, offset: int, data: memoryview) -> int:
        """Store what `data`, at `offset` in `unit`, adds to the unit's `count` bytes."""
        count = self._counts[unit]
        if offset > count:
            raise ValueError(f"a gap before byte {offset} of unit {unit}")
        new = data[count - offset :]
        if len(new) > 0:
            _write_at(self._data, unit * UNIT_BYTES + count, new)
            _write_at(self._map, 8 * unit, struct.pack("<q", count + len(new)))
            self._counts[unit] = count + len(new)
        return len(new)

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`."""
        with self._mutex:
            self._data.seek(offset)
            return self._data.read(size)

    def reset(self) -> None:
        """Forget every byte."""
        with self._mutex:
            self._data.truncate(0)
            self._data.truncate(self.file.size)
            self._counts = [0] * len(self._counts)
            _write_at(self._map, 0, bytes(8 * len(self._counts)))

    def sync(self) -> None:
        """Put the bytes on the disk itself. Raises DiskFull where the disk only now notices."""
        try:
            os.fsync(self._data.fileno())
        except OSError as error:
            raise storage_error(error, self.path.parent, self.file.filename) from error

    def close(self) -> None:
        """Let go of the file and keep what is there. Later writes raise Cancelled."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._data.close()
            self._map.close()
        self._file_lock.release()

    def discard(self) -> None:
        """Close and remove everything, the bytes too unless they were moved away."""
        for path in (self._json_path, self._map_path, self.path):
            path.unlink(missing_ok=True)
        self.close()

    def _unit_size(self, unit: int) -> int:
        return min(UNIT_BYTES, self.file.size - unit * UNIT_BYTES)

    def _identity(self) -> dict[str, Any]:
        file = self.file
        return {
            "filename": file.filename,
            "size": file.size,
            "sha256": file.sha256,
            "git_sha1": file.git_sha1,
            "unit_bytes": UNIT_BYTES,
        }

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        """The data and the map, continued when they fit the file and fresh otherwise."""
        counts = self._read_counts()
        if counts is None:
            self._json_path.unlink(missing_ok=True)
            with self._map_path.open("wb") as fresh:
                fresh.write(bytes(8 * len(self._counts)))
            with self.path.open("wb") as fresh:
                fresh.truncate(self.file.size)
            temporary = self._json_path.with_suffix(".json.tmp")
            temporary.write_text(json.dumps(self._identity()), encoding="utf-8")
            temporary.replace(self._json_path)
        else:
            self._counts = counts
        data = self.path.open("r+b", buffering=0)
        try:
            return data, self._map_path.open("r+b", buffering=0)
        except BaseException:
            data.close()
            raise

    def _read_counts(self) -> list[int] | None:
        """What an earlier try left, or None when it does not fit this file."""
        try:
            identity = json.loads(self._json_path.read_bytes())
            raw = self._map_path.read_bytes()
            size = self.path.stat().st_size
        except (OSError, ValueError):
            return None
        expected = self._identity()
        if not isinstance(identity, dict) or size != self.file.size:
            return None
        if any(identity.get(key) != expected[key] for key in expected if key != "filename"):
            return None
        if len(raw) != 8 * len(self._counts):
            return None
        counts = list(struct.unpack(f"<{len(self._counts)}q", raw))
        if all(0 <= count <= self._unit_size(unit) for unit, count in enumerate(counts)):
            return counts
        return None


def unit_count(size: int) -> int:
    """Number of units of a file of `size` bytes."""
    return -(-size // UNIT_BYTES)


def done_bytes_elsewhere(folder: Path, file: RemoteFile) -> int:
    """Bytes that another process has got of `file` so far, for progress; 0 when unknown."""
    with contextlib.suppress(OSError):
        raw = (folder / f"{file.digest}.map").read_bytes()
        if len(raw) == 8 * unit_count(file.size):
            counts: tuple[int, ...] = struct.unpack(f"<{len(raw) // 8}q", raw)
            return min(file.size, max(0, sum(counts)))
    return 0


def storage_error(error: OSError, folder: Path, name: str) -> OhMyGPUError:
    """The error for a failed write of `name` in `folder`; what is already there stays."""
    return explain(error, folder, name) or OhMyGPUError(
        f"cannot store {name}: {error.strerror or error}; check the disk and the models folder"
    )


def _write_at(file: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    file.seek(offset)
    while view:
        written = file.write(view)
        view = view[written:]
