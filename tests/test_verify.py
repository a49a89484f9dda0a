"""Measuring installed models: the steps around the comparison, with a comparison made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ohmygpu import verify as module
from ohmygpu.convert import process, recipes
from ohmygpu.core import hardware, providers
from ohmygpu.core.errors import (
    Cancelled,
    Conflict,
    CorruptFile,
    DiskFull,
    InvalidRequest,
    ModelNotFound,
    OhMyGPUError,
    OutOfMemory,
)
from ohmygpu.core.events import Event
from ohmygpu.core.fidelity import Fidelity, load_fidelity
from ohmygpu.core.records import COMPILE_FILE, CompiledModel, InstallRecord
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import load_settings
from ohmygpu.install import collect_garbage, pull, remove
from ohmygpu.verify import is_measured, verify
from tests.core.test_fidelity import FIDELITY
from tests.fake_pull import COMPILER, GGUF, FakeProvider

NAME = "org/tiny-gguf"
MEASURER = """
import json, os, pathlib, sys, threading
job = json.loads(sys.stdin.readline())
def watch():
    sys.stdin.read()
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
reference = json.loads((pathlib.Path(job["reference"]) / "compile.json").read_text())
with open(os.environ["FAKE_LOG"], "a") as log:
    print("measure", job["graph"], reference["recipe"], reference["target"], file=log)
print(json.dumps({"done_bytes": 1, "total_bytes": 2}), flush=True)
mode = os.environ.get("FAKE_MEASURER")
if mode == "hang":
    threading.Event().wait()
if mode == "killed":
    os.kill(os.getpid(), 9)
if mode == "refuse":
    print(json.dumps({"error": {"code": "out_of_memory", "message": "too large"}}), flush=True)
    sys.exit(1)
print(json.dumps({"fidelity": json.loads(os.environ["FAKE_FIDELITY"])}), flush=True)
"""


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeProvider:
    chosen = FakeProvider(GGUF)
    monkeypatch.setattr(providers, "provider_for", lambda *_: chosen)
    monkeypatch.setattr(process, "COMPILER", (sys.executable, "-c", COMPILER))
    monkeypatch.setattr(module, "WORKER", (sys.executable, "-c", MEASURER))
    monkeypatch.setattr(hardware, "target", lambda *_: "cpu")
    monkeypatch.setattr(recipes, "SMALL_FLOAT_BYTES", 0)  # as if the model were a large one
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_FIDELITY", json.dumps(asdict(FIDELITY)))
    return chosen


@pytest.fixture
def store(home: Path) -> Repository:
    return Repository(home)


@pytest.fixture
def folder(store: Repository) -> Path:
    """Of an installed model."""
    return store.compiled_path(do_pull().compiled_key)


def do_pull(**named: Any) -> InstallRecord:
    return pull("Org/Tiny-GGUF", load_settings(), **named)


def do_verify(**named: Any) -> dict[str, Fidelity]:
    return verify(NAME, load_settings(), **named)


def log(tmp_path: Path) -> list[str]:
    lines = (tmp_path / "log").read_text().splitlines()
    return [line if line.startswith("measure") else line.split()[0] for line in lines]


def change(folder: Path, **fields: Any) -> None:
    """Rewrite what compile.json says."""
    path = folder / COMPILE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_clean(store: Repository) -> None:
    """Nothing temporary is left, and no lock or lease is held."""
    assert not list(store.compiled_dir.glob(".tmp-*"))
    assert list(store.partial_dir.iterdir()) == []


def test_a_model_is_measured_against_its_source_in_float32(
    store: Repository, folder: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    assert do_verify(sink=events.append) == {"model.onnx": FIDELITY}
    assert load_fidelity(folder) == {"model.onnx": FIDELITY}
    assert log(tmp_path) == ["fetch", "compile", "compile", "measure model.onnx f32 cpu"]
    phases = list(dict.fromkeys(event.phase for event in events))
    assert phases == ["verify", "compile", "measure", "done"]
    assert events[-1].name == "Org/Tiny-GGUF"
    assert any("float32" in event.message and "temporary" in event.message for event in events)
    assert (events[-2].done_bytes, events[-2].total_bytes) == (1, 2)
    assert_clean(store)
    assert store.gc().freed_bytes == 0


def test_every_graph_of_a_model_is_measured(folder: Path, tmp_path: Path) -> None:
    (folder / "prompts.onnx").write_bytes(b"graph")
    sizes = {name: (folder / name).stat().st_size for name in ("model.onnx", "prompts.onnx")}
    change(folder, files=sizes)
    assert list(do_verify()) == ["model.onnx", "prompts.onnx"]
    assert log(tmp_path)[-1] == "measure prompts.onnx f32 cpu"


def test_a_float32_compile_is_its_own_reference(store: Repository, tmp_path: Path) -> None:
    record = do_pull(recipe="f32")
    do_verify()
    assert log(tmp_path) == ["fetch", "compile", "measure model.onnx f32 cpu"]
    assert is_measured(store, record)


def test_measuring_changes_nothing_of_the_install(store: Repository, folder: Path) -> None:
    before = store.find(NAME)
    do_verify()
    assert store.find(NAME) == before
    assert do_pull() == before
    (folder / "model.onnx").unlink()  # so that the pull compiles anew
    assert do_pull() == before


def test_a_pull_measures_once(store: Repository, fake: FakeProvider, tmp_path: Path) -> None:
    events: list[Event] = []
    record = do_pull(verify=True, sink=events.append)
    assert is_measured(store, record)
    assert [event.phase for event in events][-2:] == ["measure", "done"]
    assert do_pull(verify=True) == record
    assert log(tmp_path).count("measure model.onnx f32 cpu") == 1
    do_verify()
    assert log(tmp_path).count("measure model.onnx f32 cpu") == 2


def test_a_pull_measures_again_what_was_measured_on_another_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_pull(verify=True)
    monkeypatch.setattr(module, "TEXT_VERSION", 99)
    do_pull(verify=True)
    assert log(tmp_path).count("measure model.onnx f32 cpu") == 2


def test_sources_that_were_freed_are_named_and_fetched_again_by_a_pull(
    store: Repository, folder: Path, fake: FakeProvider
) -> None:
    collect_garbage(load_settings(), sources=True)
    with pytest.raises(
        Conflict,
        match=r"tiny\.Q4_1\.gguf was freed.*omg model pull Org/Tiny-GGUF --recipe exact --verify",
    ):
        do_verify()
    assert load_fidelity(folder) == {}
    assert do_pull(verify=True) == store.find(NAME)
    assert load_fidelity(folder) == {"model.onnx": FIDELITY}
    assert fake.fetches == 2


def test_a_source_that_was_damaged_on_the_disk_is_not_measured_against(
    store: Repository, folder: Path, fake: FakeProvider
) -> None:
    (blob,) = store.blobs_dir.iterdir()
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(CorruptFile, match="damaged on the disk"):
        do_verify()
    assert load_fidelity(folder) == {}
    do_pull(verify=True)
    assert load_fidelity(folder) == {"model.onnx": FIDELITY}
    assert fake.fetches == 2


def test_sources_that_are_not_to_be_kept_go_after_the_measurement(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OHMYGPU_MODELS_KEEP_SOURCE", "false")
    record = do_pull(verify=True)
    assert is_measured(store, record)
    assert list(store.blobs_dir.iterdir()) == []


def test_too_little_disk_is_refused_with_both_numbers_before_anything_is_written(
    store: Repository, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder, parameters=10**9)
    usage = namedtuple("usage", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: usage(4 * 10**9, 1))
    with pytest.raises(DiskFull, match="float32 copy that Org/Tiny-GGUF:q4_1 is") as caught:
        do_verify()
    assert caught.value.details["free_bytes"] == 4 * 10**9
    assert 4 * 10**9 < caught.value.details["needed_bytes"] < 4.2 * 10**9
    assert log(tmp_path).count("compile") == 1
    assert_clean(store)


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    with pytest.raises(ModelNotFound):
        verify("org/absent", load_settings())
    change(folder, kind="encoder")
    with pytest.raises(InvalidRequest, match="vectors"):
        do_verify()
    (folder / "model.onnx").unlink()
    with pytest.raises(CorruptFile, match="pull Org/Tiny-GGUF again"):
        do_verify()


@pytest.mark.parametrize(("mode", "error"), [("refuse", OutOfMemory), ("killed", OutOfMemory)])
def test_a_measurement_that_fails_leaves_the_model_as_it_was(
    store: Repository,
    folder: Path,
    mode: str,
    error: type[OhMyGPUError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    do_verify()
    monkeypatch.setenv("FAKE_MEASURER", mode)
    with pytest.raises(error):
        do_verify()
    assert load_fidelity(folder) == {"model.onnx": FIDELITY}
    assert_clean(store)


def test_a_pull_that_cannot_measure_says_that_the_model_is_installed(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MEASURER", "refuse")
    events: list[Event] = []
    with pytest.raises(OutOfMemory, match="is installed but could not be measured: too large"):
        do_pull(verify=True, sink=events.append)
    assert events[-1].phase == "error"
    assert store.find(NAME).name == "Org/Tiny-GGUF"


@pytest.mark.parametrize("phase", ["compile", "measure"])
def test_a_cancel_ends_it_at_once_and_leaves_nothing(
    store: Repository, folder: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_COMPILER" if phase == "compile" else "FAKE_MEASURER", "hang")
    cancel = threading.Event()

    def sink(event: Event) -> None:
        if event.phase == phase and event.done_bytes:
            cancel.set()

    with pytest.raises(Cancelled):
        do_verify(sink=sink, cancel=cancel)
    assert load_fidelity(folder) == {}
    assert_clean(store)


def test_removing_the_model_meanwhile_takes_its_files_only_afterwards(
    store: Repository, folder: Path
) -> None:
    def sink(event: Event) -> None:
        if event.phase == "measure" and event.done_bytes:
            remove(NAME, load_settings())
            assert folder.is_dir()

    do_verify(sink=sink)
    assert store.records() == []
    store.gc()
    assert not folder.exists()


def test_what_a_killed_measurement_leaves_is_swept(store: Repository, folder: Path) -> None:
    code = (
        "import os, sys, tests.test_verify as t\n"
        "from ohmygpu.convert import process\n"
        "process.COMPILER = (sys.executable, '-c', t.COMPILER)\n"
        "t.module.WORKER = (sys.executable, '-c', t.MEASURER)\n"
        "t.do_verify(sink=lambda e: e.phase == 'measure' and os.kill(os.getpid(), 9))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=Path(__file__).parent.parent, timeout=120
    )
    assert child.returncode == -9
    assert list(store.compiled_dir.glob(".tmp-*"))
    do_verify()
    assert not list(store.compiled_dir.glob(".tmp-*"))
    store.gc()
    assert_clean(store)
    assert CompiledModel.load(folder).recipe == "exact"
