from __future__ import annotations

import os
from pathlib import Path

import pytest

from ohmygpu.core.errors import DaemonAlreadyRunning
from ohmygpu.daemon.pidfile import PidFile, read_pid


def test_the_file_holds_our_pid_and_goes_when_we_do(tmp_path: Path) -> None:
    path = tmp_path / "home" / "daemon.pid"
    claim = PidFile(path)
    claim.acquire()
    assert read_pid(path) == os.getpid()
    claim.release()
    assert not path.exists()
    claim.release()


def test_a_second_daemon_is_refused_and_told_the_pid_of_the_first(tmp_path: Path) -> None:
    first = PidFile(tmp_path / "daemon.pid")
    first.acquire()
    with pytest.raises(DaemonAlreadyRunning, match=str(os.getpid())) as caught:
        PidFile(tmp_path / "daemon.pid").acquire()
    assert caught.value.details["pid"] == os.getpid()
    assert read_pid(tmp_path / "daemon.pid") == os.getpid()
    first.release()
    PidFile(tmp_path / "daemon.pid").acquire()


def test_a_file_left_by_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "daemon.pid"
    path.write_text("1234567\n", encoding="ascii")
    PidFile(path).acquire()
    assert read_pid(path) == os.getpid()


def test_rubbish_is_no_pid(tmp_path: Path) -> None:
    path = tmp_path / "daemon.pid"
    assert read_pid(path) is None
    path.write_bytes(b"\xff\xfe not a number")
    assert read_pid(path) is None
