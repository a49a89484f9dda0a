"""`python -m ohmygpu.daemon`: the daemon in the foreground, or started by `daemonize`."""

from __future__ import annotations

import argparse
import sys

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.core.settings import load_settings

from .background import report
from .server import run_daemon


def main() -> int:
    """Run; exit code 1 with one sentence on stderr when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m ohmygpu.daemon")
    parser.add_argument("--ready-fd", type=int, default=None, help=argparse.SUPPRESS)
    ready_fd = parser.parse_args().ready_fd
    try:
        settings = load_settings()
    except OhMyGPUError as error:
        if ready_fd is not None:
            report(ready_fd, {"error": error.to_dict()})
        sys.stderr.write(f"{error.message}\n")
        return 1
    try:
        run_daemon(settings, ready_fd)
    except OhMyGPUError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
