from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ohmygpu.cli.output import (
    display_width,
    fields,
    harmless,
    human_age,
    human_duration,
    table,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 seconds"), (1, "1 second"), (90, "1 minute"), (7200, "2 hours"), (200_000, "2 days")],
)
def test_durations_show_their_largest_unit(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


def test_ages_count_from_any_time_zone_and_show_odd_text_as_it_is() -> None:
    now = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
    assert human_age("2026-11-01T12:00:00+02:00", now) == "2 hours ago"
    assert human_age("2026-11-01T11:59:59Z", now) == "just now"
    assert human_age("", now) == ""


def test_no_escape_sequence_reaches_a_terminal_intact() -> None:
    text = harmless("a\x1b]0;owned\x07b\x9b2Jc\rd\x08e\x7f\nf\tg")
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\r", "\x08", "\x7f"}
    assert text.startswith("a␛]0;owned␇b")
    assert text.endswith("\nf\tg")
    assert harmless("日本語 emoji 🙂 é") == "日本語 emoji 🙂 é"


def test_columns_line_up_under_wide_and_combining_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert display_width("日本") == 4
    assert display_width("e\u0301") == 1
    table(["NAME", "SIZE"], [("日本", "1"), ("abc", "2")])
    assert capsys.readouterr().out == "NAME   SIZE\n日本   1\nabc    2\n"


def test_named_values_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    fields([("url", "x"), ("version", "")])
    assert capsys.readouterr().out == "url       x\nversion\n"
