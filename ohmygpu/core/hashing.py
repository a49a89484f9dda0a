"""SHA-256 of large files, with progress and a way to stop."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from .errors import Cancelled

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
