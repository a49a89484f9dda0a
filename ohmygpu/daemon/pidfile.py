"""One daemon per home folder: `daemon.pid`, locked for as long as the process lives."""

from __future__ import annotations

import os
from pathlib import Path

from ohmygpu.core.errors import DaemonAlreadyRunning
from ohmygpu.core.locks import FileLock


class PidFile:
    """The daemon's claim on its home folder.

    The lock, not the number in the file, says whether a daemon lives: the kernel drops the lock
    with the process, so a file left by a killed daemon never blocks the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path)

    def acquire(self) -> None:
        """Claim the folder and write our pid. Raises DaemonAlreadyRunning with the owner's pid."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._lock.try_acquire():
            pid = read_pid(self.path)
            raise DaemonAlreadyRunning(
                f"another daemon (pid {pid or 'unknown'}) serves {self.path.parent}; "
                "stop it with `omg serve stop`, or set OHMYGPU_HOME to use another folder",
                pid=pid,
            )
        self.path.write_text(f"{os.getpid()}\n", encoding="ascii")

    def release(self) -> None:
        """Remove the file and give up the claim; idempotent."""
        self._lock.release()


def read_pid(path: Path) -> int | None:
    """The process id in a PID file; None when there is none to read."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
