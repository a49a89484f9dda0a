"""Whether the store already has the bytes of a file that a provider offers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from .hashing import new_git_hash
from .provider import RemoteFile

if TYPE_CHECKING:
    from .repository import Repository

_MAX_SCANNED_BYTES = 64 << 20  # files known only by git's digest are small


def find_blob(repository: Repository, file: RemoteFile) -> str | None:
    """SHA-256 of `file` if its bytes are in the repository already.

    A file known only by git's digest is looked for among the blobs of its size.
    """
    if file.sha256 is not None:
        sha256 = file.sha256.lower()
        return sha256 if repository.has_blob(sha256, file.size) else None
    if not file.git_sha1 or file.size > _MAX_SCANNED_BYTES:
        return None
    for path in sorted(repository.blobs_dir.glob("sha256-*")):
        try:
            if path.stat().st_size != file.size:
                continue
            data = path.read_bytes()
        except OSError:
            continue  # gc may take it away under our eyes
        digest = new_git_hash(len(data))
        digest.update(data)
        if digest.hexdigest() == file.git_sha1.lower():
            sha256 = hashlib.sha256(data).hexdigest()
            if path.name == f"sha256-{sha256}" and repository.has_blob(sha256, file.size):
                return sha256
    return None
