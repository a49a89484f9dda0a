"""Writing files so that they are whole after a crash, and copying large ones cheaply."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import Cancelled, ConfigError, DiskFull
from .sizes import human_bytes

TEMPORARY = ".tmp-"
_FICLONE = 0x40049409  # ioctl request of linux/fs.h
_CHUNK_BYTES = 4 * 1024 * 1024
_MAKE_ROOM = "remove a model (omg model rm), run omg model gc, or set OHMYGPU_HOME to a larger disk"


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data` at once: after a crash it has the old content or the new."""
    temporary = path.with_name(f".{path.name[:64]}{TEMPORARY}{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Make every file and name below `folder` durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def clone(source: Path, target: Path, cancel: threading.Event | None = None) -> str:
    """Make `target` (new) hold the bytes of `source`; returns how: reflink, link or copy.

    A reflink shares the disk's blocks until one side changes; a hard link is the same file under
    a second name; where the file system has neither the bytes are copied. Raises Cancelled.
    """
    how = share(source, target)
    if how is not None:
        return how
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled")
    return "copy"


def share(source: Path, target: Path) -> str | None:
    """Make `target` (new) the bytes of `source` without copying them: reflink, link or, where the
    file system has neither, None.
    """
    if _reflink(source, target):
        return "reflink"
    try:
        os.link(source.resolve(), target)
    except OSError:
        return None  # another file system, or one without hard links, or not our file
    return "link"


def _reflink(source: Path, target: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            cloned = False
        else:
            cloned = True
    if not cloned:
        target.unlink()
    return cloned


def used_bytes(path: Path) -> int:
    """Bytes that removing `path` (a file or a tree) gives back; 0 for files with other names."""
    paths = [path] if not path.is_dir() or path.is_symlink() else list(path.rglob("*"))
    total = 0
    for entry in paths:
        with contextlib.suppress(FileNotFoundError):
            info = entry.lstat()
            if entry.is_symlink() or not entry.is_dir():
                total += info.st_size if info.st_nlink <= 1 else 0
    return total


def remove_tree(folder: Path, trash: Path) -> int:
    """Remove `folder`, first renaming it to `trash` so that it is never half there; bytes freed."""
    folder.rename(trash)
    freed = used_bytes(trash)
    shutil.rmtree(trash)
    return freed


def allocated_bytes(path: Path) -> int:
    """Bytes that a file, perhaps sparse, takes on the disk; 0 when it is not there."""
    try:
        return path.stat().st_blocks * 512  # the unit of st_blocks, whatever the file system's
    except OSError:
        return 0


def shares_disk(path: str, folder: Path) -> bool:
    """Whether `path` is on the file system of `folder`, so that it can be linked there."""
    try:
        return Path(path).stat().st_dev == folder.stat().st_dev
    except (OSError, ValueError):
        return False


def free_bytes(folder: Path) -> int:
    """Bytes an ordinary user may still write where `folder` is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskFull, with both numbers, unless `needed_bytes` can be written in `folder`."""
    free = free_bytes(folder)
    if needed_bytes > free:
        raise disk_full(what, needed_bytes, free)


def disk_full(what: str, needed_bytes: int, free: int) -> DiskFull:
    """The error for `what` (a noun phrase) needing more space than there is."""
    return DiskFull(
        f"{what} needs {human_bytes(needed_bytes)} of disk space and {human_bytes(free)} are free; "
        f"{_MAKE_ROOM}",
        needed_bytes=needed_bytes,
        free_bytes=free,
    )


@contextmanager
def writing(home: Path, what: str) -> Iterator[None]:
    """Turn a full disk or an unwritable store into the error that says so."""
    try:
        yield
    except OSError as error:
        raised = explain(error, home, what)
        if raised is None:
            raise
        raise raised from error


def explain(error: OSError, home: Path, what: str) -> DiskFull | ConfigError | None:
    """The user's error for what the system said while writing below `home`; None for others."""
    if error.errno == errno.EFBIG:
        return DiskFull(
            f"cannot write {what}: a file of it is larger than the system allows; raise the limit "
            "(ulimit -f), or set OHMYGPU_HOME to a file system for large files"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(home)
        return DiskFull(
            f"cannot write {what}: {os.strerror(error.errno)} ({human_bytes(free)} are free); "
            f"{_MAKE_ROOM}",
            free_bytes=free,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(
            f"cannot write to {home}: {os.strerror(error.errno or 0)}; change its permissions or "
            "set OHMYGPU_HOME to a folder you can write",
            key="home",
            value=str(home),
            origin="file system",
        )
    return None
