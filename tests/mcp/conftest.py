from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.fake_daemon import FakeDaemon


@pytest.fixture
def fake_daemon(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(home) as daemon:
        monkeypatch.setenv("OHMYGPU_SERVER_PORT", str(daemon.port))
        yield daemon
