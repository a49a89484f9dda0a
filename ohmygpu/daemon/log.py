"""The daemon's log: `daemon.log`, bounded, one line per event whatever a client sent."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from .request_id import REQUEST_ID

MAX_LOG_BYTES = 10 * 1024 * 1024
KEPT_LOGS = 1  # daemon.log.1


class OneLineFormatter(logging.Formatter):
    """Escapes control characters, so that no name or header can forge a line or move a cursor.

    Tracebacks keep their line breaks; their continuation lines are indented.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        record.request_id = REQUEST_ID.get()
        record.message = escaped(record.getMessage())
        text = self.formatMessage(self._stamped(record))
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            text = "\n    ".join([text, *map(escaped, lines)])
        return text

    def _stamped(self, record: logging.LogRecord) -> logging.LogRecord:
        record.asctime = self.formatTime(record)
        return record


def escaped(text: str) -> str:
    r"""`text` with every control character and line separator written as \n, \x1b, \u2028, …."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def set_up_logging(path: Path, *, to_stderr: bool) -> None:
    """Log to `path`, and to the terminal when the daemon runs in one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    handlers: list[logging.Handler] = [
        RotatingFileHandler(
            path, maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8", delay=True
        )
    ]
    if to_stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(OneLineFormatter())
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for noisy in ("asyncio", "httpx", "httpx2", "hypercorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
