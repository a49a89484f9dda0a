"""Sizes for people, in three digits."""

from __future__ import annotations

from collections.abc import Sequence


def human_bytes(count: float) -> str:
    """`138 MB`, in powers of 1000 as disks and the hub count."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def human_count(count: float) -> str:
    """`135M`, `1.54B`, as models are named."""
    return _scaled(count, ("", "K", "M", "B", "T"), "")


def _scaled(count: float, units: Sequence[str], space: str) -> str:
    value = float(count)
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{_three_digits(value)}{space}{unit}"
        value /= 1000
    return f"{_three_digits(value)}{space}{units[-1]}"


def _three_digits(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 or value == int(value) else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
