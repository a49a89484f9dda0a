"""Data to stdout, everything else to stderr; times and tables for people."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

import click

# A terminal obeys control characters, and a model can be made to print any. Each becomes its
# picture (ESC → ␛), so no escape sequence survives; line feeds and tabs stay.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def prepare_streams() -> None:
    """Let no character that the terminal's encoding lacks end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def harmless(text: str) -> str:
    """Text with its control characters made visible, fit for a terminal."""
    return text.translate(_PICTURES)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that understands cursor movement."""
    with contextlib.suppress(ValueError):  # a closed stream
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def write(text: str) -> None:
    """Write data to stdout at once: untouched into a pipe or file, harmless on a terminal."""
    if sys.stdout is None:
        return
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def line(text: str = "") -> None:
    """Write a line of data to stdout."""
    click.echo(harmless(text))


def note(text: str) -> None:
    """Write a line for the user, not for a program, to stderr."""
    click.echo(harmless(text), err=True)


def write_json(data: Any) -> None:
    """Write JSON to stdout."""
    click.echo(json.dumps(data, indent=2))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write columns under headers to stdout."""
    cells = [[*headers], *([harmless(cell) for cell in row] for row in rows)]
    widths = [max(display_width(row[index]) for row in cells) for index in range(len(headers))]
    for row in cells:
        padded = (
            cell + " " * (width - display_width(cell))
            for cell, width in zip(row, widths, strict=True)
        )
        line("   ".join(padded).rstrip())


def fields(rows: Sequence[tuple[str, str]]) -> None:
    """Write named values, one a line, to stdout."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        line(f"{name:<{width}}   {value}".rstrip())


def display_width(text: str) -> int:
    """Terminal columns that text takes: 2 for wide characters, 0 for combining ones."""
    return sum(
        0
        if unicodedata.combining(character)
        else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def human_duration(seconds: float) -> str:
    """`4 seconds`, `3 minutes`, `2 hours`, `5 days`: the largest whole unit."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return _plural(int(seconds // length), unit)
    return _plural(max(0, int(seconds)), "second")


def human_age(timestamp: str, now: datetime | None = None) -> str:
    """`2 hours ago` from an RFC 3339 time; the text itself when it is no such time."""
    try:
        then = datetime.fromisoformat(timestamp)
    except ValueError:
        return timestamp
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    age_s = ((now or datetime.now(UTC)) - then).total_seconds()
    return "just now" if age_s < 5 else f"{human_duration(age_s)} ago"


def _plural(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
