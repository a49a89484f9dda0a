"""Digests: of large files, with progress and a way to stop; of git's blobs; as text."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from .errors import Cancelled

_HEX_DIGITS = frozenset("0123456789abcdef")

_CHUNK_BYTES = 4 * 1024 * 1024


def sha256_of(
    path: Path, progress: Callable[[int], None], cancel: threading.Event | None = None
) -> str:
    """Digest of a file, 64 hex digits; `progress` gets the size of each piece. Cancelled."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled")
    return digest.hexdigest()


def new_git_hash(size: int) -> hashlib._Hash:
    """git's digest of a file of `size` bytes (SHA-1), to be updated with its content."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # git's object header


def as_hex(value: object, length: int) -> str | None:
    """`value` in lower case when it is a text of `length` hex digits, else None."""
    text = value.lower() if isinstance(value, str) else ""
    return text if len(text) == length and _HEX_DIGITS.issuperset(text) else None
