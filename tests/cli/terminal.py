"""A command at a pseudo-terminal: type into it, wait for what it shows."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

CTRL_C, CTRL_D = "\x03", "\x04"
PATIENCE_S = 30.0

# The terminal must control the child, else Ctrl-C typed into it is no signal.
_ADOPT = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, '-m', 'ohmygpu', *sys.argv[1:]])"
)


class Terminal:
    """One command, its screen so far in `text`."""

    def __init__(self, *arguments: str) -> None:
        self._fd, inner = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ADOPT, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
        )
        os.close(inner)
        self.text = ""
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def type(self, text: str) -> None:
        """Type; `\\r` is the Enter key."""
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> str:
        """Everything shown since the last wait, up to and with `text`."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.text.find(text, self._seen)) < 0:
            if not self._read(deadline):
                raise AssertionError(f"{text!r} did not appear; the screen shows:\n{self.text}")
        start, self._seen = self._seen, found + len(text)
        return self.text[start : self._seen]

    def press_until(self, key: str, text: str) -> str:
        """Press `key`, and again every two seconds, until `text` appears.

        A Ctrl-C that comes between readline's prompt and its wait shows only at the next key.
        """
        deadline = time.monotonic() + PATIENCE_S
        while self.text.find(text, self._seen) < 0 and time.monotonic() < deadline:
            self.type(key)
            again = min(deadline, time.monotonic() + 2)
            while self.text.find(text, self._seen) < 0 and self._read(again):
                pass
        return self.wait_for(text)

    def exit_code(self) -> int:
        """The exit code, after reading all that is still shown."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self, deadline: float) -> bool:
        readable, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        try:
            data = os.read(self._fd, 65536) if readable else b""
        except OSError:  # the child has gone
            data = b""
        self.text += data.decode("utf-8", "replace")
        return bool(data)
