"""OpenAI's API: chat completions and models. Wire formats are in openai.py."""

from __future__ import annotations

from quart import Blueprint, Response

from . import openai
from .services import json_body, services
from .streams import (
    SSE_DONE,
    SSE_TYPE,
    collect,
    error_event,
    frames,
    json_response,
    primed,
    sse,
    stream_response,
)

routes = Blueprint("openai", __name__)


@routes.post("/v1/chat/completions")
async def chat() -> Response:
    """One chat completion, streamed or whole."""
    body = await json_body("openai")
    manager = services().manager
    card = manager.card(openai.model_name(body))
    call = openai.parse_chat(body, card)
    reply = openai.ChatReply(call, card)
    deltas = await primed(manager.generate(card, call.request, call.keep_alive_s))
    if call.stream:
        events = frames(deltas, lambda delta: sse(reply.chunks(delta)), error_event, SSE_DONE)
        return stream_response(events, SSE_TYPE)
    text, last = await collect(deltas)
    assert last.finish_reason is not None
    assert last.usage is not None
    return json_response(reply.completion(text, last.finish_reason, last.usage))


@routes.get("/v1/models")
async def models() -> Response:
    """All installed models."""
    return json_response(openai.to_model_list(services().manager.cards()))


@routes.get("/v1/models/<path:name>")
async def model(name: str) -> Response:
    """One installed model; names have slashes, plain or encoded."""
    return json_response(openai.to_model(services().manager.card(name)))
