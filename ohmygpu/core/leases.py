"""What running pulls need and no record names yet, so that gc leaves it alone.

A lease is a locked file in `models/partial/` that lists digests, compile keys and temporary names,
one a line. It counts while its process lives; of a dead one only the file remains, which the next
gc removes.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from .locks import FileLock, is_locked

SUFFIX = ".lease"


class Lease:
    """One running pull's list of what it uses."""

    def __init__(self, folder: Path) -> None:
        self._lock = FileLock(folder / f"{secrets.token_hex(8)}{SUFFIX}")
        self._names: set[str] = set()

    def start(self) -> None:
        """Create the list, empty."""
        self._lock.acquire()

    def add(self, *names: str) -> None:
        """Protect `names` from now on."""
        fresh = [name for name in names if name not in self._names]
        if fresh:
            self._lock.write("".join(f"{name}\n" for name in fresh).encode("utf-8"))
            self._names.update(fresh)

    def end(self) -> None:
        """Protect nothing any more."""
        self._lock.release()


def names_in_use(folder: Path) -> set[str]:
    """Everything that the leases of living processes list."""
    names: set[str] = set()
    for path in folder.glob(f"*{SUFFIX}"):
        if is_locked(path):
            # The last line may be half-written only if its writer is not past `add` yet, which
            # the store's lock rules out while gc runs.
            names.update(path.read_text(encoding="utf-8").splitlines())
    return names
