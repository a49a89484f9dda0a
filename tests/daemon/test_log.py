from __future__ import annotations

import logging
import sys

from ohmygpu.daemon.log import OneLineFormatter, escaped
from ohmygpu.daemon.request_id import REQUEST_ID


def record(message: str, exc_info: bool = False) -> logging.LogRecord:
    info = sys.exc_info() if exc_info else None
    return logging.LogRecord("test", logging.INFO, __file__, 1, "model %s", (message,), info)


def test_what_a_client_sends_cannot_forge_a_line_or_move_the_cursor() -> None:
    text = OneLineFormatter().format(record("x\r\n2026 ERROR forged\x1b[2J\u2028\x85"))
    assert "\n" not in text
    assert "\x1b" not in text
    assert r"x\r\n2026 ERROR forged\x1b[2J\u2028\x85" in text


def test_ordinary_text_of_any_language_stays_readable() -> None:
    assert escaped("modèle 模型 😀") == "modèle 模型 😀"


def test_lines_carry_the_requests_id_and_tracebacks_are_indented() -> None:
    token = REQUEST_ID.set("req_1")
    try:
        raise ValueError("a\nb")
    except ValueError:
        text = OneLineFormatter().format(record("x", exc_info=True))
    finally:
        REQUEST_ID.reset(token)
    first, *rest = text.split("\n")
    assert "[req_1] model x" in first
    assert rest
    assert all(line.startswith("    ") for line in rest)
