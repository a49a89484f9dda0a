"""Child processes: how ours are started, and how they end when their parent does."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Mapping

# May hold credentials; what handles files from strangers must not have them.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PIP_INDEX_URL", "OHMYGPU_PYPI_INDEX")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def python_module(module: str) -> tuple[str, ...]:
    """The command that runs `module` as `python -m` does, in this interpreter."""
    # -P: a file of the working folder must not pass for a package of ours or of Python's.
    return (sys.executable, "-P", "-m", module)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a child that needs no network."""
    return {name: value for name, value in environment.items() if name not in _SECRETS}


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; elsewhere than on Linux, nothing.

    Linux counts the thread that started the process as the parent: it must stay until the child has
    ended. Children also watch a pipe or socket of ours for its end, which works everywhere but not
    while they are stuck.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
