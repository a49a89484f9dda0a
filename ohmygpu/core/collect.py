"""Removing from the store: one record with what only it names, or everything that nothing names.

All functions expect the store's lock to be held exclusively.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, leases, manifests
from .errors import Conflict
from .locks import FileLock, is_locked
from .manifests import DamagedManifest
from .records import InstallRecord

if TYPE_CHECKING:
    from .repository import Repository

_BLOB = re.compile(r"sha256-([0-9a-f]{64})")
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Removed:
    """What `remove` did."""

    record: InstallRecord
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection removed: counts of each kind, and the bytes that gave back."""

    freed_bytes: int = 0
    blobs: int = 0  # source files that no record names
    partials: int = 0  # unfinished downloads
    compiled: int = 0  # compiled models that no record names
    temporaries: int = 0  # what dead processes left: temporary files and folders, locks
    sources: int = 0  # source files of installed models (only when asked for)
    source_bytes: int = 0  # how much of freed_bytes those were
    damaged: tuple[DamagedManifest, ...] = ()  # while there are any, blobs and compiled stay

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        damaged = [{**asdict(entry), "path": str(entry.path)} for entry in self.damaged]
        return {**asdict(self), "damaged": damaged}


def being_pulled(name: str) -> Conflict:
    """The error for changing a model that another process or thread is pulling."""
    return Conflict(f"{name} is being pulled; wait for that to end, or stop it", name=name)


def remove_record(store: Repository, record: InstallRecord) -> Removed:
    """Delete the record (the commit point), then what only it named."""
    path = manifests.manifest_path(store.manifests_dir, record)
    found = store.scan()
    others = manifests.siblings(found, record)
    path.unlink(missing_ok=True)
    files.sync_folder(path.parent)
    _remove_empty(path.parent, store.manifests_dir)
    if record.is_default and others:
        promoted = replace(others[0], is_default=True)
        files.write_whole(
            manifests.manifest_path(store.manifests_dir, promoted), manifests.encode(promoted)
        )
    damaged = [entry for entry in found.damaged if entry.path != path]
    if damaged:
        return Removed(record, 0)  # who knows what those name; gc says so
    keep = _needed(found.records, without=record) | leases.names_in_use(store.partial_dir)
    freed = 0
    for artifact in record.artifacts:
        if artifact.sha256 not in keep:
            freed += _unlink(store.blob_path(artifact.sha256))
    if record.compiled_key and record.compiled_key not in keep:
        freed += _remove_folder(store, store.compiled_path(record.compiled_key))
    return Removed(record, freed)


def free_sources(store: Repository, record: InstallRecord) -> int:
    """Remove the blobs of `record` that no other record and no other pull names; bytes freed."""
    found = store.scan()
    if found.damaged:
        return 0
    keep = _needed(found.records, without=record) | leases.names_in_use(store.partial_dir)
    return sum(
        _unlink(store.blob_path(artifact.sha256))
        for artifact in record.artifacts
        if artifact.sha256 not in keep
    )


def collect_garbage(store: Repository, sources: bool) -> GcReport:
    """Remove all that no record names and no living process uses."""
    found = store.scan()
    in_use = leases.names_in_use(store.partial_dir)
    partials, leftovers, freed = _sweep_partial(store.partial_dir, in_use)
    temporaries, more = sweep_temporaries(store)
    temporaries, freed = temporaries + leftovers, freed + more
    for path in store.manifests_dir.rglob(f".*{files.TEMPORARY}*"):
        freed += _unlink(path)  # writers hold the store's lock: this one is dead
        temporaries += 1
    for path in sorted(store.manifests_dir.glob("*/*/*/")):
        _remove_empty(path, store.manifests_dir)
    report = GcReport(freed, 0, partials, 0, temporaries, damaged=found.damaged)
    if found.damaged:
        return report
    keep = _needed(found.records) | in_use
    blobs = 0
    for path in store.blobs_dir.iterdir():
        match = _BLOB.fullmatch(path.name)
        if match and match[1] not in keep:
            freed += _unlink(path)
            blobs += 1
    compiled = 0
    for path in list(store.compiled_dir.iterdir()):
        if _KEY.fullmatch(path.name) and path.name not in keep:
            freed += _remove_folder(store, path)
            compiled += 1
    report = replace(report, freed_bytes=freed, blobs=blobs, compiled=compiled)
    return _sweep_sources(store, report, found.records, in_use) if sources else report


def sweep_temporaries(store: Repository) -> tuple[int, int]:
    """Remove the temporary files and folders of dead processes; (how many, bytes freed)."""
    in_use = leases.names_in_use(store.partial_dir)
    folders = (store.blobs_dir, store.compiled_dir)
    found = [path for folder in folders for path in folder.glob(f"{files.TEMPORARY}*")]
    dead = [path for path in found if path.name not in in_use]
    return len(dead), sum(_remove_any(path) for path in dead)


def _sweep_sources(
    store: Repository, report: GcReport, records: Iterable[InstallRecord], in_use: set[str]
) -> GcReport:
    """Remove the source blobs of whole installed models too."""
    keep = set(in_use)
    digests: set[str] = set()
    for record in records:
        names = {artifact.sha256 for artifact in record.artifacts}
        if store.compiled_problem(record.compiled_key) is None:
            digests |= names
        else:
            keep |= names  # a recompile needs them
    count = freed = 0
    for digest in sorted(digests - keep):
        path = store.blob_path(digest)
        if path.exists():
            freed += _unlink(path)
            count += 1
    return replace(
        report, freed_bytes=report.freed_bytes + freed, sources=count, source_bytes=freed
    )


def _sweep_partial(folder: Path, in_use: set[str]) -> tuple[int, int, int]:
    """Clean `partial/`; returns (downloads removed, other leftovers removed, bytes freed)."""
    downloads = leftovers = freed = 0
    files_of: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        files_of.setdefault(path.name.split(".")[0], []).append(path)
    for stem, paths in files_of.items():
        if stem in in_use:
            continue
        for path in paths:
            if path.suffix == leases.SUFFIX and not is_locked(path):
                path.unlink()
                leftovers += 1
        unfinished = [path for path in paths if path.suffix not in (".lock", leases.SUFFIX)]
        stale_lock = (folder / f"{stem}.lock").exists()
        lock = FileLock(folder / f"{stem}.lock")
        if (unfinished or stale_lock) and lock.try_acquire():
            freed += sum(_remove_any(path) for path in unfinished)
            downloads += bool(unfinished)
            leftovers += stale_lock
            lock.release()  # which removes it
    return downloads, leftovers, freed


def _needed(records: Iterable[InstallRecord], without: InstallRecord | None = None) -> set[str]:
    """The digests and keys that the records name."""
    names: set[str] = set()
    for record in records:
        if without and (record.provider, record.full_name.lower()) == (
            without.provider,
            without.full_name.lower(),
        ):
            continue
        names.add(record.compiled_key)
        names.update(artifact.sha256 for artifact in record.artifacts)
    return names


def _unlink(path: Path) -> int:
    freed = files.used_bytes(path)
    path.unlink(missing_ok=True)
    return freed


def _remove_folder(store: Repository, path: Path) -> int:
    if not path.is_dir():
        return 0
    return files.remove_tree(path, store.new_trash())


def _remove_any(path: Path) -> int:
    freed = files.used_bytes(path)
    if path.is_dir() and not path.is_symlink():
        # A compiler that is just dying may still add files: the next gc has the rest.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return freed


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove `folder` and the folders above it, below `top`, as far as they are empty."""
    while folder != top:
        with contextlib.suppress(OSError):
            folder.rmdir()
        if folder.exists():
            return
        folder = folder.parent
