"""Parsers of single setting values: durations, sizes, numbers, addresses.

Each takes what a TOML file, an environment variable or a flag gave and returns the value, or raises
ValueError with the rest of a sentence that starts with the setting's name ("must be …").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from .durations import parse_go_duration

_MAX_CHARACTERS = 2048
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})")
_SIZE = re.compile(r"([0-9]{1,18})\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9_.:%\-\[\]]{1,253}")

Parser = Callable[[Any], Any]


def parse_duration(value: str | float) -> float:
    """Seconds, `inf` for ever: what Ollama's OLLAMA_KEEP_ALIVE accepts. Raises ValueError.

    A number, or text with a number, is seconds; other text is a duration of Go's: `5m`, `1h30m`,
    `1.5h`. Anything negative means for ever.
    """
    wrong = ValueError('must be a duration: seconds, "5m", "1h30m", 0, or -1 for ever')
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    if not isinstance(value, str):
        seconds = float(value) if abs(value) < 1e18 else math.nan
        if math.isnan(seconds):
            raise wrong
        return math.inf if seconds < 0 else seconds
    text = value.strip()
    if _NUMBER.fullmatch(text):
        seconds = float(text)
        return math.inf if seconds < 0 else seconds
    try:
        nanoseconds = parse_go_duration(text)
    except ValueError:
        raise wrong from None
    return math.inf if nanoseconds < 0 else nanoseconds / 10**9


def parse_bytes(value: str | int) -> int:
    """Bytes from a number or from text such as `64MiB`, `2 GB` or `512k`. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError('must be a size in bytes, or like "64MiB"')
    unit = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return int(int(match[1]) * (1000 if match[2] and not match[3] else 1024) ** unit)


def integer(low: int, high: int) -> Parser:
    """Parser of a whole number in low..high."""

    def parse(value: Any) -> int:
        text = str(value).strip() if isinstance(value, str) else ""
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            value = int(text)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def size(low: int, high: int) -> Parser:
    """Parser of a number of bytes in low..high."""

    def parse(value: Any) -> int:
        number = parse_bytes(value)
        if not low <= number <= high:
            raise ValueError(f"must be from {low} to {high} bytes")
        return number

    return parse


def seconds(low: float, high: float) -> Parser:
    """Parser of a number of seconds in low..high, durations as `10s` included."""

    def parse(value: Any) -> float:
        number = parse_duration(value)
        if not low <= number <= high:
            raise ValueError(f"must be from {low:g} to {high:g} seconds")
        return number

    return parse


def duration_text(value: Any) -> str:
    """Parser of a duration that keeps the text as it was written."""
    parse_duration(value)
    return value.strip() if isinstance(value, str) else f"{value}"


def boolean(value: Any) -> bool:
    """Parser of true/false, and yes/no, on/off, 1/0 in text."""
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ValueError("must be true or false")


def choice(*options: str) -> Parser:
    """Parser of one of `options`, any case; returns it as spelt there."""
    spelling = {option.lower(): option for option in options}

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value.strip().lower() not in spelling:
            raise ValueError(f"must be one of {', '.join(options)}")
        return spelling[value.strip().lower()]

    return parse


def text(value: Any) -> str:
    """Parser of text on one line."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("must be text on one line")
    return value.strip()


def strings(value: Any) -> tuple[str, ...]:
    """Parser of a list of strings, or of text with commas between them."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)) or len(value) > 1000:
        raise ValueError("must be a list of strings")
    for entry in value:
        if not isinstance(entry, str) or not entry.isprintable() or " " in entry or not entry:
            raise ValueError("must be a list of strings without spaces")
        if len(entry) > _MAX_CHARACTERS:
            raise ValueError(f"must be a list of strings of at most {_MAX_CHARACTERS} characters")
    return tuple(value)


def host(value: Any) -> str:
    """Parser of a host name or an IP address to listen on."""
    text = value.strip() if isinstance(value, str) else ""
    if not _HOST.fullmatch(text):
        raise ValueError("must be a host name or an IP address, like 127.0.0.1")
    return text


def url(*schemes: str, credentials: bool = False) -> Parser:
    """Parser of an address with one of `schemes`; returns it without a trailing slash.

    A user name or password inside it is refused unless `credentials`.
    """

    def parse(value: Any) -> str:
        wanted = f"must be an address that starts with {' or '.join(s + '://' for s in schemes)}"
        text = value.strip() if isinstance(value, str) else ""
        if not text or len(text) > _MAX_CHARACTERS or not text.isprintable() or " " in text:
            raise ValueError(wanted)
        try:
            parts = urlsplit(text)
            has_place = bool(parts.hostname) or parts.scheme == "file"
            _ = parts.port  # out of range raises
        except ValueError:
            raise ValueError(wanted) from None
        if parts.scheme not in schemes or not has_place:
            raise ValueError(wanted)
        if parts.query or parts.fragment:
            raise ValueError("must be an address without '?' and '#'")
        if (parts.username or parts.password) and not credentials:
            raise ValueError("must not contain a user name or password")
        return text.rstrip("/")

    return parse


def mask_credentials(text: str) -> str:
    """`text` with the user name and password of an address inside it replaced by `***`."""
    head, separator, rest = text.partition("://")
    authority, slash, path = rest.partition("/")
    if not separator or "@" not in authority:
        return text
    return f"{head}://***@{authority.rpartition('@')[2]}{slash}{path}"
