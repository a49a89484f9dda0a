"""A Python package index (the Simple API, as JSON or HTML): which wheel a package name means.

Formats: https://packaging.python.org/en/latest/specifications/simple-repository-api/
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from .errors import ModelNotFound, NetworkError, RevisionNotFound, UnsupportedModel
from .hashing import as_hex
from .http import GuardedClient, check_hop, show_origin, with_retries

_ACCEPT = (
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, "
    "text/html;q=0.01"
)


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel of a package. `url` is a `file:` URL on an index that is a folder."""

    filename: str
    version: Version
    url: str
    sha256: str | None  # None only where the index does not tell
    is_yanked: bool


class PackageIndex:
    """A package index. A user name and password in its address are sent to its origin only."""

    def __init__(self, address: str) -> None:
        self.url, self.authorization = split_credentials(address.rstrip("/"))

    def find_wheel(self, package: str, version: str | None) -> Wheel:
        """The newest wheel of `package` that any Python can read, or the one of `version`.

        Raises ModelNotFound, RevisionNotFound, UnsupportedModel (no such wheel), NetworkError.
        """
        page_url, content_type, body = self._page(package)
        links = _json_links(body) if "json" in content_type else _html_links(body)
        wheels = list(_wheels(links, package, page_url))
        where = self._where
        if not wheels:
            raise UnsupportedModel(
                f"the package {package} on {where} has no wheel that works everywhere, so there "
                "is no model in it to use"
            )
        if version is not None:
            wanted = _version(version)
            exact = [wheel for wheel in wheels if wheel.version == wanted]
            if not exact:
                known = ", ".join(sorted({str(wheel.version) for wheel in wheels})[-10:])
                raise RevisionNotFound(
                    f"the package {package} has no version {version} on {where}; it has {known}",
                    name=package,
                    revision=version,
                )
            return exact[-1]
        offered = [wheel for wheel in wheels if not wheel.is_yanked]
        if not offered:
            raise RevisionNotFound(
                f"every version of the package {package} was withdrawn; name one to use it "
                f"anyway, as in pypi:{package}@{wheels[-1].version}",
                name=package,
            )
        final = [wheel for wheel in offered if not wheel.version.is_prerelease]
        return max(final or offered, key=lambda wheel: wheel.version)

    @property
    def _where(self) -> str:
        return show_origin(self.url) if not self.url.startswith("file:") else "the package index"

    def _page(self, package: str) -> tuple[str, str, bytes]:
        """(its address, its type, its content) of the package's page."""
        url = f"{self.url}/{canonicalize_name(package)}/"
        if url.startswith("file:"):
            return self._local_page(package, url)
        with GuardedClient(self.url, self.authorization) as client:
            response = with_retries(lambda: client.get(url, headers={"Accept": _ACCEPT}))
        if response.status_code == 404:
            raise self._missing(package)
        if response.status_code != 200:
            raise NetworkError(
                f"{self._where} answers with error {response.status_code} for the package "
                f"{package}; check the address of the package index",
            )
        content_type = response.headers.get("content-type", "")
        return str(response.request.url), content_type, bytes(response.content)

    def _local_page(self, package: str, url: str) -> tuple[str, str, bytes]:
        try:
            return url, "text/html", local_path(url + "index.html").read_bytes()
        except OSError as error:
            raise self._missing(package) from error

    def _missing(self, package: str) -> ModelNotFound:
        return ModelNotFound(
            f"{self._where} has no package {package}; check the name and the package index",
            name=package,
            suggestions=[],
        )


def split_credentials(address: str) -> tuple[str, str | None]:
    """(address without user name and password, the header that carries them or None)."""
    parts = urlsplit(address)
    if "@" not in parts.netloc:
        return address, None
    login, _, host = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    pair = f"{unquote(user)}:{unquote(password)}".encode()
    header = f"Basic {base64.b64encode(pair).decode()}"
    return urlunsplit(parts._replace(netloc=host)), header


def local_path(url: str) -> Path:
    """The path that a `file:` URL names."""
    return Path(url2pathname(urlsplit(url).path))


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def _wheels(
    links: Iterable[tuple[str, str, str | None, bool]], package: str, page_url: str
) -> Iterable[Wheel]:
    """The pure-Python wheels among the links: what is inside does not depend on the machine."""
    for filename, href, sha256, is_yanked in links:
        if not filename.endswith(".whl"):
            continue
        try:
            name, version, _, tags = parse_wheel_filename(filename)
        except InvalidWheelFilename:
            continue
        if name != canonicalize_name(package) or not any(
            tag.abi == "none" and tag.platform == "any" for tag in tags
        ):
            continue
        url, _ = urldefrag(urljoin(page_url, href))
        if not (page_url.startswith("file:") and url.startswith("file:")):
            check_hop(page_url if not page_url.startswith("file:") else url, url)
        url, _ = split_credentials(url)
        yield Wheel(filename, version, url, sha256, is_yanked)


def _json_links(body: bytes) -> Iterable[tuple[str, str, str | None, bool]]:
    """(filename, address, sha256, yanked) of each file of a JSON page."""
    try:
        page = json.loads(body)
        entries: list[dict[str, Any]] = page["files"]
        for entry in entries:
            sha256 = as_hex((entry.get("hashes") or {}).get("sha256"), 64)
            is_yanked = entry.get("yanked", False) is not False
            yield str(entry["filename"]), str(entry["url"]), sha256, is_yanked
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NetworkError("the package index does not answer as one; check its address") from error


class _Page(HTMLParser):
    """Collects the links of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, bool]] = []
        self.base = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            self.links.append((found["href"] or "", "data-yanked" in found))
        elif tag == "base" and found.get("href") and not self.base:
            self.base = found["href"] or ""


def _html_links(body: bytes) -> Iterable[tuple[str, str, str | None, bool]]:
    """(filename, address, sha256, yanked) of each link of an HTML page."""
    page = _Page()
    page.feed(body.decode("utf-8", errors="replace"))
    for href, is_yanked in page.links:
        address = urljoin(page.base, href)
        parts = urlsplit(address)
        sha256 = as_hex(parse_qs(parts.fragment).get("sha256", [""])[0], 64)
        yield unquote(parts.path.rsplit("/", 1)[-1]), address, sha256, is_yanked
