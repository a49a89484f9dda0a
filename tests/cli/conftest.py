"""A home folder of the test's own, and a fake daemon that serves it."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ohmygpu.cli import main
from tests.cli.fake_daemon import FakeDaemon


@pytest.fixture(autouse=True)
def no_daemon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings under which no daemon answers: nothing listens at port 1."""
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "1")


@pytest.fixture
def fake_daemon(
    home: Path, no_daemon: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeDaemon]:
    with FakeDaemon(home) as daemon:
        monkeypatch.setenv("OHMYGPU_SERVER_PORT", str(daemon.port))
        yield daemon


@dataclass
class Result:
    """What a command line did."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def omg(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs a command line in this process, without a terminal."""

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capfd.readouterr()
        code = main(arguments)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


def spawn(arguments: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a process of its own."""
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "ohmygpu", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
