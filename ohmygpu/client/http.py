"""The HTTP clients: `Client` blocks, `AsyncClient` is for asyncio. Both send the same requests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from typing import Any, Self

import httpx2

from ohmygpu.core.events import Event
from ohmygpu.runtime_api import Delta, Message

from .nouns import Address, ChatOptions, Health, ModelInfo
from .wire import (
    ChatDecoder,
    CompletionDecoder,
    EventDecoder,
    chat_body,
    completion_body,
    model_path,
    read_health,
    read_model,
    read_models,
    read_reply,
    translated,
)

CONNECT_S = 3.0
PROBE_S = 5.0  # health answers at once whatever else goes on
REPLY_S = 30.0  # for replies that need no model; a stream may stay silent while a model loads
_PROBE = httpx2.Timeout(PROBE_S, connect=CONNECT_S)
_QUICK = httpx2.Timeout(REPLY_S, connect=CONNECT_S)
_PATIENT = httpx2.Timeout(None, connect=CONNECT_S)
_IDENTITY = {"Accept-Encoding": "identity"}  # streams are split on bytes as they come


class Client:
    """One daemon, blocking. Not for several threads at once.

    Every method raises DaemonNotRunning when nothing answers, DaemonError when the answer breaks
    off, and otherwise the error that the daemon reports.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        transport = httpx2.HTTPTransport(
            verify=False,  # plain HTTP only: loading certificates would cost 20 ms
            uds=str(address.socket) if address.socket else None,
        )
        self._http = httpx2.Client(
            base_url=address.url, transport=transport, trust_env=False, timeout=_QUICK
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def health(self) -> Health:
        """The daemon's state and the models it holds in memory."""
        with translated(self.address):
            response = self._http.get("/health", timeout=_PROBE)
        return read_health(self.address, response.status_code, response.content)

    def models(self) -> list[ModelInfo]:
        """All installed models."""
        return read_models(self.address, self._call("GET", "/v1/models"))

    def model(self, name: str) -> ModelInfo:
        """One installed model. Raises ModelNotFound (details: suggestions)."""
        return read_model(self.address, self._call("GET", model_path(name)))

    def remove(self, name: str) -> int:
        """Remove an installed model, once nobody uses it; bytes freed."""
        reply = self._call("DELETE", model_path(name), timeout=_PATIENT)
        return int(reply.get("freed_bytes", 0))

    def unload(self, name: str) -> bool:
        """Free a model's memory; it stays installed. False when that waits for its requests."""
        return bool(self._call("POST", "/v1/models/unload", {"model": name}).get("unloaded", True))

    def gc(self, *, sources: bool = False) -> dict[str, Any]:
        """Remove what no record names; counts and `freed_bytes`."""
        return self._call("POST", "/v1/models/gc", {"sources": sources}, timeout=_PATIENT)

    def pull(
        self,
        reference: str,
        *,
        name: str | None = None,
        recipe: str | None = None,
        adapter: str | None = None,
        verify: bool = False,
        export: bool = False,
    ) -> Generator[Event, None, None]:
        """Progress of an install, `done` last; an `error` event is raised instead of yielded.

        Closing the iterator ends this view of the pull.
        """
        body = {
            "model": reference,
            "name": name,
            "recipe": recipe,
            "adapter": adapter,
            "verify": verify or None,
            "export": export or None,
        }
        body = {key: value for key, value in body.items() if value is not None}
        yield from self._events("/v1/models/pull", body)

    def verify(self, name: str) -> Generator[Event, None, None]:
        """Progress of measuring an installed model, as of `pull`; closing it stops that."""
        yield from self._events("/v1/models/verify", {"model": name})

    def _events(self, path: str, body: dict[str, Any]) -> Generator[Event, None, None]:
        decoder = EventDecoder(self.address)
        with self._stream(path, body) as response:
            for data in response.iter_raw():
                yield from decoder.feed(data)
                if decoder.finished:
                    return
        raise decoder.broken_off()

    def chat(
        self, model: str, messages: Sequence[Message], options: ChatOptions | None = None
    ) -> Generator[Delta, None, None]:
        """The answer as it is generated; closing the iterator stops it.

        The last Delta has `finish_reason` and `usage` (token counts only: times stay 0).
        """
        body = chat_body(model, messages, options)
        yield from self._deltas("/v1/chat/completions", body, ChatDecoder(self.address))

    def complete(
        self, model: str, prompt: str, options: ChatOptions | None = None
    ) -> Generator[Delta, None, None]:
        """How the model continues `prompt`, as of `chat`: for models without a chat template."""
        body = completion_body(model, prompt, options)
        yield from self._deltas("/api/generate", body, CompletionDecoder(self.address))

    def _deltas(
        self, path: str, body: dict[str, Any], decoder: ChatDecoder | CompletionDecoder
    ) -> Generator[Delta, None, None]:
        with self._stream(path, body) as response:
            for data in response.iter_raw():
                yield from decoder.feed(data)
                if decoder.finished:
                    return
        raise decoder.broken_off()

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout: httpx2.Timeout = _QUICK,
    ) -> dict[str, Any]:
        with translated(self.address):
            response = self._http.request(method, path, json=body, timeout=timeout)
        return read_reply(self.address, response.status_code, response.content)

    @contextlib.contextmanager
    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[httpx2.Response]:
        with (
            translated(self.address),
            self._http.stream(
                "POST", path, json=body, timeout=_PATIENT, headers=_IDENTITY
            ) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                read_reply(self.address, response.status_code, response.read())
            yield response


class AsyncClient:
    """One daemon, for asyncio: what MCP needs of it. Errors are those of `Client`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        transport = httpx2.AsyncHTTPTransport(
            verify=False,  # plain HTTP only: loading certificates would cost 20 ms
            uds=str(address.socket) if address.socket else None,
        )
        self._http = httpx2.AsyncClient(
            base_url=address.url, transport=transport, trust_env=False, timeout=_QUICK
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def health(self) -> Health:
        """The daemon's state and the models it holds in memory."""
        with translated(self.address):
            response = await self._http.get("/health", timeout=_PROBE)
        return read_health(self.address, response.status_code, response.content)

    async def models(self) -> list[ModelInfo]:
        """All installed models."""
        with translated(self.address):
            response = await self._http.get("/v1/models")
        reply = read_reply(self.address, response.status_code, response.content)
        return read_models(self.address, reply)

    async def chat(
        self, model: str, messages: Sequence[Message], options: ChatOptions | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The answer as it is generated; closing the iterator, or cancelling, stops it."""
        decoder = ChatDecoder(self.address)
        body = chat_body(model, messages, options)
        with translated(self.address):
            async with self._http.stream(
                "POST", "/v1/chat/completions", json=body, timeout=_PATIENT, headers=_IDENTITY
            ) as response:
                if response.status_code != httpx2.codes.OK:
                    read_reply(self.address, response.status_code, await response.aread())
                async for data in response.aiter_raw():
                    for delta in decoder.feed(data):
                        yield delta
                    if decoder.finished:
                        return
        raise decoder.broken_off()
