"""A daemon for tests: it speaks the routes that the client uses, and answers as it was told to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ohmygpu.client import ModelInfo
from ohmygpu.core.errors import ModelNotFound, OhMyGPUError

CREATED = 1_700_000_000


@dataclass
class Answer:
    """One scripted reply to a chat request."""

    pieces: list[str] = field(default_factory=lambda: ["Hello", " there", "!"])
    finish: str = "stop"
    hold_after: int | None = None  # pieces sent before it waits for `released`, or for the client
    released: threading.Event = field(default_factory=threading.Event)
    refusal: OhMyGPUError | None = None  # instead of an answer
    status: int = 400  # of the refusal
    error: OhMyGPUError | None = None  # after the pieces, inside the stream
    cut: bool = False  # the connection dies after the pieces


class FakeDaemon:
    """Listens on a port of its own, in threads; `requests` holds (method, path, body)."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.models: list[ModelInfo] = []
        self.loaded: list[dict[str, Any]] = []
        self.answers: deque[Answer] = deque()
        self.pulls: deque[list[dict[str, Any]]] = deque()
        self.requests: list[tuple[str, str, Any]] = []
        self.holding = threading.Event()  # a scripted answer waits
        self.client_left = threading.Event()
        self.status = "ok"
        self.health_text: str | None = None  # instead of the usual body
        daemon = self

        class Handler(_Handler):
            fake = daemon

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> FakeDaemon:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def enqueue(self, *pieces: str, **changes: Any) -> Answer:
        """Script the next answer."""
        answer = Answer(pieces=list(pieces), **changes)
        self.answers.append(answer)
        return answer

    def chats(self) -> list[Any]:
        """Bodies of the chat requests so far."""
        return [body for _, path, body in self.requests if path == "/v1/chat/completions"]

    def completions(self) -> list[Any]:
        """Bodies of the requests to continue a text so far."""
        return [body for _, path, body in self.requests if path == "/api/generate"]

    def paths(self) -> list[str]:
        """Method and path of all requests but health."""
        return [f"{verb} {path}" for verb, path, _ in self.requests if path != "/health"]

    def health(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "version": "0.1.0",
            "pid": os.getpid(),
            "url": self.url,
            "socket": None,
            "home": str(self.home),
            "uptime_s": 75.5,
            "models": self.loaded,
        }

    def find(self, name: str) -> ModelInfo:
        for model in self.models:
            if name.removesuffix(":latest") in (model.name, model.record.full_name):
                return model
        near = [model.name for model in self.models]
        raise ModelNotFound(f"{name} is not installed", suggestions=near)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are part of the tests: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeDaemon

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep the tests' output clean."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        raw = self.rfile.read(length)
        body = json.loads(raw) if raw else None
        path = unquote(self.path)
        self.fake.requests.append((self.command, path, body))
        try:
            self._route(path, body)
        except OhMyGPUError as error:
            self._refuse(404, error)
        except (BrokenPipeError, ConnectionResetError):
            self.fake.client_left.set()

    def _route(self, path: str, body: Any) -> None:
        fake = self.fake
        if path == "/health":
            if fake.health_text is not None:
                self._reply(200, fake.health_text.encode())
            else:
                self._json(200 if fake.status == "ok" else 503, fake.health())
        elif path == "/v1/chat/completions":
            self._chat(body)
        elif path == "/api/generate":
            self._generate(body)
        elif path in ("/v1/models/pull", "/v1/models/verify"):
            self._pull()
        elif path == "/v1/models/unload":
            name = fake.find(body["model"]).name
            self._json(200, {"id": name, "object": "model", "unloaded": True})
        elif path == "/v1/models/gc":
            self._json(200, {"freed_bytes": 5_000_000, "blobs": 2, "sources": 0, "damaged": []})
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [to_wire(entry) for entry in fake.models]})
        elif self.command == "DELETE":
            model = fake.find(path.removeprefix("/v1/models/"))
            fake.models.remove(model)
            self._json(200, {"id": model.name, "deleted": True, "freed_bytes": 138_000_000})
        else:
            self._json(200, to_wire(fake.find(path.removeprefix("/v1/models/"))))

    def _chat(self, body: dict[str, Any]) -> None:
        answer = self.fake.answers.popleft()
        if answer.refusal is not None:
            self._refuse(answer.status, answer.refusal)
            return
        with self._stream("text/event-stream"):
            self._chunk(b": comments keep the connection alive\n\n")
            for index, piece in enumerate(answer.pieces):
                if index == answer.hold_after:
                    self._hold(answer)
                self._event(_chunk(body["model"], {"content": piece}))
            if answer.hold_after is not None and answer.hold_after >= len(answer.pieces):
                self._hold(answer)
            if answer.cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if answer.error is not None:
                self._event(_error(answer.error))
                return
            self._event(_chunk(body["model"], {}, answer.finish))
            usage = {"prompt_tokens": 7, "completion_tokens": len(answer.pieces), "total_tokens": 9}
            self._event({**_chunk(body["model"], {}), "choices": [], "usage": usage})
            self._chunk(b"data: [DONE]\n\n")

    def _generate(self, body: dict[str, Any]) -> None:
        answer = self.fake.answers.popleft()
        if answer.refusal is not None:
            self._json(answer.status, {"error": answer.refusal.message})
            return
        with self._stream("application/x-ndjson"):
            for piece in answer.pieces:
                entry = {"model": body["model"], "response": piece, "done": False}
                self._chunk(json.dumps(entry).encode() + b"\n")
            if answer.error is not None:
                self._chunk(json.dumps({"error": answer.error.message}).encode() + b"\n")
                return
            if answer.cut:
                return
            last = {"response": "", "done": True, "done_reason": answer.finish}
            last |= {"prompt_eval_count": 7, "eval_count": len(answer.pieces)}
            self._chunk(json.dumps(last).encode() + b"\n")

    def _hold(self, answer: Answer) -> None:
        """Wait until the test goes on or the client leaves."""
        self.fake.holding.set()
        while not answer.released.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError

    def _pull(self) -> None:
        events = self.fake.pulls.popleft()
        with self._stream("application/x-ndjson"):
            for event in events:
                if event.get("phase") == "hold":
                    self._hold(Answer())
                elif event.get("phase") == "cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                else:
                    self._chunk(json.dumps(event).encode() + b"\n")

    @contextlib.contextmanager
    def _stream(self, kind: str) -> Iterator[None]:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        yield
        with contextlib.suppress(OSError):
            self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, data: dict[str, Any]) -> None:
        self._reply(status, json.dumps(data).encode())

    def _refuse(self, status: int, error: OhMyGPUError) -> None:
        self._json(status, _error(error))

    def _reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json; charset=utf-8")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _chunk(model: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": model,
        "choices": [choice],
    }


def _error(error: OhMyGPUError) -> dict[str, Any]:
    body = {"message": error.message, "type": "x", "param": None, "code": error.code}
    return {"error": {**body, "details": error.details}}


def to_wire(model: ModelInfo) -> dict[str, Any]:
    """An installed model as `GET /v1/models` shows it."""
    return {
        "id": f"{model.record.name}:latest",
        "object": "model",
        "created": CREATED,
        "owned_by": "org",
        "ohmygpu": {
            **model.record.to_dict(),
            "quantization": model.quantization,
            "parameters": model.parameters,
            "context_length": model.context_tokens,
            "target": model.target,
            "license": model.license,
            "chat": model.has_template,
        },
    }
