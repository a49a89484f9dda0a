"""Where the daemon of this home folder listens.

First at the settings' URL, then at the home folder's Unix socket, which a daemon started on another
port still has. What answers must serve this home folder: a daemon of another folder, or of another
user, is not ours.
"""

from __future__ import annotations

import socket
from pathlib import Path

from ohmygpu.core.errors import DaemonError, DaemonNotRunning
from ohmygpu.core.settings import Settings

from .http import CONNECT_S, Client
from .nouns import Address, Health
from .wire import not_running


def connect(settings: Settings) -> Client:
    """A client of the running daemon. Raises DaemonNotRunning."""
    return Client(find_daemon(settings)[0])


def find_daemon(settings: Settings) -> tuple[Address, Health]:
    """Where the daemon of this home folder listens, and its health.

    Raises DaemonNotRunning, also for a daemon of another folder; DaemonError when what answers is
    no daemon.
    """
    first = Address(settings_url(settings))
    problem: DaemonError = not_running(first)
    for address in (first, Address("http://localhost", settings.socket_file)):
        if address.socket and not _is_served(address.socket):
            continue
        try:
            with Client(address) as client:
                health = client.health()
        except DaemonNotRunning:
            continue
        except DaemonError as error:
            problem = error
            continue
        if Path(health.home).resolve() == settings.home.resolve():
            return address, health
        problem = DaemonNotRunning(
            f"the daemon at {first} serves another home folder, {health.home}; start one for"
            f" {settings.home} with `omg serve -d --port PORT`",
            url=first.url,
        )
    raise problem


def _is_served(path: Path) -> bool:
    """Whether somebody listens at a Unix socket: a killed daemon leaves its file behind."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def settings_url(settings: Settings) -> str:
    """The URL that the settings' host and port mean for a client."""
    host = settings.server.host
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not a bind
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.server.port}"
