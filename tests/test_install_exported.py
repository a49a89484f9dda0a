"""Pulling a model that no family builds: consent, the trial, what is refused before its weights."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.convert import process
from ohmygpu.core import hardware, providers
from ohmygpu.core.errors import ConsentNeeded, InvalidRequest, OutOfMemory, UnsupportedModel
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import Settings, load_settings
from ohmygpu.exporter import environment
from ohmygpu.install import collect_garbage, pull
from ohmygpu.verify import verify
from tests.fake_pull import COMPILER, FakeProvider

CONFIG: dict[str, Any] = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}
OPT = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights" * 1000,
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeProvider:
    chosen = FakeProvider(OPT)
    monkeypatch.setattr(providers, "provider_for", lambda *_: chosen)
    monkeypatch.setattr(process, "COMPILER", (sys.executable, "-c", COMPILER))
    monkeypatch.setattr(hardware, "target", lambda *_: "cpu")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return chosen


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configs that were tried; the environment is this Python, and exports everything."""
    configs: list[dict[str, Any]] = []

    @contextmanager
    def in_use(settings: Settings, sink: EventSink, cancel: threading.Event) -> Iterator[Path]:
        yield Path(sys.executable)

    def try_config(python: Path, config: dict[str, Any], *_: object) -> None:
        configs.append(config)

    monkeypatch.setattr(environment, "in_use", in_use)
    monkeypatch.setattr(environment, "try_config", try_config)
    return configs


def test_without_consent_nothing_is_downloaded(fake: FakeProvider) -> None:
    with pytest.raises(ConsentNeeded, match="org/m has the architecture opt"):
        pull("org/m", load_settings())
    assert fake.fetches == 0


def test_with_consent_the_model_is_tried_then_downloaded_and_installed(
    fake: FakeProvider, tried: list[dict[str, Any]], home: Path
) -> None:
    record = pull("org/m", load_settings(), export=True)
    assert tried == [CONFIG]
    assert (record.recipe, record.variant) == ("f32", "f32")
    assert Repository(home).find("org/m").compiled_key == record.compiled_key


def test_an_installed_model_needs_no_consent_again(
    fake: FakeProvider, tried: list[dict[str, Any]]
) -> None:
    first = pull("org/m", load_settings(), export=True)
    assert pull("org/m", load_settings()) == first
    assert len(tried) == 1


def test_a_model_that_fails_the_trial_is_refused_before_its_weights(
    fake: FakeProvider, tried: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedModel("its cache is not keys and values")

    monkeypatch.setattr(environment, "try_config", refuse)
    with pytest.raises(UnsupportedModel, match="keys and values"):
        pull("org/m", load_settings(), export=True)
    assert fake.fetches == 0
    assert Repository(home).records() == []


def test_a_state_that_is_not_keys_and_values_is_refused_without_asking(fake: FakeProvider) -> None:
    fake.config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    with pytest.raises(UnsupportedModel, match="cannot be exported"):
        pull("org/m", load_settings(), export=True)
    assert fake.fetches == 0


@pytest.mark.parametrize(
    ("arguments", "param"), [({"recipe": "q8"}, "recipe"), ({"verify": True}, "verify")]
)
def test_what_exported_models_do_not_have_is_refused_by_name(
    fake: FakeProvider, arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pull("org/m", load_settings(), export=True, **arguments)
    assert caught.value.details["param"] == param
    assert fake.fetches == 0


def test_a_model_too_large_to_export_is_refused_before_its_weights(
    fake: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_available_bytes", lambda: 1 << 30)
    with pytest.raises(OutOfMemory, match="exporting the model takes about"):
        pull("org/m", load_settings(), export=True)
    assert fake.fetches == 0


def test_the_exporter_is_part_of_the_key(
    fake: FakeProvider, tried: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pull("org/m", load_settings(), export=True)
    monkeypatch.setattr(environment, "EXPORTER_VERSION", environment.EXPORTER_VERSION + 1)
    assert pull("org/n", load_settings(), export=True).compiled_key != first.compiled_key


def test_an_exported_model_is_not_measured(
    fake: FakeProvider, tried: list[dict[str, Any]], home: Path
) -> None:
    record = pull("org/m", load_settings(), export=True)
    path = Repository(home).compiled_path(record.compiled_key) / "compile.json"
    graph = {"exporter": "x", "inputs": [], "cache": [], "last_only": True, "batches": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exported": graph}))
    with pytest.raises(InvalidRequest, match="no difference to measure"):
        verify("org/m", load_settings())


def test_the_events_name_the_export(fake: FakeProvider, tried: list[dict[str, Any]]) -> None:
    events: list[Event] = []
    pull("org/m", load_settings(), export=True, sink=events.append)
    assert any(event.message == "exporting org/m:f32" for event in events)


def test_gc_removes_environments_of_other_versions(home: Path) -> None:
    (home / "models").mkdir(parents=True)
    old = home / "exporter" / "0123456789abcdef"
    old.mkdir(parents=True)
    (old / "file").write_bytes(b"1234")
    assert collect_garbage(load_settings()).freed_bytes == 4
    assert not old.exists()
