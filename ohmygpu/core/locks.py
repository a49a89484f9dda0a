"""Locks between processes: flock on files, so a lock dies with the process that holds it.

A lock file is removed by its holder as the last thing before it lets go. Whoever waited for that
file then holds a lock on a file without a name, notices, and starts over: files never pile up and
two holders never meet. After a kill the file stays, unlocked, for the next holder or for gc.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import Cancelled, Conflict

_POLL_S = 0.05  # flock has no wait that a cancel could interrupt


class FileLock:
    """A lock on `path`, exclusive unless `shared`; freed by `release` or the process's end.

    `keep` leaves the file in place on release (for a lock that is taken all the time).
    """

    def __init__(self, path: Path, *, shared: bool = False, keep: bool = False) -> None:
        self.path = path
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._keep = keep
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Raises OSError where the file cannot be created."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, self._operation | fcntl.LOCK_NB)
                is_current = _is_file(fd, self.path)
            except OSError as error:
                os.close(fd)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                raise
            if is_current:
                self._fd = fd
                return True
            os.close(fd)  # its last holder removed the file between our open and our lock

    def acquire(
        self,
        *,
        on_wait: Callable[[], None] | None = None,
        cancel: threading.Event | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Take the lock, waiting for it; `on_wait` is called once if there is a wait.

        Raises Cancelled when `cancel` is set meanwhile, Conflict after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waited = False
        while not self.try_acquire():
            if on_wait is not None and not waited:
                on_wait()
            waited = True
            if deadline is not None and time.monotonic() >= deadline:
                raise Conflict("another process is changing the model store; try again in a moment")
            if cancel is None:
                time.sleep(_POLL_S)
            elif cancel.wait(_POLL_S):
                raise Cancelled("cancelled while waiting for another process")

    def write(self, data: bytes) -> None:
        """Append `data` to the lock file; only while the lock is held."""
        if self._fd is None:
            raise ValueError("the lock is not held")
        os.lseek(self._fd, 0, os.SEEK_END)
        os.write(self._fd, data)

    def release(self) -> None:
        """Let go; does nothing when the lock is not held."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            if not self._keep:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(fd)

    def __enter__(self) -> FileLock:
        if self._fd is None:
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock on `path`; False when there is no such file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    finally:
        os.close(fd)
    return False


@contextmanager
def locked(path: Path, *, shared: bool = False, keep: bool = False) -> Iterator[FileLock]:
    """Hold a lock on `path` for a `with` block, waiting for it as long as it takes."""
    with FileLock(path, shared=shared, keep=keep) as lock:
        yield lock


def _is_file(fd: int, path: Path) -> bool:
    """Whether the open file `fd` is still the one that `path` names."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (opened.st_ino, opened.st_dev) == (named.st_ino, named.st_dev)
