"""Reading a model's `config.json`: typed fields, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from ohmygpu.core.errors import CorruptFile


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; `default` when absent or null. Raises CorruptFile otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CorruptFile(f"the model's config has {key} = {value!r}; a positive integer is needed")
    return value


def count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Zero or a positive integer; `default` when absent or null. Raises CorruptFile otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CorruptFile(f"the model's config has {key} = {value!r}; an integer >= 0 is needed")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; `default` when absent or null. Raises CorruptFile otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
        raise CorruptFile(f"the model's config has {key} = {value!r}; a positive number is needed")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A boolean; `default` when absent or null. Raises CorruptFile otherwise."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CorruptFile(f"the model's config has {key} = {value!r}; true or false is needed")
    return value


def numbers(config: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    """A list of `count` positive numbers. Raises CorruptFile when it is anything else."""
    value = config.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != count:
        found = f"{len(value)} values" if isinstance(value, (list, tuple)) else repr(value)
        raise CorruptFile(f"the model's config has {key} = {found}; {count} numbers are needed")
    return tuple(number({key: item}, key) for item in value)
