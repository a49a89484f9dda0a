from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import DaemonAlreadyRunning, OhMyGPUError, PortInUse
from ohmygpu.core.settings import Settings
from ohmygpu.daemon import server
from tests.cli.conftest import Result
from tests.cli.fake_daemon import FakeDaemon
from tests.cli.fake_models import install_fake

Omg = Callable[..., Result]
LOADED: Mapping[str, Any] = {
    "name": "org/tiny:latest",
    "state": "ready",
    "running": 2,
    "waiting": 1,
    "memory_bytes": 300_000_000,
    "expires_in_s": 240.2,
    "kept_forever": False,
    "execution_provider": "CPU",
    "context_tokens": 2048,
    "something_newer": 1,
}


def test_status_shows_where_the_daemon_is_and_what_it_holds(
    home: Path, fake_daemon: FakeDaemon, omg: Omg
) -> None:
    fake_daemon.loaded = [dict(LOADED)]
    result = omg("serve", "status")
    assert result.code == 0
    for text in ("running", fake_daemon.url, str(os.getpid()), "1 minute", "org/tiny", "300 MB"):
        assert text in result.stdout
    data = json.loads(omg("serve", "status", "--json").stdout)
    assert data["running"] is True
    assert data["models"][0]["waiting"] == 1


def test_status_without_a_daemon_exits_with_4(home: Path, omg: Omg) -> None:
    result = omg("serve", "status")
    assert (result.code, result.stdout) == (4, "not running\n")
    assert "omg serve -d" in result.stderr
    result = omg("serve", "status", "--json")
    assert result.code == 4
    assert json.loads(result.stdout)["running"] is False


def test_status_of_a_daemon_that_shuts_down_says_so(fake_daemon: FakeDaemon, omg: Omg) -> None:
    fake_daemon.status = "stopping"
    assert "stopping" in omg("serve", "status").stdout


def test_a_daemon_of_another_home_folder_is_not_ours(
    home: Path, fake_daemon: FakeDaemon, omg: Omg, tmp_path: Path
) -> None:
    fake_daemon.home = tmp_path / "elsewhere"
    result = omg("serve", "status")
    assert result.code == 4
    assert "another home folder" in result.stderr
    install_fake(home)
    assert omg("rm", "org/tiny").code == 0
    assert fake_daemon.paths() == []


def test_ps_lists_loaded_models(fake_daemon: FakeDaemon, omg: Omg) -> None:
    assert "no model" in omg("ps").stderr
    fake_daemon.loaded = [
        dict(LOADED),
        {**LOADED, "name": "org/busy:q4", "expires_in_s": None},
        {**LOADED, "name": "org/kept:q4", "expires_in_s": None, "kept_forever": True},
    ]
    rows = omg("ps").stdout.splitlines()
    assert rows[1].startswith("org/tiny ")
    assert rows[1].endswith("4 minutes from now")
    assert rows[2].endswith("in use")
    assert rows[3].endswith("for ever")
    assert len(json.loads(omg("ps", "--json").stdout)["models"]) == 3


def test_stop_unloads_a_model(home: Path, fake_daemon: FakeDaemon, omg: Omg) -> None:
    fake_daemon.models.append(install_fake(home))
    assert omg("stop", "org/tiny").stdout == "unloaded org/tiny\n"
    result = omg("stop", "org/tinny")
    assert result.code == 3
    assert "did you mean org/tiny?" in result.stderr


def test_commands_that_need_the_daemon_say_so(home: Path, omg: Omg) -> None:
    for command in (["ps"], ["stop", "m"]):
        result = omg(*command)
        assert (result.code, result.stdout) == (4, "")
        assert "omg serve" in result.stderr


def test_serve_runs_with_the_settings_and_flags_of_the_command_line(
    omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(server, "run_daemon", seen.append)
    assert omg("serve", "--host", "0.0.0.0", "--port", "1234").code == 0
    assert (seen[0].server.host, seen[0].server.port) == ("0.0.0.0", 1234)
    assert omg("serve", "--port", "abc").code == 2
    assert omg("serve", "--port", "1", "status").code == 2


def test_serve_in_the_background_says_where_it_listens(
    omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "daemonize", lambda _: (42, "http://127.0.0.1:7"))
    result = omg("serve", "-d")
    assert result.stdout == "the daemon runs at http://127.0.0.1:7 (pid 42)\n"


@pytest.mark.parametrize(
    "error",
    [
        DaemonAlreadyRunning("another daemon (pid 7) serves this folder"),
        PortInUse("port 1 is in use"),
    ],
)
def test_a_daemon_that_cannot_start_is_one_sentence(
    omg: Omg, monkeypatch: pytest.MonkeyPatch, error: OhMyGPUError
) -> None:
    def refuse(_: Settings) -> None:
        raise error

    monkeypatch.setattr(server, "run_daemon", refuse)
    result = omg("serve")
    assert (result.code, result.stderr) == (10, f"Error: {error.message}\n")


LOCKED = (
    "import fcntl, os, signal, sys\n"
    "file = open(sys.argv[1], 'w')\n"
    "fcntl.flock(file, fcntl.LOCK_EX)\n"
    "file.write(f'{os.getpid()}\\n'); file.flush()\n"
    "print('ready', flush=True)\n"
    "signal.pause()\n"
)


def test_serve_stop_ends_the_process_that_holds_the_pid_file(home: Path, omg: Omg) -> None:
    home.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", LOCKED, str(home / "daemon.pid")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        result = omg("serve", "stop")
        assert (result.code, result.stdout.splitlines()[-1]) == (0, "stopped")
        assert process.wait(10) == -signal.SIGTERM


def test_serve_stop_never_signals_a_stale_pid(home: Path, omg: Omg) -> None:
    home.mkdir()
    (home / "daemon.pid").write_text(f"{os.getpid()}\n", encoding="ascii")  # nobody locks it
    result = omg("serve", "stop")
    assert result.code == 4
    assert "nothing to stop" in result.stderr


def test_serve_stop_of_a_daemon_that_is_just_starting_asks_to_try_again(
    home: Path, omg: Omg
) -> None:
    home.mkdir()
    with (home / "daemon.pid").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "try again" in omg("serve", "stop").stderr
