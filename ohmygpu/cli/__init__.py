"""The `omg` command. `main` is the entry point; each command lives in a module of its own.

`root.py` lists the commands without importing them, so `omg --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's); the exit code."""
    from .errors import run
    from .root import omg

    return run(omg, arguments)
