"""Starting the daemon in the background, and learning whether it came up."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from ohmygpu.core.child import python_module
from ohmygpu.core.errors import ConfigError, DaemonError, OhMyGPUError
from ohmygpu.core.settings import Settings, describe, load_settings

START_TIMEOUT_S = 60.0
_MAX_REPORT_BYTES = 65536

# Daemons this process started: a reference, so that their Popen objects are not collected while
# they run, which Python warns about.
_started: list[subprocess.Popen[bytes]] = []


def daemonize(settings: Settings) -> tuple[int, str]:
    """Start a daemon that outlives this process; its (pid, URL) once it listens.

    Raises what stops it from starting (DaemonAlreadyRunning, PortInUse, ConfigError), or
    DaemonError when it ends without a word.
    """
    try:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        stderr = settings.log_file.open("ab")
    except OSError as error:
        raise unusable_home(settings, error) from error
    reading, writing = os.pipe()
    try:
        with stderr:
            process = subprocess.Popen(
                [*python_module("ohmygpu.daemon"), "--ready-fd", str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(writing,),
                env=child_environment(settings, os.environ),
                cwd=settings.home,  # a daemon should hold no folder of the user's
                start_new_session=True,
            )
    finally:
        os.close(writing)
    _started.append(process)
    try:
        line = _read_report(reading, START_TIMEOUT_S)
    finally:
        os.close(reading)
    if not line:
        process.wait()
        raise DaemonError(f"the daemon ended while it was starting; {settings.log_file} says why")
    said = json.loads(line)
    if "error" in said:
        process.wait()
        raise OhMyGPUError.from_dict(said["error"])
    return int(said["pid"]), str(said["url"])


def unusable_home(settings: Settings, error: OSError) -> ConfigError:
    """The error for a home folder that cannot be written to."""
    return ConfigError(
        f"the home folder {settings.home} cannot be used ({error.strerror or error}); "
        "make it writable, or set OHMYGPU_HOME to another folder",
        key="home",
        value=str(settings.home),
    )


def report(ready_fd: int, message: Mapping[str, Any]) -> None:
    """Tell the process that called `daemonize`, once; it may have given up waiting."""
    try:
        os.write(ready_fd, json.dumps(message, default=str).encode() + b"\n")
        os.close(ready_fd)
    except OSError:
        pass


def child_environment(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a child loads the same settings.

    What it would find by itself, in the file and the environment, is left to it; the rest, flags
    of the command line mostly, is added.
    """
    result = dict(environment) | {"OHMYGPU_HOME": str(settings.home)}
    found = load_settings({"home": str(settings.home)})
    for row in describe(settings):
        section, _, name = row.key.partition(".")
        if not name or row.key == "hub.token":
            continue
        value = getattr(getattr(settings, section), name)
        if value != getattr(getattr(found, section), name):
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            result[f"OHMYGPU_{section}_{name}".upper()] = text
    return result


def _read_report(fd: int, timeout_s: float) -> bytes:
    """The first line written to a pipe; what there is when the writer ends or time is over."""
    deadline, line = time.monotonic() + timeout_s, b""
    while b"\n" not in line and len(line) < _MAX_REPORT_BYTES:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise DaemonError(f"the daemon did not answer within {timeout_s:.0f} seconds")
        piece = os.read(fd, _MAX_REPORT_BYTES)
        if not piece:
            break
        line += piece
    return line
