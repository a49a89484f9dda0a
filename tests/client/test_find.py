from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import pytest

from ohmygpu.client import connect, find_daemon, settings_url
from ohmygpu.core.errors import DaemonError, DaemonNotRunning
from ohmygpu.core.settings import load_settings
from tests.cli.fake_daemon import FakeDaemon


def test_the_url_follows_host_and_port_and_names_a_real_host_for_wildcards() -> None:
    for host, url in (
        ("127.0.0.1", "http://127.0.0.1:7"),
        ("0.0.0.0", "http://127.0.0.1:7"),
        ("::", "http://[::1]:7"),
        ("localhost", "http://localhost:7"),
    ):
        assert settings_url(load_settings({"server.host": host, "server.port": "7"})) == url


def test_the_daemon_at_the_url_is_found(fake_daemon: FakeDaemon) -> None:
    address, health = find_daemon(load_settings())
    assert address.url == fake_daemon.url
    assert health.uptime_s == 75.5
    with connect(load_settings()) as client:
        assert client.health().version == "0.1.0"


def test_nothing_listening_says_how_to_start_the_daemon(home: Path) -> None:
    with pytest.raises(DaemonNotRunning, match="omg serve") as caught:
        find_daemon(load_settings({"server.port": "1"}))
    assert caught.value.details["url"] == "http://127.0.0.1:1"


def test_a_proxy_in_the_environment_is_not_asked(
    fake_daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert find_daemon(load_settings())


def test_another_program_on_the_port_is_named_as_such(fake_daemon: FakeDaemon) -> None:
    for text in ('{"status": "ok"}', "<html>", "[]", '{"models": [3]}', ""):
        fake_daemon.health_text = text
        with pytest.raises(DaemonError, match="another program"):
            find_daemon(load_settings())


def test_a_program_that_speaks_no_http_is_an_error_and_not_a_hang(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-x\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(DaemonError):
            find_daemon(load_settings({"server.port": str(port)}))
        thread.join()


def test_a_daemon_on_another_port_is_found_by_its_socket(home: Path) -> None:
    home.mkdir()
    fake = FakeDaemon(home)

    class OverUnix(fake._server.RequestHandlerClass, BaseHTTPRequestHandler):  # type: ignore[misc, name-defined]
        def address_string(self) -> str:
            return "unix"

    with ThreadingUnixStreamServer(str(home / "daemon.sock"), OverUnix) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            address, health = find_daemon(load_settings({"server.port": "1"}))
        finally:
            server.shutdown()
            thread.join()
    fake._server.server_close()
    assert address.socket == home / "daemon.sock"
    assert health.home == str(home)


def test_a_socket_that_nobody_serves_is_no_daemon(home: Path) -> None:
    home.mkdir()
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(home / "daemon.sock"))
    with pytest.raises(DaemonNotRunning):
        find_daemon(load_settings({"server.port": "1"}))
