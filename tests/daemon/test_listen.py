from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from ohmygpu.core.errors import ConfigError, DaemonAlreadyRunning, DaemonError, PortInUse
from ohmygpu.core.settings import ServerSettings
from ohmygpu.daemon.listen import ALLOW_REMOTE, check_bind_host, listen_tcp, listen_unix, url_of


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)) as caught:
            listen_tcp(ServerSettings(port=port))
    assert caught.value.details["port"] == port


def test_port_zero_is_any_free_one_and_the_url_has_its_number() -> None:
    settings = ServerSettings(port=0)
    with listen_tcp(settings) as sock:
        assert url_of(sock, settings) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_an_address_of_another_machine_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"server\.host"):
        listen_tcp(ServerSettings(host="127.0.0.1.nowhere.invalid", port=0))


def test_others_are_let_in_only_when_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_REMOTE, raising=False)
    for host in ("0.0.0.0", "192.168.1.10", "::"):
        with pytest.raises(ConfigError, match="access control") as caught:
            check_bind_host(host)
        assert caught.value.details["key"] == "server.host"
    monkeypatch.setenv(ALLOW_REMOTE, "1")
    check_bind_host("0.0.0.0")


def test_the_unix_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen_unix(path):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_a_dead_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen_unix(path), pytest.raises(DaemonAlreadyRunning):
        listen_unix(path)
    assert path.is_socket()  # closed, so nobody answers there
    listen_unix(path).close()


def test_a_file_in_the_sockets_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(DaemonError):
        listen_unix(path)
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_path_too_long_for_a_socket_says_so(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="shorter"):
        listen_unix(tmp_path / ("x" * 120))
