"""Ollama's wire format of chat, generate, tags, ps and show: no HTTP, no engine.

As in the OpenAI format every field is honoured, accepted because it cannot change the answer, or
refused by name. Texts that Ollama's clients look for are Ollama's own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ohmygpu.core.errors import InvalidRequest, ModelNotFound, OhMyGPUError
from ohmygpu.runtime_api import Delta, GenerateRequest, Message

from . import fields
from .cards import ModelCard
from .fields import parse_keep_alive
from .ollama_models import Loaded, timestamp, to_ps, to_show, to_tags
from .openai import finish_word
from .options import OPTION_NAMES, check_options

__all__ = [
    "GenerateCall",
    "LoadCall",
    "Loaded",
    "Reply",
    "check_manage",
    "error_body",
    "model_name",
    "model_not_found",
    "parse_chat",
    "parse_generate",
    "parse_keep_alive",
    "to_load_reply",
    "to_ps",
    "to_show",
    "to_tags",
]

Api = Literal["chat", "generate"]

# what Ollama samples with where neither the request nor the model says
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}

_HONOURED = frozenset({"model", "options", "stream", "keep_alive", "truncate"})
_HONOURED_BY = {
    "chat": _HONOURED | {"messages"},
    "generate": _HONOURED | {"prompt", "system", "context", "raw"},
}
_NO_EFFECT = frozenset({"metadata", "user"})

# fields whose plain values ask for nothing, and what to say to others
_NEUTRAL: dict[str, fields.Neutral] = {
    "_debug_render_only": (lambda value: value is False, "is not supported"),
    "format": (fields.is_empty, 'structured output is not supported; send null or ""'),
    "images": (fields.is_empty, "does not support images"),
    "logprobs": (lambda value: value is False, "log probabilities are not supported"),
    "shift": (lambda value: value is False, "the context never slides; only false is supported"),
    "suffix": (fields.is_empty, "does not support insert"),
    "template": (fields.is_empty, "the model's own chat template is used; send none, or use raw"),
    "tool_choice": (lambda value: value in ("none", "auto"), "does not support tools"),
    "tools": (fields.is_empty, "does not support tools"),
}

# the same for the requests about models
_MANAGE_FIELDS = {
    "show": frozenset({"model", "name", "verbose"}),
    "pull": frozenset({"model", "name", "stream"}),
    "delete": frozenset({"model", "name"}),
}
_CREDENTIALS = "is not used; set HF_TOKEN in the daemon's environment"
_OVERRIDE = "the model is shown as it is installed; send none"
_MANAGE_NEUTRAL: dict[str, dict[str, fields.Neutral]] = {
    "show": {
        "options": (fields.is_empty, _OVERRIDE),
        "system": (fields.is_empty, _OVERRIDE),
        "template": (fields.is_empty, _OVERRIDE),
    },
    "pull": {
        "insecure": (
            lambda value: value is False,
            "models come from the configured hub.endpoint alone; only false is supported",
        ),
        "password": (fields.is_empty, _CREDENTIALS),
        "username": (fields.is_empty, _CREDENTIALS),
    },
    "delete": {},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A parsed request; `keep_alive_s`: None = the server's, 0 = unload after it, inf = never."""

    api: Api
    model: str  # the name as the client sent it; replies carry it back
    request: GenerateRequest
    stream: bool
    keep_alive_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCall:
    """A request without a prompt: load the model, or unload it when `unload`."""

    api: Api
    model: str
    unload: bool
    keep_alive_s: float | None


# --- requests ------------------------------------------------------------------------------------


def model_name(body: dict[str, Any], api: Api | None = None) -> str:
    """The model a body names, by `model` or the deprecated `name`.

    Raises InvalidRequest "model is required"; ModelNotFound for generate, as Ollama does.
    """
    name = body.get("model") or (None if api else body.get("name"))
    if name is None or name == "":
        if api == "generate":
            raise ModelNotFound(model_not_found(""), name="")
        raise InvalidRequest("model is required", param="model")
    return fields.string(name, "model")


def check_manage(body: dict[str, Any], api: Literal["show", "pull", "delete"]) -> None:
    """Raise InvalidRequest naming a field that a request about a model cannot have."""
    for field, value in body.items():
        if value is None or field in _MANAGE_FIELDS[api]:
            continue
        if field not in _MANAGE_NEUTRAL[api]:
            raise fields.refuse(field[:80], f"unknown field; /api/{api} has no such field")
        fields.check_neutral(field, value, _MANAGE_NEUTRAL[api][field])


def parse_chat(body: dict[str, Any], card: ModelCard) -> GenerateCall | LoadCall:
    """Body of POST /api/chat → call. Raises InvalidRequest naming the field."""
    name = model_name(body, "chat")
    _check_generates(card, "chat", name)
    body = _checked(body, "chat", name)
    messages = _messages(body.get("messages", []), name)
    keep_alive_s = parse_keep_alive(body.get("keep_alive"))
    if not messages:
        return LoadCall(api="chat", model=name, unload=keep_alive_s == 0, keep_alive_s=keep_alive_s)
    if not card.has_template:
        raise InvalidRequest(
            f'"{name}" does not support chat; it has no chat template: use /api/generate',
            param="messages",
        )
    request = _request(body, card, messages=messages)
    return GenerateCall(
        api="chat", model=name, request=request, stream=_stream(body), keep_alive_s=keep_alive_s
    )


def parse_generate(body: dict[str, Any], card: ModelCard) -> GenerateCall | LoadCall:
    """Body of POST /api/generate → call. Raises InvalidRequest naming the field.

    The prompt becomes a user message after the system message; with `raw`, or when the model has no
    chat template, it is continued as it stands.
    """
    name = model_name(body, "generate")
    _check_generates(card, "generate", name)
    body = _checked(body, "generate", name)
    prompt = fields.string(body.get("prompt", ""), "prompt")
    system = fields.string(body.get("system", ""), "system")
    context = fields.token_ids(body.get("context", []), "context")
    raw = fields.boolean(body.get("raw", False), "raw")
    if raw and (system or context):
        raise InvalidRequest("raw mode does not support template, system, or context", param="raw")
    keep_alive_s = parse_keep_alive(body.get("keep_alive"))
    if not prompt:
        return LoadCall(
            api="generate", model=name, unload=keep_alive_s == 0, keep_alive_s=keep_alive_s
        )
    if raw or not card.has_template:
        if system:
            raise fields.refuse("system", f'"{name}" has no chat template; put it into the prompt')
        request = _request(
            body, card, prompt=prompt, context_tokens=context, return_context=not raw
        )
    else:
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", prompt))
        request = _request(
            body, card, messages=tuple(messages), context_tokens=context, return_context=True
        )
    return GenerateCall(
        api="generate", model=name, request=request, stream=_stream(body), keep_alive_s=keep_alive_s
    )


def _check_generates(card: ModelCard, api: Api, name: str) -> None:
    if card.embeds:
        raise InvalidRequest(
            f'"{name}" does not support {api}: it is an embedding model; use /api/embed',
            param="model",
        )


def _request(body: dict[str, Any], card: ModelCard, **prompt: Any) -> GenerateRequest:
    """The request's prompt with its options, the model's own defaults behind them."""
    options = check_options(body.get("options"))
    defaults = {**DEFAULTS, **card.compiled.generation}
    return GenerateRequest(
        sampling=fields.sampling(options, OPTION_NAMES, defaults, prefix="options."),
        context_limit=options.get("num_ctx"),
        truncate=fields.boolean(body.get("truncate", True), "truncate"),
        **prompt,
    )


def _stream(body: dict[str, Any]) -> bool:
    return fields.boolean(body.get("stream", True), "stream")


def _checked(body: dict[str, Any], api: Api, model: str) -> dict[str, Any]:
    """The fields that say something; raises for one that is not supported."""
    body = {field: value for field, value in body.items() if value is not None}
    for field, value in body.items():
        if field in _HONOURED_BY[api] or field in _NO_EFFECT:
            continue
        if field == "think":
            _check_think(value, model)
        elif field == "top_logprobs":
            _check_top_logprobs(value)
        elif field in _NEUTRAL:
            fields.check_neutral(field, value, _NEUTRAL[field], model)
        else:
            known = field in OPTION_NAMES or field == "num_ctx"
            advice = "put it into options" if known else "remove it: it might change the answer"
            raise InvalidRequest(f"{field[:80]}: unknown field; {advice}", param=field[:80])
    return body


def _check_think(value: Any, model: str) -> None:
    if value is False or value == "":
        return
    if value is not True and value not in ("high", "medium", "low", "max"):
        shown = value[:40] if isinstance(value, str) else fields.kind(value)
        raise InvalidRequest(
            f'invalid think value: "{shown}" '
            '(must be "high", "medium", "low", "max", true, or false)',
            param="think",
        )
    raise InvalidRequest(f'"{model}" does not support thinking', param="think")


def _check_top_logprobs(value: Any) -> None:
    if not 0 <= fields.integer(value, "top_logprobs") <= 20:
        raise InvalidRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
    if value:
        raise fields.refuse("top_logprobs", "log probabilities are not supported")


def _messages(value: Any, model: str) -> tuple[Message, ...]:
    entries = fields.listing(value, "messages", fields.MAX_MESSAGES)
    return tuple(
        _message(fields.mapping(entry, f"messages[{index}]"), f"messages[{index}]", model)
        for index, entry in enumerate(entries)
    )


def _message(entry: dict[str, Any], param: str, model: str) -> Message:
    role = entry.get("role")
    if not isinstance(role, str) or role.lower() not in fields.ROLES:
        raise fields.refuse(f"{param}.role", f"must be one of {', '.join(fields.ROLES)}")
    for field, what in (("images", "images"), ("tool_calls", "tools")):
        if not fields.is_empty(entry.get(field)):
            raise InvalidRequest(f'"{model}" does not support {what}', param=f"{param}.{field}")
    texts = {
        field: fields.string(entry[field], f"{param}.{field}") if entry.get(field) else None
        for field in ("content", "name", "tool_name", "tool_call_id", "thinking")
    }
    return Message(
        role=fields.ROLES[role.lower()],
        content=texts["content"] or "",
        name=texts["tool_name"] or texts["name"],
        tool_call_id=texts["tool_call_id"],
        reasoning=texts["thinking"],
    )


# --- replies -------------------------------------------------------------------------------------


class Reply:
    """Writes one reply: chunks, or the single object of `stream: false`.

    `load_s`: seconds the model took to load for this request; `total_duration` runs from `started`
    (time.monotonic()) to the last chunk. Durations are nanoseconds.
    """

    def __init__(self, call: GenerateCall, *, started: float, load_s: float) -> None:
        self._call = call
        self._started = started
        self._load_s = load_s

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Delta → 0 to 2 objects, the last of all with `done`; raises RuntimeFailure if aborted."""
        chunks = []
        if delta.text:
            chunks.append(_object(self._call, delta.text, done=False))
        if delta.finish_reason is not None:
            chunks.append(self.single("", delta))
        return chunks

    def single(self, text: str, last: Delta) -> dict[str, Any]:
        """The reply of `stream: false`: all text, and how it ended from the last Delta."""
        assert last.finish_reason is not None
        reply = _object(self._call, text, done=True)
        reply["done_reason"] = finish_word(last.finish_reason)
        if last.context is not None:
            reply["context"] = list(last.context)
        reply["total_duration"] = _nanoseconds(time.monotonic() - self._started)
        reply["load_duration"] = _nanoseconds(self._load_s)
        if last.usage is not None:
            usage = last.usage
            reply["prompt_eval_count"] = usage.prompt_tokens
            reply["prompt_eval_cached_count"] = usage.cached_tokens
            reply["prompt_eval_duration"] = _nanoseconds(usage.prefill_s)
            reply["eval_count"] = usage.completion_tokens
            reply["eval_duration"] = _nanoseconds(usage.decode_s)
            if usage.dropped_messages:
                reply["dropped_messages"] = usage.dropped_messages
        return reply


def to_load_reply(call: LoadCall) -> dict[str, Any]:
    """Reply to a LoadCall: done, with done_reason load or unload."""
    reply = _object(call, "", done=True)
    reply["done_reason"] = "unload" if call.unload else "load"
    return reply


def _object(call: GenerateCall | LoadCall, text: str, *, done: bool) -> dict[str, Any]:
    reply: dict[str, Any] = {"model": call.model, "created_at": timestamp(datetime.now(UTC))}
    if call.api == "chat":
        reply["message"] = {"role": "assistant", "content": text}
    else:
        reply["response"] = text
    reply["done"] = done
    return reply


def _nanoseconds(seconds: float) -> int:
    """Whole nanoseconds; at least 1, since clients divide by durations."""
    return max(1, round(seconds * 10**9))


# --- errors --------------------------------------------------------------------------------------


def error_body(error: OhMyGPUError) -> dict[str, str]:
    """{"error": "text"}; also the last line of a failed stream."""
    if isinstance(error, ModelNotFound) and "name" in error.details:
        text = model_not_found(str(error.details["name"]))
        suggestions = [str(each) for each in error.details.get("suggestions") or []]
        if suggestions:
            text += f", did you mean {' or '.join(repr(each) for each in suggestions)}?"
        return {"error": text}
    return {"error": error.message}


def model_not_found(name: str) -> str:
    """Ollama's text, which its CLI matches: model 'x' not found."""
    return f"model '{name}' not found"
