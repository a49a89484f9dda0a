"""Wire formats of embeddings, OpenAI's and Ollama's: pure functions, no HTTP, no engine.

Every field is honoured, accepted because it cannot change a vector, or refused by name.
"""

from __future__ import annotations

import array
import base64
import sys
from dataclasses import dataclass
from typing import Any, Literal

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.runtime_api import MAX_EMBED_INPUTS, EmbedRequest, EmbedResult

from . import fields
from .cards import ModelCard
from .fields import parse_keep_alive
from .options import check_options

Encoding = Literal["float", "base64"]

_OPENAI = frozenset({"model", "input", "encoding_format", "dimensions", "keep_alive", "num_ctx"})
_OPENAI |= {"prompt_name"}
_OLLAMA = {
    "embed": frozenset({"model", "input", "truncate", "dimensions", "keep_alive", "options"}),
    "embeddings": frozenset({"model", "prompt", "keep_alive", "options"}),
}
_NO_EFFECT = frozenset({"metadata", "user"})


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCall:
    """A parsed request; without `request` the model is to be loaded (`unload`: unloaded)."""

    model: str  # the name as the client sent it; replies carry it back
    request: EmbedRequest | None
    keep_alive_s: float | None  # None = the server's setting, 0 = unload after it, inf = never
    encoding: Encoding = "float"

    @property
    def unload(self) -> bool:
        """Whether a call without a request asks for the model to be unloaded."""
        return self.keep_alive_s == 0


# --- requests ------------------------------------------------------------------------------------


def parse_openai(body: dict[str, Any], card: ModelCard) -> EmbedCall:
    """Body of POST /v1/embeddings → call. Raises InvalidRequest naming the field.

    Beyond OpenAI's fields it honours keep_alive, num_ctx and `prompt_name`, which puts one of the
    model's own prompts before each text.
    """
    name = fields.string(body["model"], "model")
    body = _checked(body, _OPENAI)
    _check_embeds(card, name)
    inputs = _openai_inputs(body.get("input"))
    if "prompt_name" in body:
        inputs = _prompted(inputs, fields.string(body["prompt_name"], "prompt_name"), card)
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        shown = encoding[:40] if isinstance(encoding, str) else fields.kind(encoding)
        raise InvalidRequest(
            f"Invalid value for 'encoding_format' = {shown}. Supported values: ['float', "
            "'base64'].",
            param="encoding_format",
        )
    request = EmbedRequest(
        inputs=inputs,
        dimensions=_dimensions(body, card),
        context_limit=fields.integer(body["num_ctx"], "num_ctx", low=1)
        if "num_ctx" in body
        else None,
    )
    return EmbedCall(
        model=name,
        request=request,
        keep_alive_s=parse_keep_alive(body.get("keep_alive")),
        encoding="base64" if encoding == "base64" else "float",
    )


def parse_ollama(
    body: dict[str, Any], card: ModelCard, api: Literal["embed", "embeddings"]
) -> EmbedCall:
    """Body of POST /api/embed or of the older /api/embeddings → call.

    The first takes one text or several and gives vectors of length 1; the second one text, whose
    vector stays as the model makes it. Raises InvalidRequest naming the field.
    """
    name = fields.string(body["model"], "model")
    body = _checked(body, _OLLAMA[api])
    _check_embeds(card, name)
    options = check_options(body.get("options"))
    keep_alive_s = parse_keep_alive(body.get("keep_alive"))
    if api == "embed":
        texts = _ollama_inputs(body.get("input"))
    else:
        prompt = fields.string(body.get("prompt", ""), "prompt")
        texts = (prompt,) if prompt else ()
    request = None
    if texts:
        request = EmbedRequest(
            inputs=texts,
            truncate=fields.boolean(body.get("truncate", True), "truncate"),
            dimensions=_dimensions(body, card),
            normalize=api == "embed",
            context_limit=options.get("num_ctx"),
        )
    return EmbedCall(model=name, request=request, keep_alive_s=keep_alive_s)


def _checked(body: dict[str, Any], honoured: frozenset[str]) -> dict[str, Any]:
    body = {field: value for field, value in body.items() if value is not None}
    for field in body:
        if field not in honoured and field not in _NO_EFFECT:
            raise fields.refuse(
                field[:80], "unknown field; remove it, because it might change the vectors"
            )
    return body


def _check_embeds(card: ModelCard, name: str) -> None:
    if not card.embeds:
        raise InvalidRequest(
            f'"{name}" does not support embeddings: it generates text; pull an embedding model, '
            "such as sentence-transformers/all-MiniLM-L6-v2",
            param="model",
        )


def _openai_inputs(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (_text(value, "input"),)
    if value is None or value == []:
        raise InvalidRequest("input is required: a text, or a list of texts", param="input")
    if not isinstance(value, list):
        raise fields.refuse("input", f"must be a text or a list, not {fields.kind(value)}")
    entries = fields.listing(value, "input", fields.MAX_CONTEXT_TOKENS)
    if type(entries[0]) is int:
        return (fields.token_ids(entries, "input"),)
    _check_count(entries)
    inputs: list[str | tuple[int, ...]] = []
    for index, entry in enumerate(entries):
        place = f"input[{index}]"
        if isinstance(entry, list):
            inputs.append(fields.token_ids(entry, place))
            if not entry:
                raise fields.refuse(place, "is empty; send at least one token")
        else:
            inputs.append(_text(entry, place))
    return tuple(inputs)


def _text(value: Any, param: str) -> str:
    text = fields.string(value, param)
    if not text:
        raise fields.refuse(param, "is empty; send at least one character")
    return text


def _ollama_inputs(value: Any) -> tuple[str, ...]:
    if value is None or value in ("", []):
        return ()
    if isinstance(value, str):
        return (fields.string(value, "input"),)
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise InvalidRequest("invalid input type", param="input")
    _check_count(value)
    return tuple(fields.string(text, f"input[{index}]") for index, text in enumerate(value))


def _check_count(entries: list[Any]) -> None:
    fields.listing(entries, "input", MAX_EMBED_INPUTS)


def _dimensions(body: dict[str, Any], card: ModelCard) -> int | None:
    if "dimensions" not in body:
        return None
    return fields.integer(body["dimensions"], "dimensions", 1, card.compiled.embedding_length)


def _prompted(
    inputs: tuple[str | tuple[int, ...], ...], name: str, card: ModelCard
) -> tuple[str, ...]:
    prompts = card.compiled.prompts
    if name not in prompts:
        known = ", ".join(sorted(prompts)) or "none"
        raise fields.refuse("prompt_name", f"the model has no prompt {name[:40]!r}; it has {known}")
    texts = []
    for entry in inputs:
        if not isinstance(entry, str):
            raise fields.refuse("prompt_name", "a prompt cannot be put before token ids; send text")
        texts.append(prompts[name] + entry)
    return tuple(texts)


# --- replies -------------------------------------------------------------------------------------


def to_openai(call: EmbedCall, result: EmbedResult) -> dict[str, Any]:
    """Body of the reply to POST /v1/embeddings."""
    encode = _base64 if call.encoding == "base64" else _floats
    tokens = sum(result.prompt_tokens)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(result.vectors)
        ],
        "model": call.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def to_embed_reply(
    call: EmbedCall, result: EmbedResult | None, *, total_s: float, load_s: float
) -> dict[str, Any]:
    """Body of the reply to POST /api/embed; durations in nanoseconds."""
    if result is None:
        return {"model": call.model, "embeddings": []}
    return {
        "model": call.model,
        "embeddings": [_floats(vector) for vector in result.vectors],
        "total_duration": max(1, round(total_s * 10**9)),
        "load_duration": max(1, round(load_s * 10**9)),
        "prompt_eval_count": sum(result.prompt_tokens),
    }


def to_embeddings_reply(result: EmbedResult | None) -> dict[str, Any]:
    """Body of the reply to POST /api/embeddings."""
    return {"embedding": _floats(result.vectors[0]) if result is not None else []}


def _floats(vector: bytes) -> list[float]:
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")
