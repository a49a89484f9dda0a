"""Models on this machine: a GGUF file, or a folder as Hugging Face lays one out."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CorruptFile, InvalidRequest, ModelNotFound, UnsupportedModel
from .events import Event, EventSink
from .gguf_header import HEAD_BYTES, architecture_of, expert_count_of
from .model_files import (
    PICKLE_SUFFIXES,
    Read,
    Select,
    Selection,
    artifact_format,
    parts_of,
    select_files,
)
from .provider import RemoteFile, Resolved
from .records import Artifact
from .refs import quant_label
from .safetensors_header import header_bytes, may_be_table

if TYPE_CHECKING:
    from .refs import ModelRef
    from .repository import Repository

_GGUF_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, metadata entries
_GGUF_VERSIONS = (2, 3)
_REPORT_EVERY_S = 0.1


class LocalProvider:
    """Models on this machine, as a `Provider`."""

    def resolve(self, ref: ModelRef, select: Select = select_files) -> Resolved:
        """The model at the path `ref.repo`; `select` chooses among a folder's files.

        Raises ModelNotFound, CorruptFile (truncated, or not what its name says), UnsupportedModel.
        """
        path = Path(ref.repo)
        try:
            if path.is_dir():
                return self._resolve_folder(ref, path, select)
            if path.is_file():
                return self._resolve_file(ref, path)
        except OSError as error:
            raise _unreadable(path, error) from error
        what = "is not a file or a folder" if path.exists() else "does not exist"
        raise ModelNotFound(f"{path} {what}; check the path", name=str(path), suggestions=[])

    def fetch(
        self,
        resolved: Resolved,
        repository: Repository,
        sink: EventSink,
        cancel: threading.Event,
    ) -> tuple[Artifact, ...]:
        """The files as blobs, shared with the originals on disk where the file system can."""
        for file in resolved.files:
            if file.format == "safetensors":
                check_safetensors(Path(file.url))
        total_bytes = resolved.total_bytes
        done_bytes, reported_at = 0, 0.0

        def progress(count: int) -> None:
            nonlocal done_bytes, reported_at
            done_bytes += count
            if time.monotonic() - reported_at >= _REPORT_EVERY_S:
                reported_at = time.monotonic()
                sink(Event("download", done_bytes=done_bytes, total_bytes=total_bytes))

        artifacts = []
        for file in resolved.files:
            path = Path(file.url)
            try:
                artifact = repository.add_local(
                    path,
                    filename=file.filename,
                    format=file.format,
                    progress=progress,
                    cancel=cancel,
                )
            except OSError as error:
                raise _unreadable(path, error) from error
            if artifact.size != file.size:
                raise CorruptFile(f"{path} changed while it was read; pull it again")
            artifacts.append(artifact)
        sink(Event("download", done_bytes=total_bytes, total_bytes=total_bytes))
        for artifact in artifacts:
            sink(Event("verify", file=artifact.filename, sha256=artifact.sha256))
        return tuple(artifacts)

    def _resolve_file(self, ref: ModelRef, path: Path) -> Resolved:
        name = path.name.lower()
        if name.endswith(PICKLE_SUFFIXES):
            raise UnsupportedModel(
                f"{path} is in a format that can run code when it is loaded; use SafeTensors or "
                "GGUF weights"
            )
        if name.endswith(".safetensors"):
            raise InvalidRequest(
                f"{path} has weights but no config and tokenizer; give the folder it is in: "
                f"{path.parent}",
                param="model",
            )
        head = check_gguf(path)
        parts = parts_of(path.name, lambda: _names_beside(path), str(path))
        label = quant_label(path.name)
        variant = label.lower() if label else None
        if ref.variant and ref.variant.lower() != variant:
            raise InvalidRequest(
                f"{path} is one file, so it has no variant {ref.variant!r}", param="model"
            )
        return Resolved(
            ref=ref,
            display_name=ref.name,
            variant=variant,
            default_variant=variant,
            revision=None,
            files=tuple(
                _local_file(path.parent / part, part if _is_gguf(part) else part + ".gguf")
                for part in parts
            ),
            config=None,
            source_format="gguf",
            gguf_architecture=architecture_of(head),
            gguf_experts=expert_count_of(head),
        )

    def _resolve_folder(self, ref: ModelRef, folder: Path, select: Select) -> Resolved:
        names = _names_in(folder)

        def read(name: str, max_bytes: int) -> bytes:
            with (folder / name).open("rb") as file:
                data = file.read(max_bytes + 1)
            if len(data) > max_bytes:
                raise CorruptFile(f"{folder / name} has more than {max_bytes} bytes; refused")
            return data

        chosen = self._select(ref, folder, names, read, select)
        heads = [check_gguf(folder / name) for name in chosen.filenames if _is_gguf(name)]
        return Resolved(
            ref=ref,
            display_name=ref.name,
            variant=chosen.variant,
            default_variant=chosen.default_variant,
            revision=None,
            files=tuple(_local_file(folder / name, name) for name in chosen.filenames),
            config=chosen.config,
            source_format=chosen.source_format,
            gguf_architecture=architecture_of(heads[0]) if heads else None,
            gguf_experts=expert_count_of(heads[0]) if heads else 0,
        )

    def _select(
        self, ref: ModelRef, folder: Path, names: list[str], read: Read, select: Select
    ) -> Selection:
        try:
            return select(names, ref.variant, read, str(folder))
        except InvalidRequest as error:
            variants = error.details.get("variants")
            if variants is None:
                raise
            raise InvalidRequest(
                f"{folder} has several models: {', '.join(variants[:20])}; give the path of one "
                "file instead of the folder's",
                param="model",
                variants=variants,
            ) from error


def check_gguf(path: Path) -> bytes:
    """The first bytes of a GGUF file. Raises CorruptFile, and UnsupportedModel for old versions.

    Whether its tensors are all there is found when it is compiled.
    """
    with path.open("rb") as file:
        header = file.read(HEAD_BYTES)
    if header[:4] != b"GGUF":
        what = "is empty" if not header else "is not a GGUF file (it does not begin with GGUF)"
        raise CorruptFile(
            f"{path} {what}; check the path, or download it again", filename=path.name
        )
    if len(header) < _GGUF_HEADER.size:
        raise CorruptFile(
            f"{path} ends within its header; it is truncated, download it again",
            filename=path.name,
        )
    _, version, tensors, entries = _GGUF_HEADER.unpack_from(header)
    if version not in _GGUF_VERSIONS:
        raise UnsupportedModel(f"{path} is GGUF version {version}; versions 2 and 3 are supported")
    # A tensor's description has at least 24 bytes, a metadata entry at least 13.
    if tensors * 24 + entries * 13 > path.stat().st_size:
        raise CorruptFile(
            f"{path} describes more than it holds; it is truncated or damaged, download it again",
            filename=path.name,
        )
    return header


def check_safetensors(path: Path) -> None:
    """Raise CorruptFile unless the size of `path` is exactly what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_bytes(file.read(8), size)
        if length is None:
            raise CorruptFile(
                f"{path} is truncated or not a SafeTensors file; download it again",
                filename=path.name,
            )
        header = file.read(length)
    try:
        if not may_be_table(header):
            raise ValueError
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name[:2] != "__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CorruptFile(
            f"{path} has a header that cannot be read; download it again", filename=path.name
        ) from error
    if size != expected:
        raise CorruptFile(
            f"{path} has {size} bytes but should have {expected}; it is truncated or damaged, "
            "download it again",
            filename=path.name,
        )


def _names_beside(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()]


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _local_file(path: Path, filename: str) -> RemoteFile:
    return RemoteFile(
        filename, path.stat().st_size, None, format=artifact_format(filename), url=str(path)
    )


def _names_in(folder: Path) -> list[str]:
    """The files in a folder and in the folders directly in it, with `/`."""
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names += [
                f"{entry.name}/{inner.name}" for inner in os.scandir(entry) if inner.is_file()
            ]
        elif entry.is_file():
            names.append(entry.name)
    return sorted(names)


def _unreadable(path: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(
        f"cannot read {error.filename or path}: {error.strerror or error}", param="model"
    )
