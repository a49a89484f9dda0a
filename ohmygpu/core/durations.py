"""Durations as Go writes them, which is how Ollama's clients and settings do."""

from __future__ import annotations

import re

FOREVER_NS = 2**63 - 1
"""The longest duration that Go can hold, about 292 years; Ollama's "for ever"."""

_MAX_CHARACTERS = 100
_PART = re.compile(r"([0-9]*)(?:\.([0-9]*))?([^0-9.]*)")
_UNIT_NS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, micro sign
    "μs": 10**3,  # U+03BC, Greek mu
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}


def parse_go_duration(text: str) -> int:
    """Nanoseconds of `5m`, `1h30m`, `-1.5s`, …, by the rules of Go's time.ParseDuration.

    Raises ValueError with Go's message.
    """
    shown = f'"{text[:40]}"'
    rest = text[1:] if text[:1] in ("+", "-") else text
    if rest == "0":
        return 0
    total = 0
    position = 0
    while position < len(rest) or not rest:
        part = _PART.match(rest, position)
        if part is None or len(rest) > _MAX_CHARACTERS or not (part[1] or part[2]):
            raise ValueError(f"time: invalid duration {shown}")
        whole, fraction, unit = part[1], part[2] or "", part[3]
        if not unit:
            raise ValueError(f'time: missing unit in duration {shown}; write "5m" or a number')
        if unit not in _UNIT_NS:
            raise ValueError(f'time: unknown unit "{unit}" in duration {shown}')
        total += int(whole or 0) * _UNIT_NS[unit]
        total += int(fraction or 0) * _UNIT_NS[unit] // 10 ** len(fraction)
        if total > FOREVER_NS:
            raise ValueError(f"time: invalid duration {shown}")
        position = part.end()
    return -total if text.startswith("-") else total
