"""Repositories of the local hub: plain folders, read the way the hub describes its own.

<root>/<org>/<name>/…                 the files of branch main
<root>/<org>/<name>/.revisions/<rev>/ another branch or tag
<root>/<org>/<name>/.repo.json        {"private", "gated", "disabled", "downloads", "likes", "tags",
                                       "lfs": [names], "no_digests", …}: all optional
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".model", ".pkl")
LFS_BYTES = 10 << 20


@dataclass(frozen=True)
class RepoFile:
    """A file as the hub knows it: by SHA-256 if it is stored with LFS, by git's blob id anyway."""

    name: str
    path: Path
    size: int
    sha256: str
    git_sha1: str
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Git's id of what the repository itself holds: the content, or the LFS pointer."""
        if not self.is_lfs:
            return self.git_sha1
        pointer = (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()
        return git_blob_id(pointer)


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    commit: str
    files: dict[str, RepoFile]


_digests: dict[tuple[str, int, int], tuple[str, str]] = {}


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def digests_of(path: Path) -> tuple[str, str]:
    """(sha256, git's blob id) of a file, remembered until it changes."""
    info = path.stat()
    key = (str(path), info.st_mtime_ns, info.st_size)
    if key not in _digests:
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % info.st_size)
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                sha256.update(piece)
                sha1.update(piece)
        _digests[key] = (sha256.hexdigest(), sha1.hexdigest())
    return _digests[key]


class Repo:
    """One model repository."""

    def __init__(self, root: Path, id_: str) -> None:
        self.id = id_
        self.folder = root / id_
        meta = self.folder / ".repo.json"
        self.meta: dict[str, Any] = json.loads(meta.read_text()) if meta.exists() else {}

    def snapshot(self, revision: str) -> Snapshot | None:
        """The commit that a branch, a tag or a commit id means; None when there is none."""
        main = self._read(self.folder)
        if revision in ("main", main.commit, "HEAD"):
            return main
        others = self.folder / ".revisions"
        for folder in sorted(others.iterdir()) if others.is_dir() else ():
            snapshot = self._read(folder)
            if revision in (folder.name, snapshot.commit):
                return snapshot
        return None

    def _read(self, folder: Path) -> Snapshot:
        files = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or name == ".repo.json" or name.startswith(".revisions/"):
                continue
            sha256, git_sha1 = digests_of(path)
            size = path.stat().st_size
            is_lfs = (
                name in self.meta.get("lfs", ()) or size > LFS_BYTES or name.endswith(LFS_SUFFIXES)
            )
            files[name] = RepoFile(name, path, size, sha256, git_sha1, is_lfs)
        for name in self.meta.get("extra_files", ()):  # names no folder could hold
            some = next(iter(files.values()))
            files[name] = RepoFile(name, some.path, some.size, some.sha256, some.git_sha1, False)
        listing = "".join(f"{file.oid} {name}\n" for name, file in files.items())
        return Snapshot(hashlib.sha1(f"{self.id}\n{listing}".encode()).hexdigest(), files)

    def describe(self, snapshot: Snapshot, *, blobs: bool) -> dict[str, Any]:
        """The repository as /api/models/{id} tells it."""
        tags = set(self.meta.get("tags", ()))
        tags |= {"gguf" for name in snapshot.files if name.endswith(".gguf")}
        tags |= {"safetensors" for name in snapshot.files if name.endswith(".safetensors")}
        info: dict[str, Any] = {
            "_id": hashlib.sha1(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.split("/")[0],
            "sha": snapshot.commit,
            "private": bool(self.meta.get("private", False)),
            "gated": self.meta.get("gated", False),
            "disabled": bool(self.meta.get("disabled", False)),
            "downloads": int(self.meta.get("downloads", 0)),
            "likes": int(self.meta.get("likes", 0)),
            "tags": sorted(tags),
            "createdAt": "2026-01-02T03:04:05.000Z",
            "lastModified": "2026-02-03T04:05:06.000Z",
            "usedStorage": sum(file.size for file in snapshot.files.values()),
            "siblings": [self._sibling(file, blobs) for file in snapshot.files.values()],
        }
        if config := _json_of(snapshot, "config.json"):
            info["config"] = {
                key: config[key] for key in ("architectures", "model_type") if key in config
            }
        if parameters := _parameters(snapshot):
            info["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
        return {**info, **self.meta.get("info", {})}

    def _sibling(self, file: RepoFile, blobs: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": file.name}
        if blobs and not self.meta.get("no_digests"):
            entry |= {"size": file.size, "blobId": file.oid}
            if file.is_lfs:
                entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        return entry

    def tree(self, snapshot: Snapshot) -> list[dict[str, Any]]:
        """The files as /api/models/{id}/tree/{commit}?recursive=true lists them."""
        entries = []
        for file in snapshot.files.values():
            entry = {"type": "file", "oid": file.oid, "size": file.size, "path": file.name}
            if file.is_lfs:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        return entries


def all_repos(root: Path) -> Iterator[Repo]:
    """Every repository below `root`."""
    for org in sorted(path for path in root.iterdir() if path.is_dir()):
        for folder in sorted(path for path in org.iterdir() if path.is_dir()):
            yield Repo(root, f"{org.name}/{folder.name}")


def find_repo(root: Path, id_: str) -> Repo | None:
    """The repository with this id in any case."""
    return next((repo for repo in all_repos(root) if repo.id.lower() == id_.lower()), None)


def make_repo(root: Path, id_: str, source: Path | dict[str, bytes], **meta: Any) -> Path:
    """Make (or replace) a repository from a folder or from contents by name; returns its folder."""
    folder = root / id_
    if folder.exists():
        shutil.rmtree(folder)
    if isinstance(source, Path):
        shutil.copytree(source, folder)
    else:
        for name, data in source.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    if meta:
        (folder / ".repo.json").write_text(json.dumps(meta))
    return folder


def _json_of(snapshot: Snapshot, name: str) -> dict[str, Any] | None:
    file = snapshot.files.get(name)
    try:
        value = json.loads(file.path.read_bytes()) if file else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parameters(snapshot: Snapshot) -> dict[str, int]:
    """Number of parameters by dtype, from the headers of the SafeTensors files."""
    counts: dict[str, int] = {}
    for name, file in snapshot.files.items():
        if not name.endswith(".safetensors"):
            continue
        with file.path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            try:
                header = json.loads(stream.read(length)) if 0 < length < file.size else {}
            except ValueError:
                header = {}
        for tensor, entry in header.items() if isinstance(header, dict) else ():
            if tensor != "__metadata__" and isinstance(entry, dict):
                count = 1
                for size in entry["shape"]:
                    count *= size
                counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + count
    return counts
