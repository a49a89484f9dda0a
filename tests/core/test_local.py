"""Models on this machine: files and folders, and what is wrong with some of them."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path

import pytest

from ohmygpu.core.errors import (
    Cancelled,
    CorruptFile,
    InvalidRequest,
    ModelNotFound,
    OhMyGPUError,
    UnsupportedModel,
)
from ohmygpu.core.events import Event
from ohmygpu.core.local import LocalProvider
from ohmygpu.core.provider import Resolved
from ohmygpu.core.providers import provider_for
from ohmygpu.core.records import Artifact
from ohmygpu.core.refs import ModelRef
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import load_settings

GGUF = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + bytes(5000)


def safetensors(size: int = 64) -> bytes:
    header = json.dumps(
        {"__metadata__": {}, "w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def resolve(path: Path) -> Resolved:
    ref = ModelRef.parse(str(path))
    return provider_for(ref, load_settings()).resolve(ref)


def fetch(
    resolved: Resolved, home: Path, events: list[Event] | None = None
) -> tuple[Artifact, ...]:
    sink = (events if events is not None else []).append
    return LocalProvider().fetch(resolved, Repository(home), sink, threading.Event())


FOLDER = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(),
}


def test_a_gguf_file_becomes_a_blob_and_stays_where_it_was(tmp_path: Path, home: Path) -> None:
    path = write(tmp_path, {"Tiny-Q4_1.gguf": GGUF}) / "Tiny-Q4_1.gguf"
    resolved = resolve(path)
    assert resolved.display_name == "Tiny-Q4_1"
    assert (resolved.source_format, resolved.variant) == ("gguf", "q4_1")
    assert (resolved.default_variant, resolved.revision, resolved.config) == ("q4_1", None, None)
    assert resolved.total_bytes == len(GGUF)
    events: list[Event] = []
    (artifact,) = fetch(resolved, home, events)
    assert Repository(home).blob_path(artifact.sha256).read_bytes() == GGUF
    assert path.read_bytes() == GGUF
    assert (artifact.filename, artifact.format) == ("Tiny-Q4_1.gguf", "gguf")
    assert events[-1] == Event("verify", file=artifact.filename, sha256=artifact.sha256)
    assert events[-2] == Event("download", done_bytes=len(GGUF), total_bytes=len(GGUF))


def test_a_gguf_file_needs_no_ending(tmp_path: Path, home: Path) -> None:
    path = write(tmp_path, {"sha256-abc": GGUF}) / "sha256-abc"
    resolved = resolve(path)
    assert resolved.variant is None
    assert fetch(resolved, home)[0].filename == "sha256-abc.gguf"


def test_one_part_of_a_split_gguf_stands_for_all_of_them(tmp_path: Path, home: Path) -> None:
    parts = [f"m-Q4_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    folder = write(tmp_path, {**dict.fromkeys(parts, GGUF), "m-Q4_0-00001-of-00002.gguf": GGUF})
    for part in parts:
        assert [file.filename for file in resolve(folder / part).files] == parts
    assert resolve(folder / parts[1]).variant == "q4_0"
    (folder / parts[2]).unlink()
    with pytest.raises(CorruptFile, match=r"m-Q4_0-00001-of-00003\.gguf lacks part 3 of m-Q4_0"):
        resolve(folder / parts[0])


def test_a_folder_gives_weights_config_and_tokenizer(tmp_path: Path, home: Path) -> None:
    unneeded = {"README.md": b"", "pytorch_model.bin": b"x", ".cache/x.json": b"{}"}
    folder = write(tmp_path / "my model", FOLDER | unneeded)
    resolved = resolve(folder)
    assert resolved.display_name == "my-model"
    assert resolved.config == {"model_type": "llama"}
    assert (resolved.source_format, resolved.variant) == ("safetensors", None)
    assert {artifact.filename for artifact in fetch(resolved, home)} == set(FOLDER)


def test_a_folder_of_links_is_followed(tmp_path: Path, home: Path) -> None:
    blobs = write(tmp_path / "blobs", FOLDER)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name in FOLDER:
        (folder / name).symlink_to(blobs / name)
    assert len(fetch(resolve(folder), home)) == len(FOLDER)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"x-Q8_0.gguf": GGUF, "mmproj-x.gguf": GGUF})
    assert [file.filename for file in resolve(folder).files] == ["x-Q8_0.gguf"]


def test_a_folder_with_different_gguf_files_asks_for_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"a.gguf": GGUF, "b.gguf": GGUF})
    with pytest.raises(InvalidRequest, match=r"a, b; give the path of one"):
        resolve(folder)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        resolve(tmp_path / "none.gguf")


def test_what_is_neither_file_nor_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelNotFound, match="not a file or a folder"):
        resolve(tmp_path / "pipe.gguf")


@pytest.mark.parametrize(
    ("name", "data", "error", "says"),
    [
        ("m.gguf", b"", CorruptFile, "is empty"),
        ("m.gguf", b"PK\3\4" + bytes(100), CorruptFile, "not a GGUF file"),
        ("m.gguf", b"<html>", CorruptFile, "not a GGUF file"),
        ("m.gguf", GGUF[:20], CorruptFile, "truncated"),
        ("m.gguf", struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1), CorruptFile, "truncated"),
        ("m.gguf", struct.pack("<4sIQQ", b"GGUF", 1, 1, 1), UnsupportedModel, "version 1"),
        ("m.gguf", struct.pack(">4sIQQ", b"GGUF", 3, 1, 1), UnsupportedModel, "version"),
        ("m.bin", b"x", UnsupportedModel, "can run code"),
        ("m.pt", b"x", UnsupportedModel, "can run code"),
        ("m.safetensors", safetensors(), InvalidRequest, "give the folder"),
        ("m.txt", b"hello", CorruptFile, "not a GGUF file"),
    ],
)
def test_a_file_that_is_no_model_is_refused_with_the_reason(
    tmp_path: Path, name: str, data: bytes, error: type[OhMyGPUError], says: str
) -> None:
    path = write(tmp_path, {name: data}) / name
    with pytest.raises(error, match=says):
        resolve(path)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model.safetensors": safetensors()[:-1]}, CorruptFile, "truncated"),
        ({"model.safetensors": safetensors() + b"x"}, CorruptFile, "should have"),
        ({"model.safetensors": b""}, CorruptFile, "truncated"),
        ({"model.safetensors": b"\xff" * 100}, CorruptFile, "truncated"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"[]"}, CorruptFile, "header"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"xx"}, CorruptFile, "header"),
        ({"config.json": b"{"}, CorruptFile, "config.json"),
        ({"config.json": b"[]"}, CorruptFile, "config.json"),
        ({"config.json": b"[" * 200_000}, CorruptFile, "config.json"),
        ({"config.json": b" " * (5 << 20)}, CorruptFile, "more than"),
    ],
)
def test_a_folder_with_a_damaged_file_is_refused_by_its_name(
    tmp_path: Path, home: Path, change: dict[str, bytes], error: type[OhMyGPUError], says: str
) -> None:
    folder = write(tmp_path / "m", FOLDER | change)
    with pytest.raises(error, match=says) as caught:
        fetch(resolve(folder), home)
    assert next(iter(change)) in caught.value.message
    assert not (home / "models/blobs").exists() or not list((home / "models/blobs").iterdir())


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": b"{}"}, "no SafeTensors or GGUF"),
        ({"model.safetensors": safetensors()}, r"no config\.json"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "can run code"),
        ({}, "no SafeTensors or GGUF"),
    ],
)
def test_a_folder_without_a_usable_model_is_refused(
    tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(UnsupportedModel, match=says):
        resolve(write(folder, files))


def test_a_cancelled_import_leaves_nothing(tmp_path: Path, home: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    resolved = resolve(write(tmp_path / "m", FOLDER))
    with pytest.raises(Cancelled):
        LocalProvider().fetch(resolved, Repository(home), lambda _: None, cancel)
    assert list((home / "models/blobs").iterdir()) == []


def test_a_file_that_changed_since_it_was_looked_at_is_refused(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "m", FOLDER)
    resolved = resolve(folder)
    (folder / "tokenizer.json").write_bytes(b"{} ")
    with pytest.raises(CorruptFile, match="changed"):
        fetch(resolved, home)
