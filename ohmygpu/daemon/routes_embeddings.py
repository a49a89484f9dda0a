"""Embeddings, in OpenAI's and in Ollama's API. Wire formats are in embeddings.py."""

from __future__ import annotations

import time

from quart import Blueprint, Response

from ohmygpu.runtime_api import EmbedResult

from . import embeddings, ollama, openai
from .cards import ModelCard
from .services import json_body, services
from .streams import json_response

routes = Blueprint("embeddings", __name__)


@routes.post("/v1/embeddings")
async def openai_embeddings() -> Response:
    """One vector for each input, as numbers or in base64."""
    body = await json_body("openai")
    card = services().manager.card(openai.model_name(body))
    call = embeddings.parse_openai(body, card)
    result, _ = await _embed(card, call)
    assert result is not None  # an OpenAI request always has inputs
    return json_response(embeddings.to_openai(call, result))


@routes.post("/api/embed")
async def ollama_embed() -> Response:
    """One vector for each input; without input, load or unload the model."""
    started = time.monotonic()
    body = await json_body("ollama")
    card = services().manager.card(ollama.model_name(body))
    call = embeddings.parse_ollama({"model": card.name} | body, card, "embed")
    result, load_s = await _embed(card, call)
    total_s = time.monotonic() - started
    return json_response(embeddings.to_embed_reply(call, result, total_s=total_s, load_s=load_s))


@routes.post("/api/embeddings")
async def ollama_embeddings() -> Response:
    """The vector of one text, in Ollama's older form."""
    body = await json_body("ollama")
    card = services().manager.card(ollama.model_name(body))
    call = embeddings.parse_ollama({"model": card.name} | body, card, "embeddings")
    result, _ = await _embed(card, call)
    return json_response(embeddings.to_embeddings_reply(result))


async def _embed(card: ModelCard, call: embeddings.EmbedCall) -> tuple[EmbedResult | None, float]:
    """(the vectors, seconds the model took to load); without inputs, the load or unload alone."""
    manager = services().manager
    if call.request is None and call.unload:
        await manager.unload(call.model)
        return None, 0.0
    async with manager.acquire(card, call.keep_alive_s) as lease:
        if call.request is None:
            return None, lease.load_s
        return await lease.runtime.embed(call.request), lease.load_s
