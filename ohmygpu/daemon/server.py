"""The daemon process: everything is put together here, started, and stopped cleanly.

Stopping (SIGTERM, SIGINT): new requests get 503 and pulls end (they resume); running requests may
finish for `server.drain_s`; then models are unloaded, which ends what still streams with an error
event; then the HTTP server, the socket and the PID file go, and the process exits 0. A second
signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable

from hypercorn.asyncio import serve
from hypercorn.config import Config

from ohmygpu import __version__
from ohmygpu.core.errors import DaemonAlreadyRunning, DaemonError, OhMyGPUError
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import Settings

from .app import create_app
from .background import daemonize, report, unusable_home
from .listen import BACKLOG, listen_tcp, listen_unix, url_of
from .log import set_up_logging
from .manager import ModelManager
from .pidfile import PidFile
from .pulls import Pulls, Verifications
from .security import is_loopback
from .services import DaemonState, Services
from .worker import WorkerRuntime

__all__ = ["daemonize", "run_daemon"]

KEEP_ALIVE_S = 30.0  # idle connections; longer than HTTP clients keep theirs, so that they close
MAX_OPEN_FILES = 16384
PULL_END_S = 2.0  # for pulls to note how far they came
GOODBYE_S = 1.0  # for streams to write their last event, and for connections to close

_logger = logging.getLogger("ohmygpu.daemon")


def run_daemon(settings: Settings, ready_fd: int | None = None) -> None:
    """Serve until told to stop. Raises DaemonAlreadyRunning, PortInUse or ConfigError at the start.

    With `ready_fd`, the pipe of `daemonize`, it logs to daemon.log only and reports through the
    pipe that it listens, or why it cannot.
    """
    try:
        _claim_and_serve(settings, ready_fd)
    except OhMyGPUError as error:
        if ready_fd is not None:
            report(ready_fd, {"error": error.to_dict()})
        raise


def _claim_and_serve(settings: Settings, ready_fd: int | None) -> None:
    pid_file = PidFile(settings.pid_file)
    socket_path = settings.socket_file
    unix: socket.socket | None = None
    try:
        _claim(settings, pid_file, to_stderr=ready_fd is None)
        tcp = listen_tcp(settings.server)
        try:
            unix = listen_unix(socket_path)
        except DaemonAlreadyRunning:
            tcp.close()
            raise
        except DaemonError as error:
            _logger.warning("serving without a Unix socket: %s", error.message)
        state = DaemonState(url=url_of(tcp, settings.server))
        state.socket_path = socket_path if unix is not None else None
        sockets = [tcp] if unix is None else [tcp, unix]
        asyncio.run(_serve(settings, state, sockets, ready_fd))
    finally:
        if unix is not None:
            socket_path.unlink(missing_ok=True)
        pid_file.release()
        _logger.info("stopped")


def _claim(settings: Settings, pid_file: PidFile, *, to_stderr: bool) -> None:
    """Make the home folder ours and start its log."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        pid_file.acquire()
        set_up_logging(settings.log_file, to_stderr=to_stderr)
    except OSError as error:
        raise unusable_home(settings, error) from error
    if not is_loopback(settings.server.host):
        _logger.warning("anybody who reaches %s can use this server", settings.server.host)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:  # every connection takes one
        wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def build_services(settings: Settings, state: DaemonState) -> Services:
    """The daemon's parts, wired together."""
    from ohmygpu import install
    from ohmygpu.core.hardware import memory_available_bytes
    from ohmygpu.verify import verify

    repository = Repository(settings.home)
    manager = ModelManager(settings, repository, WorkerRuntime, memory_available_bytes)

    async def on_installed(_: object) -> None:
        await manager.refresh()

    return Services(
        settings=settings,
        state=state,
        manager=manager,
        pulls=Pulls(
            lambda reference, **how: install.pull(reference, settings, **how), on_installed
        ),
        verifications=Verifications(lambda name, **how: verify(name, settings, **how)),
        remove=lambda name: install.remove(name, settings),
        collect_garbage=lambda sources: install.collect_garbage(settings, sources),
    )


async def _serve(
    settings: Settings, state: DaemonState, sockets: list[socket.socket], ready_fd: int | None
) -> None:
    services = build_services(settings, state)
    app = create_app(services)
    stop = _StopSignals(wake=state.changed.set, ignore_hangup=ready_fd is not None)
    close_server = asyncio.Event()
    config = _hypercorn_config(sockets)
    server = asyncio.create_task(serve(app, config, shutdown_trigger=close_server.wait))
    stopping = asyncio.create_task(stop.requested.wait())
    _logger.info("ohmygpu %s listens at %s (pid %d)", __version__, state.url, os.getpid())
    if ready_fd is not None:
        report(ready_fd, {"pid": os.getpid(), "url": state.url})
    await asyncio.wait({server, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not server.done():
        await _drain(services, stop, settings.server.drain_s)
        close_server.set()
        await asyncio.wait({server}, timeout=GOODBYE_S)
    failure = server.exception() if server.done() and not server.cancelled() else None
    await _end_tasks()
    if failure is not None:
        raise DaemonError(f"the HTTP server failed: {failure}") from failure


async def _drain(services: Services, stop: _StopSignals, drain_s: float) -> None:
    state = services.state
    state.draining = True
    _logger.info("stopping; %d requests are running", state.requests)
    await asyncio.gather(
        services.pulls.shutdown(PULL_END_S), services.verifications.shutdown(PULL_END_S)
    )
    await _until_idle(state, stop, drain_s)
    if state.requests:
        _logger.warning("%d requests did not finish in time", state.requests)
    unloading = asyncio.create_task(services.manager.shutdown())
    hurrying = asyncio.create_task(stop.hurry.wait())
    await asyncio.wait({unloading, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    if not stop.hurry.is_set():
        await _until_idle(state, stop, GOODBYE_S)


async def _until_idle(state: DaemonState, stop: _StopSignals, timeout_s: float) -> None:
    """Wait until no request runs, `timeout_s` is over, or the user insists."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while state.requests and not stop.hurry.is_set():
                state.changed.clear()
                await state.changed.wait()


async def _end_tasks() -> None:
    """Cancel whatever is left, more than once if need be, without waiting for ever.

    A connection whose client does not read swallows its first cancellation while it flushes; the
    HTTP server waits for such connections without a bound on some versions of Python.
    """
    for _ in range(3):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=GOODBYE_S / 2)


class _StopSignals:
    """Events set by signals: `requested` by the first, `hurry` by the next one.

    `wake` is called with the latter, for those who wait for something else.
    """

    def __init__(self, *, wake: Callable[[], None], ignore_hangup: bool) -> None:
        self.requested = asyncio.Event()
        self.hurry = asyncio.Event()
        self._wake = wake
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stop)
        if ignore_hangup:  # a daemon outlives its terminal
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        else:
            loop.add_signal_handler(signal.SIGHUP, self.requested.set)

    def _stop(self) -> None:
        if self.requested.is_set():
            self.hurry.set()
            self._wake()
        self.requested.set()


def _hypercorn_config(sockets: list[socket.socket]) -> Config:
    config = Config()
    config.bind = [f"fd://{sock.detach()}" for sock in sockets]
    config.backlog = BACKLOG
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.graceful_timeout = GOODBYE_S / 2
    config.include_server_header = False
    config.accesslog = None  # the application logs requests, with their ids
    config.errorlog = logging.getLogger("ohmygpu.http.server")
    return config
