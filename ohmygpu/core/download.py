"""Downloads files into the repository: several at once, resumable, verified before they count.

Worker threads fetch units of all files in order (`transfer`, `partial`); the calling thread
hashes what has arrived, in order and while the rest is on its way, publishes a file once its digest
is right and tells `sink` about it. Two processes that want the same bytes share one download.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Cancelled, CorruptFile
from .events import Event, EventSink
from .files import check_space
from .find_blob import find_blob
from .hashing import new_git_hash
from .http import GuardedClient
from .partial import Partial, done_bytes_elsewhere, unit_count
from .provider import RemoteFile, artifacts_of
from .records import Artifact
from .transfer import Explain, Patience, Transfer
from .workers import Job, Workers

if TYPE_CHECKING:
    from .repository import Repository

_REPORT_EVERY_S = 0.1
_POLL_S = 0.1
_HASH_BYTES = 8 << 20

Publish = Callable[[Path, RemoteFile, str], None]
"""(verified file, what it is, its sha256): put the file where it belongs; it may be moved."""


class Downloader:
    """Fetches files from one endpoint and wherever it redirects.

    `authorization` is sent to the endpoint's origin only. `explain` turns the endpoint's refusals
    into errors.
    """

    def __init__(
        self,
        endpoint: str,
        authorization: str | None = None,
        *,
        connections: int = 8,
        patience: Patience | None = None,
        explain: Explain = lambda response: None,
    ) -> None:
        self.connections = max(1, connections)
        self._endpoint = endpoint
        self._authorization = authorization
        self._patience = patience or Patience()
        self._explain = explain

    def fetch(
        self,
        files: Sequence[RemoteFile],
        repository: Repository,
        sink: EventSink,
        cancel: threading.Event,
    ) -> tuple[Artifact, ...]:
        """`files` as verified blobs, in their order.

        Raises NetworkError and its kin, CorruptFile (naming the file, after one clean second
        download), DiskFull, Cancelled. Whatever was downloaded is kept for the next try.
        """

        def find(file: RemoteFile) -> str | None:
            return find_blob(repository, file)

        def publish(path: Path, file: RemoteFile, sha256: str) -> None:
            repository.add_blob(path, sha256)

        digests = self.fetch_with(files, repository.partial_dir, find, publish, sink, cancel)
        return artifacts_of(files, digests)

    def fetch_with(
        self,
        files: Sequence[RemoteFile],
        folder: Path,
        find: Callable[[RemoteFile], str | None],
        publish: Publish,
        sink: EventSink,
        cancel: threading.Event,
    ) -> list[str]:
        """SHA-256 of each file, after `publish` has taken it or `find` knew it already.

        `find` returns a file's SHA-256 when there is nothing to download.
        """
        for file in files:
            if not file.digest or file.size < 0:
                raise CorruptFile(
                    f"{file.filename} comes without a checksum, so it could not be verified; "
                    "refused",
                    filename=file.filename,
                )
        client = GuardedClient(
            self._endpoint,
            self._authorization,
            connections=self.connections,
            read_timeout_s=self._patience.stall_s,
        )

        def transfer(partial: Partial, stop: threading.Event) -> Transfer:
            return Transfer(client, partial, stop, self._patience, self._explain)

        folder.mkdir(parents=True, exist_ok=True)
        workers = Workers(self.connections, client.close)
        return _Fetch(files, folder, find, publish, transfer, workers, sink, cancel).run()


class _Download:
    """One file's state in a fetch."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.sha256: str | None = None  # set once the file is verified and published
        self.partial: Partial | None = None
        self.transfer: Transfer | None = None
        self.units: deque[int] = deque()
        self.is_second_try = False
        self.start_hashing()

    def start_hashing(self) -> None:
        self.hashed_bytes = 0
        self.sha256_so_far = hashlib.sha256()
        self.git_so_far = new_git_hash(self.file.size)

    @property
    def is_done(self) -> bool:
        return self.sha256 is not None

    def matches(self) -> bool:
        """Whether all bytes, hashed, are those that were promised."""
        if self.file.sha256 is not None:
            return self.sha256_so_far.hexdigest() == self.file.sha256.lower()
        return self.git_so_far.hexdigest() == (self.file.git_sha1 or "").lower()


class _Fetch:
    """One call of `Downloader.fetch_with`."""

    def __init__(
        self,
        files: Sequence[RemoteFile],
        folder: Path,
        find: Callable[[RemoteFile], str | None],
        publish: Publish,
        transfer: Callable[[Partial, threading.Event], Transfer],
        workers: Workers,
        sink: EventSink,
        cancel: threading.Event,
    ) -> None:
        self._downloads = [_Download(file) for file in files]
        self._total_bytes = sum(file.size for file in files)
        self._folder = folder
        self._find = find
        self._publish = publish
        self._transfer = transfer
        self._workers = workers
        self._sink = sink
        self._cancel = cancel
        self._reported_at = 0.0
        self._opened_at = 0.0
        self._has_told_end = False

    def run(self) -> list[str]:
        """SHA-256 of each file."""
        try:
            self._check_cancelled()
            for download in self._downloads:
                self._settle_if_present(download)
            self._check_space()
            self._report(force=True)
            if not all(download.is_done for download in self._downloads):
                self._workers.start(self._next_unit)
            while not all(download.is_done for download in self._downloads):
                self._step()
            return self._verified()
        finally:
            self._workers.end()
            for download in self._downloads:
                if download.partial is not None:
                    download.partial.close()

    def _verified(self) -> list[str]:
        """SHA-256 of each file, told to the sink one by one."""
        self._tell_end()
        done_bytes = 0
        digests = []
        for download in self._downloads:
            digests.append(download.sha256 or "")
            done_bytes += download.file.size
            self._sink(
                Event(
                    "verify",
                    done_bytes=done_bytes,
                    total_bytes=self._total_bytes,
                    file=download.file.filename,
                    sha256=download.sha256,
                )
            )
        return digests

    def _step(self) -> None:
        """Do what there is to do on this thread, or wait a moment for something."""
        self._check_cancelled()
        error = self._workers.error
        if error is not None:
            raise error
        self._open_more()
        worked = False
        for download in self._downloads:
            worked = self._hash_some(download) or worked
        self._report()
        if not worked:
            with self._workers.changed:
                self._workers.changed.wait(_POLL_S)

    def _check_cancelled(self) -> None:
        if self._cancel.is_set():
            raise Cancelled("the download was cancelled; what is downloaded is kept")

    def _next_unit(self) -> Job | None:
        """Called by the workers with `changed` held."""
        for download in self._downloads:
            transfer = download.transfer
            if transfer is not None and download.units and not transfer.is_sequential:
                return functools.partial(
                    self._fetch_unit, download, transfer, download.units.popleft()
                )
        return None

    def _fetch_unit(self, download: _Download, transfer: Transfer, unit: int) -> None:
        """A worker's job. A unit that stays incomplete goes to whoever reads the whole file."""
        transfer.fetch_unit(unit)
        if not transfer.is_complete(unit):
            with self._workers.changed:
                download.units.append(unit)

    def _open_more(self) -> None:
        """Take on the next files, as many as there are connections, that nobody else has."""
        now = time.monotonic()
        if now - self._opened_at < _POLL_S and self._opened_at:
            return
        self._opened_at = now
        active = sum(download.partial is not None for download in self._downloads)
        for download in self._downloads:
            if active >= self._workers.count:
                return
            if download.is_done or download.partial is not None:
                continue
            partial = Partial.try_open(self._folder, download.file)
            if partial is None:
                self._settle_if_present(download)
                continue
            download.partial = partial
            # Its last holder may have finished the file between our look and our lock.
            if self._settle_if_present(download):
                download.partial = None
                partial.discard()
                continue
            active += 1
            self._enqueue(download, partial)

    def _enqueue(self, download: _Download, partial: Partial) -> None:
        with self._workers.changed:
            if download.transfer is None:
                download.transfer = self._transfer(partial, self._workers.stop)
            is_complete = download.transfer.is_complete
            units = range(unit_count(download.file.size))
            download.units = deque(unit for unit in units if not is_complete(unit))
            self._workers.changed.notify_all()

    def _settle_if_present(self, download: _Download) -> bool:
        """Whether the file's bytes are there already; then there is nothing to do."""
        sha256 = self._find(download.file)
        if sha256 is None:
            return False
        download.sha256 = sha256
        return True

    def _hash_some(self, download: _Download) -> bool:
        """Hash the next piece of a file and, at its end, judge it. Whether there was one."""
        partial, file = download.partial, download.file
        if partial is None:
            return False
        ready = partial.ready_bytes
        if download.hashed_bytes < ready:
            size = min(_HASH_BYTES, ready - download.hashed_bytes)
            piece = partial.read(download.hashed_bytes, size)
            download.sha256_so_far.update(piece)
            if file.sha256 is None:
                download.git_so_far.update(piece)
            download.hashed_bytes += len(piece)
        elif ready < file.size:
            return False
        if download.hashed_bytes < file.size:
            return True
        if download.matches():
            partial.sync()
            sha256 = download.sha256_so_far.hexdigest()
            self._publish(partial.path, file, sha256)
            download.partial = download.transfer = None
            partial.discard()
            download.sha256 = sha256
        else:
            self._reject(download, partial)
        return True

    def _reject(self, download: _Download, partial: Partial) -> None:
        """Start a damaged file over, once."""
        file = download.file
        if download.is_second_try:
            found = download.sha256_so_far.hexdigest()
            download.partial = None
            partial.discard()
            raise CorruptFile(
                f"{file.filename} arrived damaged twice: its checksum is not the one listed; "
                "nothing of it was kept, try again later",
                filename=file.filename,
                expected=file.digest,
                found=found,
            )
        download.is_second_try = True
        partial.reset()
        download.start_hashing()
        self._sink(
            Event(
                phase="download",
                message=f"{file.filename} arrived damaged; downloading it once more",
                done_bytes=self._done_bytes(),
                total_bytes=self._total_bytes,
                file=file.filename,
            )
        )
        self._enqueue(download, partial)

    def _done_bytes(self) -> int:
        done = 0
        for download in self._downloads:
            if download.is_done:
                done += download.file.size
            elif download.partial is not None:
                done += download.partial.done_bytes
            else:
                done += done_bytes_elsewhere(self._folder, download.file)
        return done

    def _report(self, *, force: bool = False) -> None:
        """Tell the sink how far it is, ten times a second at most.

        When all bytes have come and hashing still goes on (after a resume of a large file), the
        hashing is what is told.
        """
        now = time.monotonic()
        if not force and now - self._reported_at < _REPORT_EVERY_S:
            return
        self._reported_at = now
        done_bytes = self._done_bytes()
        if done_bytes < self._total_bytes or force:
            self._has_told_end = False
            self._sink(Event("download", done_bytes=done_bytes, total_bytes=self._total_bytes))
            return
        self._tell_end()
        hashed_bytes = sum(
            each.file.size if each.is_done else each.hashed_bytes for each in self._downloads
        )
        self._sink(Event("verify", done_bytes=hashed_bytes, total_bytes=self._total_bytes))

    def _tell_end(self) -> None:
        """Tell once that all bytes have come."""
        if not self._has_told_end:
            total = self._total_bytes
            self._sink(Event("download", done_bytes=total, total_bytes=total))
        self._has_told_end = True

    def _check_space(self) -> None:
        """Raise DiskFull when what is missing cannot fit."""
        check_space(
            self._folder, self._total_bytes - self._done_bytes(), "the rest of the download"
        )
