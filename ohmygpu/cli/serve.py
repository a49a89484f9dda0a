"""`omg serve [-d]`, `omg serve status|stop`; `omg ps` and `omg stop` for the models in memory."""

from __future__ import annotations

import os
import select
import signal
import sys
import time

import click

from ohmygpu.client import Health, LoadedModel, connect, find_daemon
from ohmygpu.core.errors import DaemonError, DaemonNotRunning, NotTheDaemon
from ohmygpu.core.locks import is_locked
from ohmygpu.core.settings import Settings, load_settings
from ohmygpu.core.sizes import human_bytes

from .errors import exit_code
from .options import json_option, model_name
from .output import fields, human_duration, line, note, table, write_json

_STOP_MARGIN_S = 10.0  # beyond the draining time, for unloading the models
_POLL_S = 0.1


@click.group(invoke_without_command=True)
@click.option(
    "-d", "--detach", is_flag=True, help="Run in the background; return when it is ready."
)
@click.option("--host", metavar="ADDRESS", help="Listen on this address instead of server.host.")
@click.option("--port", metavar="PORT", help="Listen on this port instead of server.port.")
@click.pass_context
def serve(ctx: click.Context, detach: bool, host: str | None, port: str | None) -> None:
    """Start the daemon; see its state; stop it.

    Without a command the daemon starts, and Ctrl-C stops it. Nothing else starts it.
    """
    if ctx.invoked_subcommand is not None:
        if detach or host is not None or port is not None:
            raise click.UsageError("--detach, --host and --port start a daemon", ctx)
        return
    given = {"server.host": host, "server.port": port}
    settings = load_settings({key: value for key, value in given.items() if value is not None})
    if not detach:
        from ohmygpu.daemon.server import run_daemon

        run_daemon(settings)
        return
    from ohmygpu.daemon.server import daemonize

    pid, url = daemonize(settings)
    line(f"the daemon runs at {url} (pid {pid})")


@serve.command("status")
@json_option("Print the state as JSON.")
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show whether the daemon runs, where, and which models it holds.

    The exit code is 0 when it runs and 4 when it does not.
    """
    settings = load_settings()
    try:
        _, health = find_daemon(settings)
    except (DaemonNotRunning, NotTheDaemon) as error:
        if as_json:
            write_json({"running": False, "home": str(settings.home), "reason": error.message})
        else:
            line("not running")
            note(error.message)
        ctx.exit(exit_code(error))
    if as_json:
        write_json({"running": True, **health.to_dict()})
        return
    fields(
        [
            ("state", "running" if health.status == "ok" else health.status),
            ("url", health.url),
            ("socket", health.socket or "(none)"),
            ("version", health.version),
            ("pid", str(health.pid)),
            ("home", health.home),
            ("up", human_duration(health.uptime_s)),
            ("models", str(len(health.models)) + " in memory"),
        ]
    )
    if health.models:
        line()
        _show_loaded(health)


@serve.command("stop")
def stop() -> None:
    """Stop the daemon: running requests may finish first, for server.drain_s seconds."""
    settings = load_settings()
    pid = _daemon_pid(settings)
    line(f"stopping the daemon (pid {pid})")
    os.kill(pid, signal.SIGTERM)
    if not _wait_for_exit(pid, settings.server.drain_s + _STOP_MARGIN_S):
        raise DaemonError(
            f"the daemon (pid {pid}) still runs; `kill -9 {pid}` ends it, and loses nothing that"
            " is installed",
            pid=pid,
        )
    line("stopped")


def _daemon_pid(settings: Settings) -> int:
    """From the PID file while it is locked: never another machine's or a reused number."""
    path = settings.pid_file
    if is_locked(path):
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            raise DaemonError(
                f"a daemon is just starting or stopping for {settings.home}; try again in a moment"
            ) from error
    raise DaemonNotRunning(f"no daemon runs for {settings.home}; there is nothing to stop")


def _wait_for_exit(pid: int, timeout_s: float) -> bool:
    """Whether the process ended within the time."""
    if sys.platform == "linux":
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([fd], [], [], timeout_s)[0])
        finally:
            os.close(fd)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(_POLL_S)
    return False


@click.command("ps")
@json_option("Print the models as JSON.")
def list_loaded(as_json: bool) -> None:
    """List the models in memory, as the daemon holds them."""
    _, health = find_daemon(load_settings())
    if as_json:
        write_json({"models": health.to_dict()["models"]})
    elif health.models:
        _show_loaded(health)
    else:
        note("no model is in memory; the first request to one loads it")


def _show_loaded(health: Health) -> None:
    rows = [
        (
            entry.name.removesuffix(":latest"),
            entry.state,
            f"{entry.running} running, {entry.waiting} waiting",
            human_bytes(entry.memory_bytes),
            entry.execution_provider or "",
            str(entry.context_tokens or ""),
            _until(entry),
        )
        for entry in health.models
    ]
    table(["NAME", "STATE", "REQUESTS", "MEMORY", "PROCESSOR", "CONTEXT", "UNTIL"], rows)


def _until(entry: LoadedModel) -> str:
    if entry.expires_in_s is not None:
        return f"{human_duration(entry.expires_in_s)} from now"
    return "for ever" if entry.kept_forever else "in use"


@click.command("stop")
@model_name("name")
def unload(name: str) -> None:
    """Free the memory of a loaded model; it stays installed.

    `omg serve stop` stops the daemon itself.
    """
    with connect(load_settings()) as client:
        gone = client.unload(name)
    line(f"unloaded {name}" if gone else f"{name} unloads when its requests have ended")
