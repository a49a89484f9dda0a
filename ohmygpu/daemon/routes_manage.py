"""Management: health, pull, remove, unload and garbage collection, for the CLI and scripts."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from quart import Blueprint, Response

from ohmygpu import __version__
from ohmygpu.core.errors import InvalidRequest, OhMyGPUError
from ohmygpu.core.events import Event

from .limits import boolean_field, check_known, text_field
from .loaded import LoadedModel
from .pull_wire import checked_reference, raising
from .services import json_body, services
from .streams import (
    NDJSON_TYPE,
    frames,
    json_response,
    ndjson,
    primed,
    stream_response,
)

_PULL_FIELDS = frozenset({"model", "name", "recipe", "adapter", "verify", "export", "stream"})
_VERIFY_FIELDS = frozenset({"model", "stream"})
_UNLOAD_FIELDS = frozenset({"model"})
_GC_FIELDS = frozenset({"sources"})

routes = Blueprint("manage", __name__)


@routes.get("/health")
async def health() -> Response:
    """The state of the daemon and of the models it has loaded; 503 while it shuts down."""
    found = services()
    state = found.state
    body = {
        "status": "stopping" if state.draining else "ok",
        "version": __version__,
        "pid": os.getpid(),
        "url": state.url,
        "socket": str(state.socket_path) if state.socket_path else None,
        "home": str(found.settings.home),
        "uptime_s": round(time.monotonic() - state.started, 3),
        "models": [_row(model) for model in await found.manager.loaded()],
    }
    return json_response(body, 503 if state.draining else 200)


def _row(model: LoadedModel) -> dict[str, Any]:
    """`expires_in_s` is null while the model loads, is in use, or is kept for ever."""
    expires_in_s = model.expires_in_s
    finite = expires_in_s is not None and math.isfinite(expires_in_s)
    return {
        "name": model.card.name,
        "state": model.status.state,
        "running": model.status.running,
        "waiting": model.status.waiting,
        "memory_bytes": model.status.memory_bytes,
        "expires_in_s": expires_in_s if finite else None,
        "kept_forever": math.isinf(model.keep_alive_s),
        "execution_provider": model.caps.execution_provider if model.caps else None,
        "context_tokens": model.caps.context_tokens if model.caps else None,
    }


@routes.post("/v1/models/pull")
async def pull() -> Response:
    """Pull and compile a model. Lines of events, the last `done` or `error`; or the last alone."""
    body = await json_body("openai")
    check_known(body, _PULL_FIELDS)
    reference = checked_reference(_model(body))
    name, recipe = text_field(body, "name"), text_field(body, "recipe")
    adapter = text_field(body, "adapter")
    adapter = None if adapter is None else checked_reference(adapter)
    verify = boolean_field(body, "verify", default=False)
    export = boolean_field(body, "export", default=False)
    events = services().pulls.watch(
        reference, name=name, recipe=recipe, adapter=adapter, verify=verify, export=export
    )
    return await _events_response(events, boolean_field(body, "stream", default=True))


@routes.post("/v1/models/verify")
async def verify() -> Response:
    """Measure a model against its weights in float32. Lines of events, or the last alone."""
    body = await json_body("openai")
    check_known(body, _VERIFY_FIELDS)
    stream = boolean_field(body, "stream", default=True)
    record = services().manager.card(_model(body)).record
    return await _events_response(services().verifications.watch(record.full_name), stream)


async def _events_response(source: AsyncIterator[Event], stream: bool) -> Response:
    events = await primed(raising(source))
    if stream:
        lines = frames(events, lambda event: ndjson([event.to_dict()]), _error_line)
        return stream_response(lines, NDJSON_TYPE)
    async for event in events:
        last = event
    return json_response(last.to_dict())


@routes.delete("/v1/models/<path:name>")
async def remove(name: str) -> Response:
    """Remove a model, after the requests that use it."""
    async with services().manager.removing(name) as full_name:
        removed = await asyncio.to_thread(services().remove, full_name)
    body = {"id": full_name, "object": "model", "deleted": True}
    return json_response(body | {"freed_bytes": removed.freed_bytes})


@routes.post("/v1/models/unload")
async def unload() -> Response:
    """Unload a model; while it is in use, as soon as it is not ("unloaded": false)."""
    body = await json_body("openai")
    check_known(body, _UNLOAD_FIELDS)
    card = services().manager.card(_model(body))
    return json_response(
        {"id": card.name, "object": "model", "unloaded": await services().manager.unload(card.name)}
    )


@routes.post("/v1/models/gc")
async def collect_garbage() -> Response:
    """Remove what no installed model needs, with `sources` also the files models came from."""
    body = await json_body("openai", optional=True)
    check_known(body, _GC_FIELDS)
    sources = boolean_field(body, "sources", default=False)
    report = await asyncio.to_thread(services().collect_garbage, sources)
    return json_response(report.to_dict())


def _error_line(error: OhMyGPUError) -> bytes:
    return ndjson([Event("error", message=error.message, error=error).to_dict()])


def _model(body: dict[str, Any]) -> str:
    model = text_field(body, "model")
    if model is None:
        raise InvalidRequest("model is required", param="model")
    return model
