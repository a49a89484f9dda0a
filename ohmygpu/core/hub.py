"""The hub: what a repository holds, what there is to find, and its files as verified blobs.

Metadata and search go through huggingface_hub, whose HTTP client is replaced by the guarded one:
the token reaches the endpoint's origin only and replies are bounded. Files are fetched by our own
downloader, which resumes and verifies.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urljoin

from .download import Downloader
from .errors import CorruptFile, InvalidName, ModelNotFound, NetworkError, OhMyGPUError
from .gguf_header import HEAD_BYTES, architecture_of, expert_count_of
from .hashing import as_hex
from .http import (
    MAX_REDIRECTS,
    GuardedClient,
    origin_of,
    refuse_compressed,
    show_origin,
    with_retries,
)
from .hub_errors import explain_refusal
from .model_files import Select, artifact_format, check_filename, select_files
from .provider import RemoteFile, Resolved
from .records import Artifact, Revision
from .transfer import Patience

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

    from .events import EventSink
    from .refs import ModelRef
    from .repository import Repository
    from .settings import Settings

T = TypeVar("T")

_SEARCH_FIELDS = (
    "config", "downloads", "gated", "gguf", "library_name", "likes", "private", "safetensors",
    "tags", "usedStorage",
)  # fmt: skip
_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_session_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """A repository at one commit."""

    repo: str  # as the hub writes it
    commit: str  # 40 hex digits
    branch: str  # the branch, tag or commit asked for
    files: tuple[RemoteFile, ...]  # all of them; a digest may be missing where the hub gives none
    gated: bool
    private: bool
    architectures: tuple[str, ...]
    model_type: str | None
    license: str


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One search result. Sizes and types are None where the hub does not tell."""

    id: str
    downloads: int
    likes: int
    size_bytes: int | None
    model_type: str | None
    tags: tuple[str, ...]
    gated: bool
    has_gguf: bool
    has_safetensors: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "tags": list(self.tags)
        }


class Hub:
    """One hub endpoint, asked with one token or none."""

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token

    @property
    def authorization(self) -> str | None:
        """The header that carries the token."""
        return f"Bearer {self._token}" if self._token else None

    def resolve(self, repo: str, revision: str | None = None) -> RepoInfo:
        """The repository's files at the commit that `revision` (default: main) means now.

        Raises ModelNotFound (with suggestions), RevisionNotFound, AccessDenied, RateLimited,
        NetworkError.
        """

        def ask(api: HfApi) -> Any:
            return api.model_info(repo, revision=revision, files_metadata=True, timeout=30)

        try:
            info = self._call(ask, repo, revision)
        except ModelNotFound as error:
            suggestions = self._suggest(repo)
            if not suggestions:
                raise
            raise ModelNotFound(
                f"{error.message}; near names: {', '.join(suggestions)}",
                name=repo,
                suggestions=suggestions,
            ) from error
        return self._repo_info(repo, revision or "main", info)

    def small_file(self, repo: str, commit: str, filename: str, max_bytes: int) -> bytes:
        """The content of one file at `commit`. Raises CorruptFile when it is longer."""
        with GuardedClient(self.endpoint, self.authorization, max_reply_bytes=max_bytes) as client:
            url = self.file_url(repo, commit, filename)
            response = with_retries(lambda: client.get(url))
            if response.status_code != 200:
                raise self.explain(response, repo, commit) or NetworkError(
                    f"{show_origin(url)} answers with error {response.status_code} for {filename}"
                )
            return bytes(response.content)

    def first_bytes(self, url: str, count: int) -> bytes:
        """Up to `count` bytes from the start of a file; none when the hub does not give them now.

        The download that follows says why, or tries again.
        """
        import httpx2

        found = bytearray()
        try:
            with GuardedClient(self.endpoint, self.authorization, read_timeout_s=10) as client:
                wanted = client.build_request("GET", url, headers={"Range": f"bytes=0-{count - 1}"})
                response = client.send(wanted, stream=True)
                try:
                    if response.status_code in (200, 206):
                        refuse_compressed(response)
                        for piece in response.iter_raw():
                            found += piece
                            if len(found) >= count:
                                break
                finally:
                    response.close()
        except (NetworkError, httpx2.HTTPError):
            return b""
        return bytes(found[:count])

    def search(self, query: str, limit: int = 20) -> list[SearchHit]:
        """Models whose name matches `query`, most downloaded first."""

        def ask(api: HfApi, fields: list[Any] | None) -> list[Any]:
            return list(api.list_models(search=query, sort="downloads", limit=limit, expand=fields))

        try:
            found = self._call(lambda api: ask(api, list(_SEARCH_FIELDS)), query, None)
        except NetworkError as error:
            if error.details.get("status") != 400:
                raise
            # An older hub or a mirror that does not know every field.
            found = self._call(lambda api: ask(api, None), query, None)
        return [_search_hit(info) for info in found]

    def file_url(self, repo: str, commit: str, filename: str) -> str:
        """Where one file of `repo` is downloaded from."""
        return f"{self.endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(filename)}"

    def with_digests(self, files: Iterable[RemoteFile]) -> tuple[RemoteFile, ...]:
        """`files` with size and digest asked for where the file list lacks them."""
        with GuardedClient(self.endpoint, self.authorization) as client:
            return tuple(
                file if file.digest and file.size >= 0 else _ask_digest(client, file)
                for file in files
            )

    def explain(
        self, response: httpx2.Response, repo: str, revision: str | None
    ) -> OhMyGPUError | None:
        """The error that a refusal of this hub means; None when it says nothing special."""
        return explain_refusal(response, self.endpoint, repo, revision, bool(self._token))

    def _suggest(self, repo: str) -> list[str]:
        """A few existing models with a similar name; none when the search does not work."""
        try:
            return [hit.id for hit in self.search(repo.rsplit("/", 1)[-1], limit=3)]
        except OhMyGPUError:
            return []

    def _repo_info(self, repo: str, branch: str, info: Any) -> RepoInfo:
        commit = info.sha or ""
        if as_hex(commit, 40) != commit:
            raise NetworkError(f"{show_origin(self.endpoint)} names no commit for {repo}")
        name = info.id if info.id.lower() == repo.lower() else repo
        config = info.config if isinstance(info.config, dict) else {}
        files = []
        for sibling in info.siblings or []:
            lfs = sibling.lfs
            files.append(
                RemoteFile(
                    filename=sibling.rfilename,
                    size=_size(lfs.size if lfs else sibling.size),
                    sha256=as_hex(lfs.sha256 if lfs else None, 64),
                    git_sha1=None if lfs else as_hex(sibling.blob_id, 40),
                    format=artifact_format(sibling.rfilename),
                    url=self.file_url(name, commit, sibling.rfilename),
                )
            )
        return RepoInfo(
            repo=name,
            commit=commit,
            branch=branch,
            files=tuple(files),
            gated=bool(info.gated),
            private=bool(info.private),
            architectures=tuple(map(str, config.get("architectures") or ())),
            model_type=_model_type(info),
            license=next((tag[8:] for tag in info.tags or () if tag.startswith("license:")), ""),
        )

    def _call(self, ask: Callable[[HfApi], T], repo: str, revision: str | None) -> T:
        """What `ask` returns, its failures as our errors."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise NetworkError("HF_HUB_OFFLINE is set, so the hub is not asked; unset it to pull")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import httpx2
        from huggingface_hub import HfApi, close_session, set_client_factory
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        api = HfApi(endpoint=self.endpoint, token=self._token or False)
        # huggingface_hub has one HTTP client per process; ours belongs to one endpoint and token.
        with _session_lock:
            set_client_factory(lambda: GuardedClient(self.endpoint, self.authorization))
            try:
                return with_retries(lambda: ask(api))
            except HFValidationError as error:
                raise InvalidName(
                    f"{repo!r} is not a model's name on the hub", name=repo
                ) from error
            except HfHubHTTPError as error:
                raise self._refusal(error.response, repo, revision) from error
            except httpx2.HTTPError as error:
                raise NetworkError(f"{show_origin(self.endpoint)}: {error}") from error
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise NetworkError(
                    f"{show_origin(self.endpoint)} does not answer as a hub does "
                    f"({type(error).__name__}); check HF_ENDPOINT"
                ) from error
            finally:
                close_session()

    def _refusal(self, response: httpx2.Response, repo: str, revision: str | None) -> OhMyGPUError:
        explained = self.explain(response, repo, revision)
        if explained is not None:
            return explained
        return NetworkError(
            f"{show_origin(self.endpoint)} answers with error {response.status_code} for {repo}",
            status=response.status_code,
        )


class HubProvider:
    """Models of the hub, as a `Provider`."""

    def __init__(self, settings: Settings, patience: Patience | None = None) -> None:
        self.hub = Hub(settings.hub.endpoint, settings.hub.token)
        self._connections = settings.hub.connections
        self._patience = patience

    def resolve(self, ref: ModelRef, select: Select = select_files) -> Resolved:
        """What `ref` means at the hub now; `select` chooses among the repository's files."""
        info = self.hub.resolve(ref.repo, ref.revision)
        by_name = {file.filename: file for file in info.files}

        def read(name: str, max_bytes: int) -> bytes:
            if by_name[name].size > max_bytes:
                raise CorruptFile(f"{name} of {info.repo} has {by_name[name].size} bytes; refused")
            return self.hub.small_file(info.repo, info.commit, check_filename(name), max_bytes)

        chosen = select(by_name, ref.variant, read, info.repo)
        is_gguf = chosen.source_format == "gguf"
        head_url = by_name[chosen.filenames[0]].url
        head = self.hub.first_bytes(head_url, HEAD_BYTES) if is_gguf else b""
        return Resolved(
            ref=replace(ref, repo=info.repo),
            display_name=info.repo,
            variant=chosen.variant,
            default_variant=chosen.default_variant,
            revision=Revision(branch=info.branch, resolved_commit=info.commit),
            files=self.hub.with_digests(by_name[name] for name in chosen.filenames),
            config=chosen.config,
            source_format=chosen.source_format,
            license=info.license,
            gguf_architecture=architecture_of(head),
            gguf_experts=expert_count_of(head),
        )

    def fetch(
        self,
        resolved: Resolved,
        repository: Repository,
        sink: EventSink,
        cancel: threading.Event,
    ) -> tuple[Artifact, ...]:
        """The files as verified blobs."""
        repo = resolved.ref.repo
        revision = resolved.revision.resolved_commit if resolved.revision else None
        downloader = Downloader(
            self.hub.endpoint,
            self.hub.authorization,
            connections=self._connections,
            patience=self._patience,
            explain=lambda response: self.hub.explain(response, repo, revision),
        )
        return downloader.fetch(resolved.files, repository, sink, cancel)


def _ask_digest(client: GuardedClient, file: RemoteFile) -> RemoteFile:
    """`file` with what the headers of its address tell, before they lead away from the hub."""
    url = file.url
    for _ in range(MAX_REDIRECTS):
        response = with_retries(partial(client.head, url, follow_redirects=False))
        headers = response.headers
        target = urljoin(url, headers.get("location", ""))
        if not response.has_redirect_location or origin_of(target) != origin_of(url):
            break
        url = target
    etag = headers.get("x-linked-etag") or headers.get("etag") or ""
    etag = etag.strip().removeprefix("W/").strip('"')
    size = headers.get("x-linked-size") or headers.get("content-length") or ""
    sha256, git_sha1 = as_hex(etag, 64), as_hex(etag, 40)
    if response.status_code >= 400 or not size.isdigit() or not (sha256 or git_sha1):
        raise NetworkError(
            f"{show_origin(file.url)} tells neither size nor checksum of {file.filename}, so it "
            "could not be verified; refused"
        )
    return replace(file, size=int(size[:18]), sha256=sha256, git_sha1=git_sha1)


def _size(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 60 else -1


def _model_type(info: Any) -> str | None:
    """`model_type` of the config, or the architecture that a GGUF names."""
    config = info.config if isinstance(info.config, dict) else {}
    gguf = info.gguf if isinstance(info.gguf, dict) else {}
    value = config.get("model_type") or gguf.get("architecture")
    return str(value) if value else None


def _search_hit(info: Any) -> SearchHit:
    tags = tuple(map(str, info.tags or ()))
    return SearchHit(
        id=info.id,
        downloads=int(info.downloads or 0),
        likes=int(info.likes or 0),
        size_bytes=_weights_bytes(info),
        model_type=_model_type(info),
        tags=tags,
        gated=bool(info.gated),
        has_gguf="gguf" in tags or bool(info.gguf),
        has_safetensors="safetensors" in tags or bool(info.safetensors),
    )


def _weights_bytes(info: Any) -> int | None:
    """Bytes of the weights where the hub tells them, else of everything in the repository."""
    parameters = getattr(info.safetensors, "parameters", None)
    if isinstance(parameters, dict) and parameters:
        return sum(int(count) * _DTYPE_BYTES.get(name, 1) for name, count in parameters.items())
    used = info.used_storage
    return used if isinstance(used, int) and used > 0 else None
