"""Making the exporter's environment, with programs of the test in place of pip and venv."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from ohmygpu.core.errors import (
    Cancelled,
    ConfigError,
    Conflict,
    ConsentNeeded,
    NetworkError,
    UnsupportedModel,
)
from ohmygpu.core.events import Event
from ohmygpu.core.locks import FileLock
from ohmygpu.core.settings import Settings, load_settings
from ohmygpu.exporter import environment

# What stands in for pip: keeps its arguments, and "downloads" and "installs" a file.
PIP = """
import json, os, sys
from pathlib import Path
folder = Path(os.environ["FAKE_PIP"])
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "config":
    print((folder / "config").read_text() if (folder / "config").exists() else "")
elif (folder / "fails").exists() and (folder / "fails").read_text() in sys.argv:
    sys.exit("ERROR: No matching distribution found for torch")
elif (folder / "waits").exists():
    import time
    time.sleep(60)
elif sys.argv[1] == "download":
    (Path(sys.argv[sys.argv.index("--dest") + 1]) / "torch.whl").write_text("wheel")
"""


class Pip:
    """What the fake pip was asked for, and how it is to behave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        return [call[0] for call in self.calls if call[0] != "config"]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    folder = tmp_path / "pip"
    folder.mkdir()
    monkeypatch.setattr(environment, "_PIP", PIP)
    monkeypatch.setattr(environment, "_NAMES_BUILD", True)
    monkeypatch.setattr(environment, "_VENV_OPTIONS", ("--without-pip",))
    monkeypatch.setenv("FAKE_PIP", str(folder))
    return Pip(folder)


def make(settings: Settings, cancel: threading.Event | None = None) -> list[Event]:
    events: list[Event] = []
    with environment.in_use(settings, events.append, cancel or threading.Event()) as python:
        assert python == environment.find(settings)
    return events


def test_without_consent_both_sizes_are_told_and_nothing_is_made(home: Path) -> None:
    with pytest.raises(ConsentNeeded) as caught:
        environment.check_consent(load_settings(), False, "m has the architecture a")
    assert "290 MB" in caught.value.message
    assert "1.28 GB" in caught.value.message
    assert "--yes" in caught.value.message
    assert '"export": true' in caught.value.message
    assert not (home / "exporter").exists()


def test_consent_is_not_asked_for_twice(pip: Pip) -> None:
    settings = load_settings()
    environment.check_consent(settings, True, "m")
    make(settings)
    environment.check_consent(settings, False, "m")


def test_packages_are_downloaded_then_installed_without_a_network(home: Path, pip: Pip) -> None:
    events = make(load_settings())
    assert pip.verbs() == ["download", "install"]
    download, install = (call for call in pip.calls if call[0] != "config")
    assert set(environment.requirements()) <= set(download) & set(install)
    assert "--no-index" in install
    assert {event.phase for event in events} == {"prepare"}
    assert [path.name for path in (home / "exporter").iterdir() if path.is_dir()] == [
        environment.key()
    ]


def test_an_environment_that_is_there_is_used_as_it_is(pip: Pip) -> None:
    make(load_settings())
    before = len(pip.calls)
    assert make(load_settings()) == []
    assert len(pip.calls) == before


def test_torch_without_cuda_comes_from_its_own_index(pip: Pip) -> None:
    make(load_settings())
    download = next(call for call in pip.calls if call[0] == "download")
    assert any(entry.startswith("torch==") and entry.endswith("+cpu") for entry in download)
    assert download[-1] == load_settings().exporter.torch_index


def test_an_index_that_pip_was_told_is_asked_alone_first(pip: Pip) -> None:
    (pip.folder / "config").write_text("global.index-url='https://mirror/simple'\n")
    make(load_settings())
    assert pip.verbs() == ["download", "install"]
    assert all("--extra-index-url" not in call for call in pip.calls)


def test_a_download_that_fails_says_why_and_leaves_no_environment(pip: Pip) -> None:
    (pip.folder / "fails").write_text("download")
    with pytest.raises(NetworkError, match="No matching distribution found for torch"):
        make(load_settings())
    assert environment.find(load_settings()) is None


def test_what_was_downloaded_before_a_failure_is_there_for_the_next_try(
    home: Path, pip: Pip
) -> None:
    (pip.folder / "fails").write_text("install")
    with pytest.raises(NetworkError):
        make(load_settings())
    (partial,) = (home / "exporter").glob(".partial-*")
    assert (partial / "wheels" / "torch.whl").exists()
    (pip.folder / "fails").unlink()
    make(load_settings())
    assert not partial.exists()


def test_cancelling_ends_pip_at_once(pip: Pip) -> None:
    (pip.folder / "waits").write_text("")
    cancel = threading.Event()

    def sink(event: Event) -> None:
        if event.message.startswith("downloading"):
            cancel.set()

    with pytest.raises(Cancelled), environment.in_use(load_settings(), sink, cancel):
        pytest.fail("it was cancelled")
    assert environment.find(load_settings()) is None


def test_a_python_of_the_users_own_is_used_and_nothing_is_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OHMYGPU_EXPORTER_PYTHON", sys.executable)
    settings = load_settings()
    environment.check_consent(settings, False, "m")
    make(settings)
    assert environment.command(Path(sys.executable))[0] == sys.executable
    assert not (home / "exporter").exists()


def test_a_python_that_is_none_is_an_error_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OHMYGPU_EXPORTER_PYTHON", os.devnull)
    with pytest.raises(ConfigError, match=r"exporter\.python"):
        environment.find(load_settings())


def test_old_and_unfinished_environments_go_and_the_current_one_on_request(
    home: Path, pip: Pip
) -> None:
    make(load_settings())
    old = home / "exporter" / "0123456789abcdef"
    old.mkdir()
    (old / "file").write_bytes(b"1234")
    assert environment.remove(home, current=False) == 4
    assert environment.find(load_settings()) is not None
    assert environment.remove(home, current=True) > 0
    assert environment.find(load_settings()) is None


def test_an_environment_in_use_stays(home: Path, pip: Pip) -> None:
    make(load_settings())
    with FileLock(home / "exporter" / ".lock", shared=True, keep=True):
        assert environment.remove(home, current=False) == 0
        with pytest.raises(Conflict):
            environment.remove(home, current=True)


def test_a_config_that_cannot_be_exported_is_told_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    error = {"code": "unsupported_model", "message": "no cache", "details": {}}
    script.write_text(f"import json\ninput()\nprint(json.dumps({{'error': {error!r}}}))\n")
    monkeypatch.setattr(environment, "SCRIPT", script)
    with pytest.raises(UnsupportedModel, match="no cache"):
        environment.try_config(
            Path(sys.executable), {"model_type": "a"}, lambda event: None, threading.Event()
        )
