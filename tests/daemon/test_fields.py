from __future__ import annotations

import math
from typing import Any

import pytest

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.daemon import fields


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0),
        (42, 42),
        (42.5, 42.5),
        (-1, math.inf),
        (-3.14, math.inf),
        (1e30, math.inf),
        (10**400, math.inf),
        (math.inf, math.inf),
        ("42m", 2520),
        ("1h30m", 5400),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1.s", 1),
        ("+3s", 3),
        ("300ms", 0.3),
        ("7us", 7e-6),
        ("7µs", 7e-6),
        ("7μs", 7e-6),
        ("7ns", 7e-9),
        ("0", 0),
        ("-0", 0),
        ("0s", 0),
        ("-1m", math.inf),
        ("-1ns", math.inf),
    ],
)
def test_keep_alive_reads_seconds_and_gos_durations(value: Any, seconds: float | None) -> None:
    assert fields.parse_keep_alive(value) == seconds


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("5", 'missing unit in duration "5"'),
        ("-1", 'missing unit in duration "-1"'),
        ("1m5", "missing unit"),
        ("1x", 'unknown unit "x" in duration "1x"'),
        ("1h 3m", "unknown unit"),
        ("5M", "unknown unit"),
        ("", 'invalid duration ""'),
        ("-", "invalid duration"),
        ("s", "invalid duration"),
        (".s", "invalid duration"),
        (" 5m", "invalid duration"),
        ("forever", "invalid duration"),
        ("9999999999h", "invalid duration"),
        ("1" * 1_000_000, "invalid duration"),
        ("1m" * 500_000, "invalid duration"),
        (math.nan, "must be a number"),
        (True, "not a boolean"),
        ([5], "not a list"),
        ({}, "not an object"),
    ],
)
def test_keep_alive_refuses_what_go_refuses(value: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fields.parse_keep_alive(value)
    assert reason in caught.value.message
    assert caught.value.details["param"] == "keep_alive"
    assert len(caught.value.message) < 200


def test_whole_floats_are_integers_and_booleans_are_not() -> None:
    assert fields.integer(3.0, "n") == 3
    assert isinstance(fields.integer(3.0, "n"), int)
    bad: list[Any] = [3.5, True, "3", None, [], math.nan, math.inf]
    for value in bad:
        with pytest.raises(InvalidRequest, match="n: must be a whole number"):
            fields.integer(value, "n")
    with pytest.raises(InvalidRequest, match="n: must be at most"):
        fields.integer(10**400, "n")
    with pytest.raises(InvalidRequest, match="n: must be at least 1"):
        fields.integer(0, "n", low=1)


def test_numbers_are_finite() -> None:
    assert fields.number(2, "t") == 2.0
    for value in (math.nan, math.inf, -math.inf, 10**400, -(10**400), True, "1", None):
        with pytest.raises(InvalidRequest, match="t: must be a"):
            fields.number(value, "t")


def test_texts_are_valid_unicode() -> None:
    assert fields.string("é🙂", "x") == "é🙂"
    with pytest.raises(InvalidRequest, match="half a surrogate pair at character 1"):
        fields.string("é\ud83d", "x")
    with pytest.raises(InvalidRequest, match="must be a string, not null"):
        fields.string(None, "x")


def test_refusals_name_the_field_as_the_client_wrote_it() -> None:
    names = {"repeat_last_n": "repetition_window"}
    with pytest.raises(
        InvalidRequest, match=r"options\.repeat_last_n must be between -1"
    ) as caught:
        fields.sampling({"repeat_last_n": -2}, names, {}, prefix="options.")
    assert caught.value.details["param"] == "options.repeat_last_n"


def test_logit_bias_keys_are_token_ids() -> None:
    assert fields.logit_bias({"5": 1, "7": -2.5}, "logit_bias") == {5: 1.0, 7: -2.5}
    for key in ("x", "-1", "1.0", "", "٣", "1" * 50):
        with pytest.raises(InvalidRequest, match="keys are token ids"):
            fields.logit_bias({key: 1}, "logit_bias")
    with pytest.raises(InvalidRequest, match=r"logit_bias\.5: must be a number"):
        fields.logit_bias({"5": "x"}, "logit_bias")
