"""The model store: content-addressed blobs, compiled models, and the records that name them.

    <home>/models/.lock                                            the store's lock
    <home>/models/manifests/<provider>/<org>/<name>/<variant>.json InstallRecord
    <home>/models/blobs/sha256-<hex>                               source files, each stored once
    <home>/models/partial/<digest>.part …                          downloads, locks and leases
    <home>/models/compiled/<key>/                                  model.onnx, weights, tokenizer

Every change is a rename, so after a kill at any instant a thing is there or not, never half. Three
kinds of locks, all of which die with their process: the store's lock, shared while something is
being claimed and exclusive while something is removed, held briefly; one lock per model name for
as long as its pull takes; one lease per pull, which lists what must not be collected meanwhile.

Reading takes no lock and writes nothing: a read-only store serves.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import collect, files, manifests
from .collect import GcReport, Removed
from .errors import CorruptFile
from .hashing import sha256_of
from .leases import Lease
from .locks import FileLock, locked
from .manifests import Scan, check_hex
from .records import Artifact, CompiledModel, InstallRecord

__all__ = ["GcReport", "Removed", "Repository", "Scan"]


def ignore_progress(_: int) -> None:
    """Take a number of bytes and do nothing with it."""


class Repository:
    """The model store below a home folder. One pull at a time per instance; safe across processes.

    Methods that write raise DiskFull when there is no space, ConfigError when the folder is not
    writable.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.models_dir = home / "models"
        self.manifests_dir = self.models_dir / "manifests"
        self.blobs_dir = self.models_dir / "blobs"
        self._partial_dir = self.models_dir / "partial"
        self.compiled_dir = self.models_dir / "compiled"
        self._lease: Lease | None = None
        self._verified: set[str] = set()

    # ------------------------------------------------------------------ reading

    def scan(self) -> Scan:
        """All records, and the manifests that are damaged."""
        return manifests.scan(self.manifests_dir)

    def records(self) -> list[InstallRecord]:
        """All installed models by name; damaged manifests are logged and left out (see `scan`)."""
        return list(self.scan().records)

    def find(self, name: str) -> InstallRecord:
        """The installed model that `name` means, in any case and with or without its prefixes.

        `name`, `name:latest`, `name:variant`, `hf.co/name`, `name@revision`, short names, and the
        reference it was pulled by. Raises InvalidName, CorruptFile (a damaged manifest) or
        ModelNotFound with `details["suggestions"]`.
        """
        return manifests.find(self.scan(), name)

    def blob_path(self, sha256: str) -> Path:
        """Where the blob with this digest is, or will be."""
        return self.blobs_dir / f"sha256-{check_hex(sha256)}"

    def has_blob(self, sha256: str, size: int) -> bool:
        """Whether the blob is there with that many bytes; a running pull then keeps it from gc."""
        path = self.blob_path(sha256)
        if self._lease is None:
            return _size(path) == size
        with self._claiming(sha256):
            return _size(path) == size

    def compiled_path(self, key: str) -> Path:
        """Where the compiled model with this key is, or will be."""
        return self.compiled_dir / check_hex(key)

    def has_compiled(self, key: str) -> bool:
        """Whether the compiled model is there with all its files, each of its recorded size."""
        if self._lease is None:
            return self.compiled_problem(key) is None
        with self._claiming(key):
            return self.compiled_problem(key) is None

    def compiled_problem(self, key: str) -> str | None:
        """What is wrong with a compiled model, in words; None when it is whole."""
        folder = self.compiled_path(key)
        if not folder.is_dir():
            return "it is not there"
        try:
            return CompiledModel.load(folder).damage(folder)
        except CorruptFile as error:
            return error.message

    def check_space(self, needed_bytes: int, what: str) -> None:
        """Raise DiskFull, with both numbers, unless `needed_bytes` more fit beside the models."""
        files.check_space(self.models_dir, needed_bytes, what)

    # ------------------------------------------------------------------ blobs

    @property
    def partial_dir(self) -> Path:
        """The folder of unfinished downloads; made when it is not there."""
        self._make_folders()
        return self._partial_dir

    def add_blob(self, temp: Path, sha256: str) -> Path:
        """Move a finished file, verified by the caller, to its place; returns that."""
        target = self.blob_path(sha256)
        with files.writing(self.home, target.name), self._claiming(sha256):
            files.sync_file(temp)
            temp.replace(target)
            files.sync_folder(self.blobs_dir)
        self._verified.add(sha256)
        return target

    def add_local(
        self,
        path: Path,
        *,
        filename: str | None = None,
        format: str = "other",  # noqa: A002 - the artifact's own word
        progress: Callable[[int], None] = ignore_progress,
        cancel: threading.Event | None = None,
    ) -> Artifact:
        """Store a file from elsewhere on this machine: shared on disk where possible, else copied.

        `progress` is called with the number of bytes hashed since its last call. Raises CorruptFile
        when the file changes meanwhile, Cancelled, and what opening the file raises.
        """
        if not path.is_file():  # opening a pipe would wait for ever
            raise CorruptFile(f"{path} is not a file")
        with path.open("rb"):  # that it cannot be read is not the store's fault
            before = path.stat()
        temp = self.blobs_dir / f"{files.TEMPORARY}{secrets.token_hex(8)}"
        with self._claiming(temp.name):
            pass
        try:
            with files.writing(self.home, path.name):
                files.clone(path, temp, cancel)
            digest = sha256_of(temp, progress, cancel)
            after = path.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise CorruptFile(f"{path.name} changed while it was read; pull it again")
            self.add_blob(temp, digest)
        finally:
            temp.unlink(missing_ok=True)
        return Artifact(filename or path.name, before.st_size, digest, format)

    def check_blob(
        self,
        artifact: Artifact,
        progress: Callable[[int], None] = ignore_progress,
        cancel: threading.Event | None = None,
    ) -> None:
        """Raise CorruptFile, and drop the blob, unless its bytes are those its digest names.

        Blobs that this instance stored itself are not read again.
        """
        if artifact.sha256 in self._verified:
            progress(artifact.size)
            return
        path = self.blob_path(artifact.sha256)
        digest = sha256_of(path, progress, cancel) if path.is_file() else None
        if digest != artifact.sha256:
            with files.writing(self.home, path.name):
                path.unlink(missing_ok=True)
            what = "is missing from the store" if digest is None else "is damaged on the disk"
            raise CorruptFile(
                f"the stored copy of {artifact.filename} {what}; pull the model again",
                filename=artifact.filename,
                sha256=artifact.sha256,
            )
        self._verified.add(artifact.sha256)

    # ------------------------------------------------------------------ compiled models

    def new_compiled(self) -> Path:
        """An empty folder to compile into, on the same file system as its final place."""
        folder = self.compiled_dir / f"{files.TEMPORARY}{secrets.token_hex(8)}"
        with files.writing(self.home, "the compiled model"), self._claiming(folder.name):
            folder.mkdir(mode=0o700)
        return folder

    def commit_compiled(self, temp: Path, key: str) -> Path:
        """Make the finished folder `temp` the compiled model `key`; returns its place.

        A whole one that is there already stays and `temp` goes; a damaged one is replaced.
        """
        target = self.compiled_path(key)
        with files.writing(self.home, "the compiled model"):
            files.sync_tree(temp)
            with self._claiming(key):
                if self.compiled_problem(key) is None:
                    shutil.rmtree(temp)
                    return target
                if target.exists():
                    files.remove_tree(target, self.new_trash())
                temp.rename(target)
                files.sync_folder(self.compiled_dir)
        return target

    def discard(self, temp: Path) -> None:
        """Remove a temporary folder, if it is still there."""
        shutil.rmtree(temp, ignore_errors=True)  # what resists is for gc

    # ------------------------------------------------------------------ records

    def check_name_free(self, record: InstallRecord) -> None:
        """Raise Conflict when `write_record(record)` would: another model has the name."""
        manifests.check_free(self.scan(), record)

    def write_record(self, record: InstallRecord) -> InstallRecord:
        """Install: from this call on the model is there. Returns the record as stored.

        The first variant of a name becomes its default; a new default takes the mark from the old.
        Raises Conflict when another model has the name.
        """
        path = manifests.manifest_path(self.manifests_dir, record)
        with files.writing(self.home, path.name), self._store_locked():
            found = self.scan()
            manifests.check_free(found, record)
            others = manifests.siblings(found, record)
            if not others:
                record = replace(record, is_default=True)
            self._write(record)
            if record.is_default:
                for other in others:
                    if other.is_default:
                        self._write(replace(other, is_default=False))
        return record

    def remove(self, name: str) -> Removed:
        """Remove one installed model and what no other one needs; says what that freed.

        Raises ModelNotFound, or Conflict while the model is being pulled. If it was the default
        variant, the most recently installed other one becomes it.
        """
        record = self._find_to_remove(name)
        lock = FileLock(self._name_lock_path(record.name))
        with files.writing(self.home, "the model store"):
            self._make_folders()
            if not lock.try_acquire():
                raise collect.being_pulled(record.full_name)
            try:
                with self._store_locked():
                    return collect.remove_record(self, record)
            finally:
                lock.release()

    def gc(self, sources: bool = False) -> GcReport:
        """Remove what no record and no running pull needs, and with `sources` the source files.

        Sources of a model whose compiled form is damaged stay: they can repair it. Their digests
        stay in the records. While a manifest is damaged, nothing is known of what it names, so
        blobs and compiled models stay; the report lists it.
        """
        if not self.models_dir.is_dir():
            return GcReport()
        with files.writing(self.home, "the model store"):
            self._make_folders()
            with self._store_locked():
                return collect.collect_garbage(self, sources)

    def sweep_temporaries(self) -> None:
        """Remove the unfinished compiles and copies that killed processes left."""
        with files.writing(self.home, "the model store"), self._store_locked():
            collect.sweep_temporaries(self)

    def free_sources(self, record: InstallRecord) -> int:
        """Remove the source blobs that only `record` names; returns the bytes freed."""
        with files.writing(self.home, "the model store"), self._store_locked():
            return collect.free_sources(self, record)

    # ------------------------------------------------------------------ locks

    @contextmanager
    def lock(
        self,
        name: str,
        *,
        on_wait: Callable[[], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[None]:
        """Hold the lock of a model's name, or of a compile key, waiting for other processes.

        `on_wait` is called once if there is a wait. Raises Cancelled.
        """
        with files.writing(self.home, "the model store"):
            self._make_folders()
            lock = FileLock(self._name_lock_path(name))
            lock.acquire(on_wait=on_wait, cancel=cancel)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keep from gc all that this instance stores or finds while the block runs."""
        if self._lease is not None:
            raise ValueError("this repository object already runs a pull")
        with files.writing(self.home, "the model store"):
            self._make_folders()
            lease = Lease(self._partial_dir)
            with locked(self._lock_path, shared=True, keep=True):
                lease.start()
        self._lease = lease
        try:
            yield
        finally:
            self._lease = None
            lease.end()

    def claim(self, *names: str) -> None:
        """Keep digests, keys or temporary names from gc until the lease ends."""
        with files.writing(self.home, "the model store"), self._claiming(*names):
            pass

    # ------------------------------------------------------------------ inside

    @property
    def _lock_path(self) -> Path:
        return self.models_dir / ".lock"

    def _name_lock_path(self, name: str) -> Path:
        digest = hashlib.sha256(name.lower().encode("utf-8")).hexdigest()
        return self._partial_dir / f"pull-{digest[:32]}.lock"

    def new_trash(self) -> Path:
        """A name to move a folder to before removing it, so that it is never half there."""
        return self.compiled_dir / f"{files.TEMPORARY}{secrets.token_hex(8)}"

    @contextmanager
    def _store_locked(self) -> Iterator[None]:
        self._make_folders()
        with locked(self._lock_path, keep=True):
            yield

    @contextmanager
    def _claiming(self, *names: str) -> Iterator[None]:
        """Hold the store's lock, shared, with `names` protected for as long as the lease lasts."""
        self._make_folders()
        with locked(self._lock_path, shared=True, keep=True):
            if self._lease is not None:
                self._lease.add(*names)
            yield

    def _make_folders(self) -> None:
        folders = (self.manifests_dir, self.blobs_dir, self._partial_dir, self.compiled_dir)
        if all(folder.is_dir() for folder in folders):
            return
        with files.writing(self.home, "the model store"):
            self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.models_dir, *folders):
                folder.mkdir(exist_ok=True, mode=0o700)

    def _write(self, record: InstallRecord) -> None:
        path = manifests.manifest_path(self.manifests_dir, record)
        folder = self.manifests_dir
        for part in path.parent.relative_to(self.manifests_dir).parts:
            if not (folder / part).is_dir():
                (folder / part).mkdir(exist_ok=True, mode=0o700)
                files.sync_folder(folder)
            folder /= part
        files.write_whole(path, manifests.encode(record))

    def _find_to_remove(self, name: str) -> InstallRecord:
        found = self.scan()
        try:
            return manifests.find(found, name)
        except CorruptFile:
            return manifests.salvage(found, name)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
