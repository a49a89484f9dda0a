"""Where models come from: the Provider protocol and the nouns it speaks.

A provider turns a `ModelRef` into a `Resolved` (what exactly would be pulled) and then into
verified blobs. The hub, a path on disk and a package index are three providers (`providers`);
`install` treats all of them alike. Nothing here knows what the files mean beyond their format.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .events import EventSink
from .records import Adapter, Artifact, Revision

if TYPE_CHECKING:
    from .refs import ModelRef
    from .repository import Repository


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file a provider offers.

    At least one of the digests is known for every file that is to be downloaded; `git_sha1` is
    git's blob id (SHA-1 of `blob <size>\\0` and the content), which is all a hub knows of small
    files. `url` is a URL, or a path on disk for the provider `file`.
    """

    filename: str
    size: int  # bytes
    sha256: str | None  # 64 hex digits
    git_sha1: str | None = None  # 40 hex digits
    format: str = "other"  # safetensors | gguf | config | tokenizer | other
    url: str = ""

    @property
    def digest(self) -> str:
        """The strongest digest known, `<sha256>` or `git-<sha1>`; empty when there is none."""
        if self.sha256:
            return self.sha256
        return f"git-{self.git_sha1}" if self.git_sha1 else ""


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """The LoRA adapter to merge into a model: which, and its adapter_config.json."""

    adapter: Adapter
    config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Exactly what a reference means at its provider now.

    `variant` is lower case: for GGUF the quantisation of the chosen file ("q4_k_m"), or None when
    its name does not tell; for SafeTensors the recipe the reference names, or None when it names
    none. `default_variant` is what the bare name would choose (None for SafeTensors: the recipe
    that suits the machine).
    """

    ref: ModelRef
    display_name: str  # the name to install under unless the user gives another
    variant: str | None
    default_variant: str | None
    revision: Revision | None
    files: tuple[RemoteFile, ...]  # weights, config and tokenizer, nothing else
    config: dict[str, Any] | None  # config.json, where it could be read before the download
    source_format: str  # safetensors | gguf
    license: str = ""
    gguf_architecture: str | None = None  # as the file's first bytes say, where they were looked at
    gguf_experts: int = 0  # experts of a layer, likewise
    adapter: MergedAdapter | None = None  # its files are the last of `files`

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Provider(Protocol):
    """A place models come from."""

    def resolve(self, ref: ModelRef) -> Resolved:
        """What `ref` means now. Raises ModelNotFound, AccessDenied, UnsupportedModel, …"""
        ...

    def fetch(
        self,
        resolved: Resolved,
        repository: Repository,
        sink: EventSink,
        cancel: threading.Event,
    ) -> tuple[Artifact, ...]:
        """The verified files as blobs of `repository`, in the order of `resolved.files`.

        Emits `download` and `verify` events on the calling thread. Raises Cancelled within about
        a second once `cancel` is set; what was downloaded is kept for the next try.
        """
        ...


def artifacts_of(files: Sequence[RemoteFile], digests: Sequence[str]) -> tuple[Artifact, ...]:
    """Artifacts for `files` whose SHA-256 digests turned out to be `digests`."""
    return tuple(
        Artifact(filename=file.filename, size=file.size, sha256=digest, format=file.format)
        for file, digest in zip(files, digests, strict=True)
    )
