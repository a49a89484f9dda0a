"""A hub on this machine that speaks the real hub's protocol, from plain folders.

    python tests/hub_server.py --root DIR [--port 0] [--log FILE] [--fault JSON]… [--token T]…

prints its address as the first line; `HF_ENDPOINT=<address>` then makes any client use it. See
`hub_repos` for the folders and `hub_faults` for what it can do wrong. Large files are redirected,
as the hub does, to another origin with a signature that expires: the same port as `localhost`.

Tokens: none = anonymous; `hf_reader` may read private and gated repositories; `hf_stranger` is
valid but may not; anything else is refused.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hub_faults import Fault, Faults, RequestLog
from tests.hub_repos import Repo, RepoFile, Snapshot, all_repos, find_repo, make_repo

__all__ = ["HubServer", "make_repo"]

READER, STRANGER = "hf_reader", "hf_stranger"
_PIECE_BYTES = 1 << 16
_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")


class HubServer:
    """The running hub; a context manager.

    `requests` is its log, `faults` what it does wrong. `uses_per_signature` makes the addresses
    of the content network expire after so many requests.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        log: Path | None = None,
        uses_per_signature: int = 1 << 30,
        page_size: int = 1000,
    ) -> None:
        self.root = root
        self.requests = RequestLog(log)
        self.faults = Faults()
        self.page_size = page_size
        self.uses_per_signature = uses_per_signature
        self.signed: dict[str, RepoFile] = {}
        self.uses_left: dict[str, int] = {}
        self.stopping = threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Server(("127.0.0.1", port), Handler)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn_url = f"http://localhost:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    def start(self) -> HubServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.requests.close()  # once the last request is logged

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def sign(self, file: RepoFile) -> str:
        """An address of the content network for `file`."""
        signature = f"{len(self.signed):08x}"
        self.signed[signature] = file
        self.uses_left[signature] = self.uses_per_signature
        return f"{self.cdn_url}/cdn/{file.sha256}?{urlencode({'signature': signature})}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle are the point of these tests."""


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def setup(self) -> None:
        # What sits in the kernel's buffers when a client dies was sent but never received.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Stay silent; there is a log of our own."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    # -------------------------------------------------------------- request and reply

    def _handle(self) -> None:
        hub = self.server_hub
        split = urlsplit(self.path)
        self.entry: dict[str, Any] = {
            "time": round(time.time(), 3),
            "method": self.command,
            "host": self.headers.get("Host", ""),
            "path": unquote(split.path),
            "query": split.query,
            "range": self.headers.get("Range"),
            "accept_encoding": self.headers.get("Accept-Encoding"),
            "authorization": "Authorization" in self.headers,
            "status": 0,
            "bytes": 0,
        }
        self.is_logged = False
        hub.requests.begin()
        self.broken = hub.faults.take(self.command, unquote(split.path))
        try:
            if "silence" in self.broken:
                self._hang()
            elif fault := self.broken.get("status"):
                self._reply(fault["status"], {"error": "injected"}, fault.get("headers", {}))
            elif fault := self.broken.get("redirect"):
                self._reply(302, b"", {"Location": fault["location"] or self.path})
            else:
                self._route(split.path, parse_qs(split.query))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        finally:
            if not self.is_logged:
                hub.requests.add(self.entry)

    def _hang(self) -> None:
        """Do nothing until the server stops."""
        self.is_logged = True
        self.server_hub.requests.add(self.entry)
        self.server_hub.stopping.wait()
        self.close_connection = True

    def _reply(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        """A whole short reply; anything but bytes is sent as JSON."""
        headers = dict(headers or {})
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
        if fault := self.broken.get("gzip"):
            body = gzip.compress(bytes(fault["bomb_bytes"]) if "bomb_bytes" in fault else body)
            headers["Content-Encoding"] = "gzip"
        if fault := self.broken.get("endless"):
            self._begin(status, headers | {"Connection": "close"})
            self.wfile.write(body)
            self._send_forever(fault)
            return
        self._begin(status, headers | {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.entry["bytes"] += len(body)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.entry["status"] = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _error(self, status: int, code: str, message: str, **headers: str) -> None:
        extra = {"X-Error-Code": code} if code else {}
        self._reply(status, {"error": message}, {**extra, "X-Error-Message": message, **headers})

    # -------------------------------------------------------------- routes

    def _route(self, path: str, query: dict[str, list[str]]) -> None:
        if path.startswith("/cdn/"):
            self._cdn(query)
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in (READER, STRANGER):
            self._error(401, "", "Invalid credentials in Authorization header")
            return
        if path == "/api/models":
            self._search(query)
        elif match := re.fullmatch(
            r"/api/models/(?P<id>[^/]+/[^/]+?)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+).*)?", path
        ):
            self._metadata(
                match["id"], match["what"], unquote(match["rev"] or "main"), query, token
            )
        elif match := re.fullmatch(
            r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)", path
        ):
            self._resolve(match["id"], unquote(match["rev"]), unquote(match["file"]), token)
        else:
            self._error(404, "", "Sorry, we can't find the page you are looking for.")

    def _find(self, id_: str, revision: str, token: str) -> tuple[Repo, Snapshot] | None:
        """The repository at a revision if this client may know of it; otherwise replies."""
        repo = find_repo(self.server_hub.root, unquote(id_))
        if repo is None or (repo.meta.get("private") and token != READER):
            if token:
                self._error(404, "RepoNotFound", "Repository not found")
            else:
                self._error(401, "RepoNotFound", "Invalid username or password.")
            return None
        if repo.id != unquote(id_):
            target = self.path.replace(id_, quote(repo.id), 1)
            self._reply(307, b"", {"Location": target})
            return None
        if repo.meta.get("disabled"):
            self._error(403, "", "Access to this resource is disabled.")
            return None
        snapshot = repo.snapshot(revision)
        if snapshot is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, snapshot

    def _search(self, query: dict[str, list[str]]) -> None:
        hub = self.server_hub
        words = query.get("search", [""])[0].lower()
        found = []
        for repo in all_repos(hub.root):
            snapshot = repo.snapshot("main")
            if snapshot is None or repo.meta.get("private") or words not in repo.id.lower():
                continue
            info = repo.describe(snapshot, blobs=False)
            if all(tag in info["tags"] for tag in query.get("filter", [])):
                found.append(info)
        sort = query.get("sort", ["downloads"])[0]
        found.sort(key=lambda info: info.get(sort) or 0, reverse=True)
        first = int(query.get("cursor", ["0"])[0])
        size = min(int(query.get("limit", [str(hub.page_size)])[0]), hub.page_size)
        page = [_narrow(info, query) for info in found[first : first + size]]
        headers = {}
        if first + size < len(found):
            rest = urlencode({**query, "cursor": str(first + size)}, doseq=True)
            headers["Link"] = f'<{hub.url}/api/models?{rest}>; rel="next"'
        self._reply(200, page, headers)

    def _metadata(
        self, id_: str, what: str | None, revision: str, query: dict[str, list[str]], token: str
    ) -> None:
        found = self._find(id_, revision, token)
        if found is None:
            return
        repo, snapshot = found
        if what == "tree":
            self._reply(200, repo.tree(snapshot))
            return
        blobs = query.get("blobs", ["false"])[0].lower() in ("true", "1")
        self._reply(200, _narrow(repo.describe(snapshot, blobs=blobs), query))

    def _resolve(self, id_: str, revision: str, name: str, token: str) -> None:
        found = self._find(id_, revision, token)
        if found is None:
            return
        repo, snapshot = found
        commit = {"X-Repo-Commit": snapshot.commit}
        if repo.meta.get("gated") and token != READER:
            self._error(
                401 if not token else 403, "GatedRepo", f"Access to model {repo.id} is restricted"
            )
            return
        file = snapshot.files.get(name)
        if file is None:
            self._error(404, "EntryNotFound", "Entry not found", **commit)
            return
        etag = self.broken.get("etag", {}).get("value")
        if not file.is_lfs:
            self._file(file, commit | {"ETag": f'"{etag or file.git_sha1}"'})
            return
        linked = {"X-Linked-ETag": f'"{etag or file.sha256}"', "X-Linked-Size": str(file.size)}
        self._reply(302, b"", commit | linked | {"Location": self.server_hub.sign(file)})

    def _cdn(self, query: dict[str, list[str]]) -> None:
        """The content network: knows signatures, not tokens."""
        hub, signature = self.server_hub, query.get("signature", [""])[0]
        file = hub.signed.get(signature)
        is_here = self.entry["host"].startswith("localhost")
        if file is None or hub.uses_left[signature] <= 0 or not is_here:
            self._reply(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        hub.uses_left[signature] -= 1
        etag = self.broken.get("etag", {}).get("value")
        self._file(file, {"ETag": f'"{etag or file.sha256}"'})

    # -------------------------------------------------------------- bodies

    def _file(self, file: RepoFile, headers: dict[str, str]) -> None:
        """A file's content or the asked range of it, with whatever is to go wrong."""
        start, end, status = 0, file.size, 200
        asked = _RANGE.match(self.headers.get("Range") or "")
        if asked and "ignore_range" not in self.broken:
            start = int(asked[1])
            end = min(file.size, int(asked[2]) + 1 if asked[2] else file.size)
            status = 206
            if start >= file.size:
                self._reply(416, b"", {"Content-Range": f"bytes */{file.size}"})
                return
        self.entry |= {"file": file.name, "start": start, "end": end}
        if status == 206:
            start += self.broken.get("range_start", {}).get("by", 0)
            total = file.size + self.broken.get("range_total", {}).get("by", 0)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "gzip" in self.broken:
            self._reply(status, file.path.read_bytes()[start:end], headers)
            return
        if "endless" in self.broken:
            headers["Connection"] = "close"
            self.close_connection = True
        else:
            length = end - start + self.broken.get("length", {}).get("by", 0)
            headers["Content-Length"] = str(length)
        self._begin(status, headers)
        if self.command == "HEAD":
            return
        self._body(file, start, end)
        if "length" in self.broken:
            self.close_connection = True
        if fault := self.broken.get("endless"):
            self._send_forever(fault)

    def _body(self, file: RepoFile, start: int, end: int) -> None:
        drop, stall = self.broken.get("drop"), self.broken.get("stall")
        corrupt, slow = self.broken.get("corrupt"), self.broken.get("slow")
        limit = min((int(fault["after"]) for fault in (drop, stall) if fault), default=end - start)
        end = min(end, start + limit)
        size = max(1, int(slow["bytes_per_s"]) // 20) if slow else _PIECE_BYTES
        with file.path.open("rb") as stream:
            stream.seek(start)
            while start < end:
                piece = bytearray(stream.read(min(size, end - start)))
                if corrupt and start <= corrupt["at"] < start + len(piece):
                    piece[corrupt["at"] - start] ^= 0xFF
                self.wfile.write(piece)
                self.entry["bytes"] += len(piece)
                start += len(piece)
                if slow and self.server_hub.stopping.wait(0.05):
                    break
        if stall:
            self._hang()
        if stall or drop:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send_forever(self, fault: Fault) -> None:
        """Bytes until the client closes, or a gigabyte."""
        self.close_connection = True
        for _ in range(fault.get("bytes", 1 << 30) // _PIECE_BYTES):
            self.wfile.write(bytes(_PIECE_BYTES))
            self.entry["bytes"] += _PIECE_BYTES


def _narrow(info: dict[str, Any], query: dict[str, list[str]]) -> dict[str, Any]:
    """With `expand` the hub answers with the named properties only."""
    wanted = query.get("expand")
    if not wanted:
        return info
    return {key: value for key, value in info.items() if key in ("_id", "id", "modelId", *wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--fault", action="append", default=[], help="JSON, see hub_faults")
    parser.add_argument("--uses-per-signature", type=int, default=1 << 30)
    options = parser.parse_args()
    with HubServer(
        options.root,
        port=options.port,
        log=options.log,
        uses_per_signature=options.uses_per_signature,
    ) as hub:
        for fault in options.fault:
            hub.faults.add(**json.loads(fault))
        end = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: end.set())
        print(hub.url, flush=True)
        end.wait()


if __name__ == "__main__":
    main()
