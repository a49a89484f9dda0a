"""The daemon as a process: starting, refusing to start, and stopping in every situation."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import ConfigError, DaemonAlreadyRunning, DaemonError, PortInUse
from ohmygpu.core.settings import ServerSettings, Settings, load_settings
from ohmygpu.daemon import background
from ohmygpu.daemon.background import child_environment
from ohmygpu.daemon.pidfile import read_pid
from ohmygpu.daemon.server import daemonize, run_daemon
from tests.daemon.fakes import RawClient, install_model, settings_of

ROOT = Path(__file__).parents[2]

# A daemon whose models are fakes: each request says how its answer goes.
SCRIPT = """
import json, sys
from pathlib import Path
from ohmygpu.daemon import server
from tests.daemon.fakes import *

def build(settings, state):
    runtimes = Runtimes()
    services = make_services(settings, runtimes)
    for step in {"stream": ["Hel", asyncio.Event(), END], "finish": ["Hel", 0.5, "lo", END],
                 "flood": ["x" * 65536] * 2000 + [END]}[sys.argv[3]],:
        for _ in range(50):
            runtimes.enqueue(*step)
    return Services(**{name: getattr(services, name) for name in Services.__dataclass_fields__}
                    | {"state": state})

server.build_services = build
server.run_daemon(settings_of(Path(sys.argv[1]), drain_s=float(sys.argv[2])), int(sys.argv[4]))
"""
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Daemon:
    def __init__(self, process: asyncio.subprocess.Process, url: str, home: Path) -> None:
        self.process = process
        self.port = int(url.rpartition(":")[2])
        self.home = home
        self.clients: list[RawClient] = []

    def signal(self, sign: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(sign)

    async def ended(self) -> int:
        """Exit status, once it has ended as it should: soon, and leaving nothing behind."""
        async with asyncio.timeout(60):
            status = await self.process.wait()
        assert not (self.home / "daemon.pid").exists()
        assert not (self.home / "daemon.sock").exists()
        return status

    async def connect(self) -> RawClient:
        self.clients.append(await RawClient.connect(self.port))
        return self.clients[-1]

    async def client(self, *, stream: bool = True) -> RawClient:
        client = await self.connect()
        await client.post("/v1/chat/completions", CHAT | {"stream": stream})
        return client


@asynccontextmanager
async def daemon(home: Path, answers: str, drain_s: float) -> AsyncIterator[Daemon]:
    install_model(home, "m")
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCRIPT, str(home), str(drain_s), answers, str(writing)),
        pass_fds=(writing,),
        cwd=ROOT,
    )
    os.close(writing)
    found = None
    try:
        line = await asyncio.to_thread(background._read_report, reading, 30)
        found = Daemon(process, json.loads(line)["url"], home)
        yield found
    finally:
        for client in found.clients if found else ():
            await client.close()
        os.close(reading)
        if process.returncode is None:
            process.kill()
            await process.wait()


def health(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
        result: dict[str, Any] = json.load(response)
        return result


def wait_for_end(pid: int) -> None:
    """Reap a daemon this process started."""
    for process in background._started:
        if process.pid == pid:
            assert process.wait(10) == 0


async def test_idle_it_stops_at_once(tmp_path: Path) -> None:
    async with daemon(tmp_path, "stream", 10) as found:
        found.signal()
        assert await found.ended() == 0


async def test_a_running_answer_may_finish_and_new_requests_get_503_meanwhile(
    tmp_path: Path,
) -> None:
    async with daemon(tmp_path, "finish", 10) as found:
        client, late = await found.client(), await found.connect()
        await client.until(b"Hel")
        found.signal()
        while True:
            await late.post("/v1/chat/completions", CHAT)
            if b" 503 " in (head := await late.until(b"\r\n\r\n")):
                break
        assert b"retry-after" in head.lower()
        assert b"data: [DONE]\n\n" in await client.rest()
        assert await found.ended() == 0


async def test_an_endless_stream_ends_with_an_error_event_after_the_drain_time(
    tmp_path: Path,
) -> None:
    async with daemon(tmp_path, "stream", 0.2) as found:
        client = await found.client()
        await client.until(b"Hel")
        found.signal()
        rest = await client.rest()
        assert b'"error"' in rest
        assert b"[DONE]" not in rest
        assert rest.endswith(b"0\r\n\r\n")
        assert await found.ended() == 0


async def test_an_unstreamed_answer_that_does_not_finish_gets_an_error_status(
    tmp_path: Path,
) -> None:
    async with daemon(tmp_path, "stream", 0.2) as found:
        client = await found.client(stream=False)
        other = await found.client()
        await other.until(b"Hel")
        found.signal()
        assert b" 503 " in (await client.rest()).partition(b"\r\n")[0]
        assert await found.ended() == 0


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    async with daemon(tmp_path, "stream", 3600) as found:
        client = await found.client()
        await client.until(b"Hel")
        found.signal()
        probe = await found.connect()
        while b'"stopping"' not in await probe_health(probe):
            pass
        found.signal(signal.SIGINT)
        assert await found.ended() == 0


async def probe_health(client: RawClient) -> bytes:
    client.writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = await client.until(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    return await client.reader.readexactly(length)


async def test_a_client_that_does_not_read_cannot_hold_it_up(tmp_path: Path) -> None:
    async with daemon(tmp_path, "flood", 0.1) as found:
        stalled = socket.create_connection(("127.0.0.1", found.port))
        body = json.dumps(CHAT | {"stream": True})
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        )
        stalled.sendall(f"{head}\r\n\r\n{body}".encode())
        await asyncio.to_thread(stalled.recv, 100)
        found.signal()
        assert await found.ended() == 0
        stalled.close()


async def test_what_a_killed_daemon_left_does_not_stop_the_next(tmp_path: Path) -> None:
    async with daemon(tmp_path, "stream", 1) as first:
        first.signal(signal.SIGKILL)
        await first.process.wait()
    assert (tmp_path / "daemon.pid").exists()
    assert (tmp_path / "daemon.sock").is_socket()
    async with daemon(tmp_path, "stream", 1) as second:
        assert read_pid(tmp_path / "daemon.pid") == second.process.pid
        second.signal()
        assert await second.ended() == 0


def test_in_the_background_it_answers_on_both_sockets_and_allows_no_second(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    started = time.monotonic()
    pid, url = daemonize(settings)
    assert time.monotonic() - started < 30
    said = health(url)
    assert (said["status"], said["pid"], said["url"]) == ("ok", pid, url)
    assert said["home"] == str(tmp_path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(said["socket"])
        client.sendall(b"GET /health HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n")
        assert b" 200 " in client.recv(100)
    with pytest.raises(DaemonAlreadyRunning, match=str(pid)):
        daemonize(settings)
    assert health(url)["pid"] == pid
    os.kill(pid, signal.SIGHUP)  # its terminal closing is no reason to go
    assert health(url)["pid"] == pid
    os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)


def test_a_taken_port_and_a_public_address_are_reported_to_who_started_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        flags = {"home": str(tmp_path / "a"), "server.port": str(port)}
        with pytest.raises(PortInUse, match=str(port)):
            daemonize(load_settings(flags))
    with pytest.raises(ConfigError, match="access control"):
        daemonize(load_settings({"home": str(tmp_path / "a"), "server.host": "0.0.0.0"}))
    assert not (tmp_path / "a" / "daemon.pid").exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    settings = settings_of(tmp_path / "file" / "home")
    with pytest.raises(ConfigError, match="OHMYGPU_HOME"):
        daemonize(settings)
    with pytest.raises(ConfigError, match="OHMYGPU_HOME"):
        run_daemon(settings)


def test_a_daemon_that_ends_without_a_word_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DaemonError, match=r"daemon\.log"):
        daemonize(settings_of(tmp_path))


def test_flags_reach_the_child_and_the_rest_is_found_where_it_was(tmp_path: Path) -> None:
    flags = {"home": str(tmp_path), "server.origins": "https://a.b,https://c.d"}
    environment = child_environment(load_settings(flags), {"PATH": "/bin"})
    assert environment == {
        "PATH": "/bin",
        "OHMYGPU_HOME": str(tmp_path),
        "OHMYGPU_SERVER_ORIGINS": "https://a.b,https://c.d",
    }


def test_in_the_foreground_a_failure_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        environment = os.environ | {"OHMYGPU_HOME": str(tmp_path), "OHMYGPU_SERVER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-m", "ohmygpu.daemon"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"port {port}" in done.stderr


def test_settings_of_tests_choose_a_free_port(tmp_path: Path) -> None:
    assert settings_of(tmp_path) == Settings(home=tmp_path, server=ServerSettings(port=0))
