"""The daemon's listening sockets: TCP, and the Unix socket in the home folder.

Made here, not by the HTTP server, so that a taken port has its own error, the Unix socket is
private from its first instant, and a living server's socket is never unlinked.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from ohmygpu.core.errors import ConfigError, DaemonAlreadyRunning, DaemonError, PortInUse
from ohmygpu.core.settings import ServerSettings

from .security import is_loopback

ALLOW_REMOTE = "OHMYGPU_ALLOW_REMOTE"
BACKLOG = 1024  # connections not yet accepted; the default of 100 resets bursts
_PROBE_TIMEOUT_S = 1.0


def check_bind_host(host: str) -> None:
    """Raise ConfigError for an address others can reach, unless OHMYGPU_ALLOW_REMOTE=1."""
    if is_loopback(host) or os.environ.get(ALLOW_REMOTE) == "1":
        return
    raise ConfigError(
        f"server.host = {host} would let anybody on the network use this server, which has no "
        "access control yet; keep 127.0.0.1 and put a proxy with authentication before it, or set "
        f"{ALLOW_REMOTE}=1 if the network is trusted (a container, say)",
        key="server.host",
        value=host,
    )


def listen_tcp(settings: ServerSettings) -> socket.socket:
    """Listening socket at the configured address. Raises PortInUse, ConfigError (bad address)."""
    host, port = settings.host.strip("[]"), settings.port
    check_bind_host(host)
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _bad_host(host, error) from None
    # "localhost" has two addresses; clients that try one only try the older.
    family, kind, protocol, _, address = min(info, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections in TIME_WAIT
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by connections
        sock.bind(address)
        sock.listen(BACKLOG)  # two servers may bind the same port; only one may listen
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is in use by another program; stop it, or choose another "
                "port with `omg config set server.port <number>`",
                host=host,
                port=port,
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"port {port} needs more rights than this user has; choose one above 1023",
                key="server.port",
                value=port,
            ) from None
        raise _bad_host(host, error) from None
    return sock


def listen_unix(path: Path) -> socket.socket:
    """Listening socket at `path`, for this user only; replaces a dead one.

    Raises DaemonAlreadyRunning when something answers there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # nobody else, from the first instant
    try:
        _remove_dead(path)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise DaemonError(
            f"the Unix socket {path} cannot be made ({reason}); "
            "a home folder with a shorter path on a local disk may help"
        ) from None
    except DaemonAlreadyRunning:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


def _remove_dead(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass  # its backlog is full: it lives
    raise DaemonAlreadyRunning(f"another server answers at {path}; stop it first")


def url_of(sock: socket.socket, settings: ServerSettings) -> str:
    """http://host:port of a bound socket, with the port the system chose for port 0."""
    host = settings.host.strip("[]")
    port = sock.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bad_host(host: str, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(
        f"server.host = {host} is not an address of this machine ({reason})",
        key="server.host",
        value=host,
    )
