from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ohmygpu.core.errors import Cancelled, Conflict
from ohmygpu.core.locks import FileLock, is_locked, locked

HOLDER = """
import pathlib, sys
from ohmygpu.core.locks import FileLock
FileLock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_excludes_every_other_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    first, second = FileLock(path), FileLock(path)
    assert first.try_acquire()
    assert first.held
    assert not second.try_acquire()
    assert is_locked(path)
    first.release()
    first.release()
    assert not path.exists()
    assert not is_locked(path)
    assert second.try_acquire()
    second.release()


def test_shared_locks_exclude_only_the_exclusive_one(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with locked(path, shared=True, keep=True), locked(path, shared=True, keep=True):
        assert not FileLock(path).try_acquire()
    assert path.exists()
    with locked(path, keep=True):
        assert not FileLock(path, shared=True).try_acquire()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(path)
        assert not FileLock(path).try_acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert path.exists(), "a kill leaves the file"
    assert not is_locked(path)
    lock = FileLock(path)
    assert lock.try_acquire()
    lock.release()


def test_waiting_is_announced_once_and_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    cancel = threading.Event()
    waits: list[int] = []

    def on_wait() -> None:
        waits.append(1)
        cancel.set()

    with locked(path), pytest.raises(Cancelled):
        FileLock(path).acquire(on_wait=on_wait, cancel=cancel)
    assert waits == [1]


def test_waiting_ends_at_its_timeout(tmp_path: Path) -> None:
    with locked(tmp_path / "x"), pytest.raises(Conflict):
        FileLock(tmp_path / "x").acquire(timeout_s=0.0)


def test_many_threads_never_hold_it_together(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    inside: list[int] = []
    most: list[int] = []
    guard = threading.Lock()

    def work() -> None:
        for _ in range(20):
            with locked(path):
                with guard:
                    inside.append(1)
                    most.append(len(inside))
                with guard:
                    inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 80
    assert not path.exists()


def test_text_can_be_left_in_a_held_lock_only(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "x")
    with pytest.raises(ValueError, match="not held"):
        lock.write(b"a")
    with lock:
        lock.write(b"a")
        lock.write(b"b")
        assert (tmp_path / "x").read_bytes() == b"ab"
