"""Reading JSON fields: every value checked for type and range, every refusal naming its field.

Both wire formats build their sampling parameters here, from a table of names. JSON null is the same
as an absent field everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ohmygpu.core.durations import FOREVER_NS, parse_go_duration
from ohmygpu.core.errors import InvalidRequest
from ohmygpu.runtime_api import MAX_STOP_STRINGS, SamplingParams

MAX_MESSAGES = 10_000
MAX_LOGIT_BIASES = 10_000
MAX_CONTEXT_TOKENS = 4 * 1024 * 1024
ROLES = {  # as both APIs write them → as chat templates know them
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# a field that is accepted for some values: (whether a value asks for nothing, what to say if not)
Neutral = tuple[Callable[[Any], bool], str]
_INTEGERS = frozenset({"top_k", "repetition_window", "seed", "max_tokens"})


def refuse(param: str, reason: str) -> InvalidRequest:
    """The error for a field: its name, then what is wrong with it."""
    return InvalidRequest(f"{param}: {reason}", param=param)


def check_neutral(param: str, value: Any, rule: Neutral, model: str = "") -> None:
    """Raise InvalidRequest if a value asks for what is not supported.

    A reason "does not support …" is about the model; clients look for that sentence.
    """
    is_neutral, reason = rule
    if is_neutral(value):
        return
    if reason.startswith("does not support"):
        raise InvalidRequest(f'"{model}" {reason}', param=param)
    raise refuse(param, reason)


# --- single values -------------------------------------------------------------------------------


def string(value: Any, param: str) -> str:
    """A string of valid Unicode (half a surrogate pair, which JSON can write, is refused)."""
    if not isinstance(value, str):
        raise refuse(param, f"must be a string, not {kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise refuse(param, f"has half a surrogate pair at character {error.start}") from error
    return value


def boolean(value: Any, param: str) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise refuse(param, f"must be true or false, not {kind(value)}")
    return value


def integer(value: Any, param: str, low: int = -(2**63), high: int = 2**64 - 1) -> int:
    """A whole number within bounds; 3.0 counts as one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        shown = f"{value:g}" if isinstance(value, float) else kind(value)
        raise refuse(param, f"must be a whole number, not {shown}")
    if value < low:
        raise refuse(param, f"must be at least {low}")
    if value > high:
        raise refuse(param, f"must be at most {high}")
    return value


def number(value: Any, param: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse(param, f"must be a number, not {kind(value)}")
    if not -1e300 < value < 1e300:  # also refuses NaN, and integers too large for a float
        raise refuse(param, "must be a finite number")
    return float(value)


def listing(value: Any, param: str, most: int) -> list[Any]:
    """A list of at most `most` entries."""
    if not isinstance(value, list):
        raise refuse(param, f"must be a list, not {kind(value)}")
    if len(value) > most:
        raise refuse(param, f"has {len(value)} entries; {most} is the most")
    return value


def mapping(value: Any, param: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise refuse(param, f"must be an object, not {kind(value)}")
    return value


def kind(value: Any) -> str:
    """What JSON calls a value, for messages."""
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, "", [] or {}."""
    return value is None or value in ("", [], {})


# --- compound values -----------------------------------------------------------------------------


def stop_strings(value: Any, param: str) -> tuple[str, ...]:
    """Stop strings, given as one string or a list."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise refuse(param, f"must be a string or a list of strings, not {kind(value)}")
    entries = listing(value, param, MAX_STOP_STRINGS)
    return tuple(string(entry, f"{param}[{index}]") for index, entry in enumerate(entries))


def logit_bias(value: Any, param: str) -> dict[int, float]:
    """Biases by token id, whose keys JSON writes as strings."""
    entries = mapping(value, param)
    if len(entries) > MAX_LOGIT_BIASES:
        raise refuse(param, f"has {len(entries)} entries; {MAX_LOGIT_BIASES} is the most")
    biases = {}
    for key, bias in entries.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11):
            raise refuse(param, f"has the key {key[:40]!r}; keys are token ids")
        biases[int(key)] = number(bias, f"{param}.{key}")
    return biases


def token_ids(value: Any, param: str) -> tuple[int, ...]:
    """Token ids; whether the vocabulary has them is the runtime's to say."""
    entries = listing(value, param, MAX_CONTEXT_TOKENS)
    if not all(type(entry) is int and 0 <= entry < 2**31 for entry in entries):
        raise refuse(param, "must be a list of token ids")
    return tuple(entries)


def parse_keep_alive(value: Any, param: str = "keep_alive") -> float | None:
    """Seconds a model stays loaded after its last request; None when absent.

    As Ollama reads it: a number counts seconds, a string is one of Go's durations ("5m", "1h30m",
    "300ms"; a bare "5" has no unit and is refused), and anything negative means for ever (inf).
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            nanoseconds = parse_go_duration(value)
        except ValueError as error:
            raise refuse(param, str(error)) from error
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        nanoseconds = FOREVER_NS if abs(value) >= 2**34 else int(value * 10**9)
        nanoseconds = -1 if value < 0 else nanoseconds
    else:
        raise refuse(param, f"must be a number of seconds or a duration, not {kind(value)}")
    if nanoseconds < 0 or nanoseconds >= FOREVER_NS:
        return math.inf
    return nanoseconds / 10**9


# --- sampling ------------------------------------------------------------------------------------


def sampling(
    body: Mapping[str, Any],
    names: Mapping[str, str],
    defaults: Mapping[str, Any],
    prefix: str = "",
) -> SamplingParams:
    """SamplingParams from the fields of `body` that `names` lists (field → parameter).

    `defaults` are parameters where `body` gives none; of two fields for one parameter the one
    listed first wins. `prefix` stands before the field in messages ("options."). Raises
    InvalidRequest naming the field as the client wrote it.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for field, parameter in names.items():
        if body.get(field) is None or parameter in values:
            continue
        values[parameter] = _parameter(parameter, body[field], prefix + field)
        origin[parameter] = prefix + field
    for parameter, value in defaults.items():
        values.setdefault(parameter, int(value) if parameter in _INTEGERS else value)
    try:
        return SamplingParams(**values)
    except InvalidRequest as error:
        parameter = str(error.details.get("param"))
        field = origin.get(parameter, parameter)
        message = error.message.replace(parameter, field, 1)
        raise InvalidRequest(message, param=field) from error


def _parameter(parameter: str, value: Any, param: str) -> Any:
    if parameter == "stop":
        return stop_strings(value, param)
    if parameter == "logit_bias":
        return logit_bias(value, param)
    if parameter in _INTEGERS:
        return integer(value, param)
    return number(value, param)
