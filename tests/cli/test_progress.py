from __future__ import annotations

import io

import pytest

from ohmygpu.cli.progress import Progress
from ohmygpu.core.errors import NetworkError
from ohmygpu.core.events import Event

MB = 1_000_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def test_a_pipe_gets_a_line_per_message_and_every_tenth_of_a_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress() as show:
        show(Event("resolve", "looking up org/tiny"))
        for done in range(101):
            show(Event("download", "m", done_bytes=done * MB, total_bytes=100 * MB))
        show(Event("compile", "compiling org/tiny:q8"))
        show(Event("compile", done_bytes=100 * MB, total_bytes=100 * MB))
        show(Event("done", name="org/tiny"))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "looking up org/tiny"
    assert lines[1] == "downloading 0% (0 B of 100 MB)"
    assert lines[11].startswith("downloading 100% (100 MB of 100 MB")
    assert lines[12] == "compiling org/tiny:q8"
    assert lines[13].startswith("compiling 100%")
    assert len(lines) == 14


def test_a_terminal_gets_one_bar_at_a_time() -> None:
    screen = Terminal()
    with Progress(screen) as show:
        show(Event("download", done_bytes=0, total_bytes=10 * MB))
        show(Event("download", done_bytes=10 * MB, total_bytes=10 * MB))
        show(Event("compile", done_bytes=5 * MB, total_bytes=10 * MB))
        show(Event("compile", done_bytes=10 * MB, total_bytes=10 * MB))
        show(Event("done", name="org/tiny"))
    text = screen.getvalue()
    assert text.endswith("\n")
    first, second = text.strip("\n").split("\n")
    assert "downloading: 100%" in first
    assert "compiling: 100%" in second
    assert "downloading" not in second


def test_a_resumed_download_does_not_count_what_was_there_as_speed() -> None:
    screen = Terminal()
    with Progress(screen) as show:
        show(Event("download", done_bytes=90 * MB, total_bytes=100 * MB))
    assert "90.0M/100M [00:00<?, ?B/s]" in screen.getvalue()


def test_an_error_ends_the_bar_on_a_line_of_its_own() -> None:
    screen = Terminal()

    def fail() -> None:
        with Progress(screen) as show:
            show(Event("download", done_bytes=3 * MB, total_bytes=10 * MB))
            raise NetworkError("the hub is gone")

    with pytest.raises(NetworkError):
        fail()
    assert screen.getvalue().endswith("\n")


def test_a_bar_can_go_back_when_a_file_is_fetched_anew() -> None:
    screen = Terminal()
    with Progress(screen) as show:
        show(Event("download", done_bytes=8 * MB, total_bytes=10 * MB))
        show(Event("download", done_bytes=2 * MB, total_bytes=10 * MB))
    assert "20%" in screen.getvalue().rsplit("\r", 1)[-1]


def test_a_dumb_terminal_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Terminal()
    with Progress(screen) as show:
        show(Event("download", done_bytes=0, total_bytes=10 * MB))
    assert screen.getvalue() == ""
    assert "downloading 0%" in capsys.readouterr().err
