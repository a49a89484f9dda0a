"""Ollama's API: chat, generate, models, pull and delete. Wire formats are in ollama.py."""

from __future__ import annotations

import asyncio
import time

from quart import Blueprint, Response

from . import ollama
from .cards import ModelCard
from .limits import boolean_field
from .pull_wire import checked_reference, raising, to_status
from .services import json_body, services
from .streams import (
    NDJSON_TYPE,
    collect,
    error_line,
    frames,
    json_response,
    ndjson,
    primed,
    stream_response,
)

OLLAMA_VERSION = "0.33.0"  # the level of Ollama's API this one follows; clients gate features on it

routes = Blueprint("ollama", __name__)


@routes.get("/")
async def root() -> Response:
    """What Ollama's clients look for to see that a server is there."""
    return Response("Ollama is running", content_type="text/plain; charset=utf-8")


@routes.get("/api/version")
async def version() -> Response:
    """The version of Ollama whose API this is; our own is in /health."""
    return json_response({"version": OLLAMA_VERSION})


@routes.post("/api/chat")
async def chat() -> Response:
    """The next message of a conversation; without messages, load or unload the model."""
    body = await json_body("ollama")
    card = services().manager.card(ollama.model_name(body, "chat"))
    return await _answer(card, ollama.parse_chat(body, card))


@routes.post("/api/generate")
async def generate() -> Response:
    """The continuation of a prompt; without a prompt, load or unload the model."""
    body = await json_body("ollama")
    card = services().manager.card(ollama.model_name(body, "generate"))
    return await _answer(card, ollama.parse_generate(body, card))


async def _answer(card: ModelCard, call: ollama.GenerateCall | ollama.LoadCall) -> Response:
    manager, started, load_s = services().manager, time.monotonic(), 0.0
    if isinstance(call, ollama.LoadCall):
        if call.unload:
            await manager.unload(call.model)
        else:
            async with manager.acquire(card, call.keep_alive_s):
                pass
        return json_response(ollama.to_load_reply(call))

    def note_load(seconds: float) -> None:
        nonlocal load_s
        load_s = seconds

    source = manager.generate(card, call.request, call.keep_alive_s, note_load)
    deltas = await primed(source)
    reply = ollama.Reply(call, started=started, load_s=load_s)
    if call.stream:
        lines = frames(deltas, lambda delta: ndjson(reply.chunks(delta)), error_line)
        return stream_response(lines, NDJSON_TYPE)
    return json_response(reply.single(*await collect(deltas)))


@routes.get("/api/tags")
async def tags() -> Response:
    """All installed models."""
    return json_response(ollama.to_tags(services().manager.cards()))


@routes.get("/api/ps")
async def ps() -> Response:
    """The loaded models."""
    rows = []
    for model in await services().manager.loaded():
        if model.caps is None:
            continue
        expires_in_s = model.keep_alive_s if model.expires_in_s is None else model.expires_in_s
        size_bytes = model.status.memory_bytes or model.caps.weights_bytes
        on_gpu = model.caps.execution_provider.upper().startswith("CUDA")
        rows.append(
            ollama.Loaded(
                card=model.card,
                size_bytes=size_bytes,
                vram_bytes=size_bytes if on_gpu else 0,
                context_tokens=model.caps.context_tokens,
                expires_in_s=expires_in_s,
            )
        )
    return json_response(ollama.to_ps(rows))


@routes.post("/api/show")
async def show() -> Response:
    """Everything about one model."""
    body = await json_body("ollama")
    ollama.check_manage(body, "show")
    card = services().manager.card(ollama.model_name(body))
    verbose = boolean_field(body, "verbose", default=False)
    return json_response(ollama.to_show(card, verbose=verbose))


@routes.post("/api/pull")
async def pull() -> Response:
    """Pull a model, reported in Ollama's statuses."""
    body = await json_body("ollama")
    ollama.check_manage(body, "pull")
    reference = checked_reference(ollama.model_name(body))
    stream = boolean_field(body, "stream", default=True)
    events = await primed(raising(services().pulls.watch(reference)))
    if stream:
        lines = frames(events, lambda event: ndjson(to_status(event)), error_line)
        return stream_response(lines, NDJSON_TYPE)
    async for event in events:
        last = event
    return json_response(to_status(last)[-1])


@routes.delete("/api/delete")
async def delete() -> Response:
    """Remove a model."""
    body = await json_body("ollama")
    ollama.check_manage(body, "delete")
    async with services().manager.removing(ollama.model_name(body)) as name:
        await asyncio.to_thread(services().remove, name)
    return Response(b"", content_type="text/plain; charset=utf-8")
