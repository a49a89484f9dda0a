"""The OpenAI wire format of chat completions and models: pure functions, no HTTP, no engine.

Every field of a request is honoured, accepted because it cannot change the answer, or refused by
name; `_NO_EFFECT`, `_NEUTRAL` and `_HONOURED` are the whole list (docs/http-api.md says it in
words).
"""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from ohmygpu.core.errors import InvalidRequest, OhMyGPUError, RuntimeFailure
from ohmygpu.runtime_api import Delta, FinishReason, GenerateRequest, Message, Usage

from . import fields
from .cards import ModelCard
from .options import OPTION_NAMES, check_options

# what OpenAI's reference gives as defaults; the model's own sampling defaults come before them
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}

# field → sampling parameter; of two names for one parameter the first wins
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_window",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "seed": "seed",
    "stop": "stop",
    "max_completion_tokens": "max_tokens",
    "max_tokens": "max_tokens",
}
_HONOURED = frozenset(_SAMPLING) | frozenset(
    {"model", "messages", "stream", "stream_options", "keep_alive", "num_ctx", "options"}
)

# labels, billing, storage and hints: nothing of an answer depends on them
_NO_EFFECT = frozenset(
    {
        "cache_prompt",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# fields whose plain values ask for nothing, and what to say to others
_NEUTRAL: dict[str, fields.Neutral] = {
    "audio": (fields.is_empty, "audio output is not supported"),
    "best_of": (lambda value: value == 1 and value is not True, "only 1 is supported"),
    "function_call": (lambda value: value in ("none", "auto"), "does not support tools"),
    "functions": (fields.is_empty, "does not support tools"),
    "ignore_eos": (lambda value: value is False, "is not supported"),
    "logprobs": (lambda value: value is False, "log probabilities are not supported"),
    "modalities": (lambda value: value in ([], ["text"]), "only text is supported"),
    "moderation": (fields.is_empty, "is not supported"),
    "n": (lambda value: value == 1 and value is not True, "only 1 choice is supported"),
    "reasoning": (fields.is_empty, "does not support thinking"),
    "reasoning_effort": (lambda value: value == "none", "does not support thinking"),
    "response_format": (
        lambda value: value == {} or (isinstance(value, dict) and value.get("type") == "text"),
        'structured output is not supported; only {"type": "text"} is',
    ),
    "think": (lambda value: value is False, "does not support thinking"),
    "tool_choice": (lambda value: value in ("none", "auto"), "does not support tools"),
    "tools": (fields.is_empty, "does not support tools"),
    "top_logprobs": (lambda value: value == 0, "log probabilities are not supported"),
    "verbosity": (lambda value: value == "medium", "is not supported"),
    "web_search_options": (lambda value: value is None, "is not supported"),
}
_PART_NAMES = {"image_url": "images", "input_audio": "audio", "file": "files", "video_url": "video"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """A parsed request for a chat completion.

    `keep_alive_s`: None = the server's setting, 0 = unload after this request, inf = for ever.
    """

    model: str  # the name as the client sent it; replies carry it back
    request: GenerateRequest
    stream: bool
    include_usage: bool
    keep_alive_s: float | None


# --- requests ------------------------------------------------------------------------------------


def model_name(body: dict[str, Any]) -> str:
    """The `model` of a request body. Raises InvalidRequest when it is missing or not a name."""
    if not body.get("model"):
        raise InvalidRequest("model is required", param="model")
    return fields.string(body["model"], "model")


def parse_chat(body: dict[str, Any], card: ModelCard) -> ChatCall:
    """Body of POST /v1/chat/completions → call. Raises InvalidRequest naming the field.

    Beyond OpenAI's fields it honours top_k, min_p, typical_p, repetition_penalty (or
    repeat_penalty), repeat_last_n, num_ctx, keep_alive and Ollama's `options`; a field of its own
    comes before the same in `options`.
    """
    name = model_name(body)
    body = {field: value for field, value in body.items() if value is not None}
    _check_fields(body, name)
    options = check_options(body.get("options"))
    limits = {
        fields.integer(body[field], field, low=1)
        for field in ("max_tokens", "max_completion_tokens")
        if field in body
    }
    if len(limits) > 1:
        raise fields.refuse("max_tokens", "differs from max_completion_tokens; send one of them")
    messages = _messages(body.get("messages"), name)
    if card.embeds:
        raise InvalidRequest(
            f'"{name}" does not support chat: it is an embedding model; use /v1/embeddings',
            param="model",
        )
    if not card.has_template:
        raise fields.refuse(
            "messages", f'"{name}" does not support chat (no chat template); send a prompt instead'
        )
    defaults = {**DEFAULTS, **card.compiled.generation}
    if options:
        inner = fields.sampling(options, OPTION_NAMES, {}, prefix="options.")
        defaults |= {
            parameter: getattr(inner, parameter)
            for field, parameter in OPTION_NAMES.items()
            if options.get(field) is not None
        }
    num_ctx = body.get("num_ctx", options.get("num_ctx"))
    stream = "stream" in body and fields.boolean(body["stream"], "stream")
    return ChatCall(
        model=name,
        request=GenerateRequest(
            messages=messages,
            sampling=fields.sampling(body, _SAMPLING, defaults),
            context_limit=None if num_ctx is None else fields.integer(num_ctx, "num_ctx", low=1),
        ),
        stream=stream,
        include_usage=_include_usage(body.get("stream_options")) and stream,
        keep_alive_s=fields.parse_keep_alive(body.get("keep_alive")),
    )


def _check_fields(body: dict[str, Any], model: str) -> None:
    for field, value in body.items():
        if field in _HONOURED or field in _NO_EFFECT:
            continue
        if field not in _NEUTRAL:
            raise InvalidRequest(
                f"{field[:80]}: unknown field; remove it, because it might change the answer",
                param=field[:80],
            )
        fields.check_neutral(field, value, _NEUTRAL[field], model)


def _include_usage(value: Any) -> bool:
    if value is None:
        return False
    options = fields.mapping(value, "stream_options")
    for option in options:
        if option not in ("include_usage", "include_obfuscation"):
            raise fields.refuse(f"stream_options.{option[:80]}", "unknown field")
    wanted = options.get("include_usage")
    return wanted is not None and fields.boolean(wanted, "stream_options.include_usage")


def _messages(value: Any, model: str) -> tuple[Message, ...]:
    entries = fields.listing(value, "messages", fields.MAX_MESSAGES) if value is not None else []
    if not entries:
        raise InvalidRequest("[] is too short - 'messages'", param="messages")
    return tuple(
        _message(fields.mapping(entry, f"messages[{index}]"), f"messages[{index}]", model)
        for index, entry in enumerate(entries)
    )


def _message(entry: dict[str, Any], param: str, model: str) -> Message:
    role = entry.get("role")
    if not isinstance(role, str) or role not in fields.ROLES:
        raise fields.refuse(f"{param}.role", f"must be one of {', '.join(fields.ROLES)}")
    for field, what in (("tool_calls", "tools"), ("function_call", "tools"), ("audio", "audio")):
        if not fields.is_empty(entry.get(field)):
            raise fields.refuse(f"{param}.{field}", f'"{model}" does not support {what}')
    for field in ("prefix", "partial"):
        if entry.get(field):
            raise fields.refuse(f"{param}.{field}", "is not supported")
    content = entry.get("content")
    if content is None and role == "assistant":
        content = entry.get("refusal") or ""
    return Message(
        role=fields.ROLES[role],
        content=_content(content, f"{param}.content", model),
        name=_optional(entry, "name", param),
        tool_call_id=_optional(entry, "tool_call_id", param),
        reasoning=_optional(entry, "reasoning_content", param)
        or _optional(entry, "reasoning", param),
    )


def _optional(entry: dict[str, Any], field: str, param: str) -> str | None:
    value = entry.get(field)
    return fields.string(value, f"{param}.{field}") if value else None


def _content(value: Any, param: str, model: str) -> str:
    """Text of a message; text parts are joined by line breaks."""
    if not isinstance(value, list):
        return fields.string(value, param)
    texts = []
    for index, entry in enumerate(fields.listing(value, param, fields.MAX_MESSAGES)):
        place = f"{param}[{index}]"
        part = fields.mapping(entry, place)
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            what = _PART_NAMES.get(str(kind), f"parts of type {str(kind)[:40]!r}")
            raise fields.refuse(place, f'"{model}" does not support {what}; send text')
        texts.append(fields.string(part.get(kind), f"{place}.{kind}"))
    return "\n".join(texts)


# --- replies -------------------------------------------------------------------------------------


class ChatReply:
    """Writes one reply: the same id, time and fingerprint in all its chunks.

    The fingerprint names the compiled model: equal fingerprints mean equal weights.
    """

    def __init__(self, call: ChatCall, card: ModelCard) -> None:
        self._call = call
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": call.model,
            "system_fingerprint": f"fp_{card.digest[:12]}",
        }
        self._opened = False

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Delta → chunk objects: the role once, content, the finish reason, usage if asked for.

        Raises RuntimeFailure when the sequence was aborted: such an answer is no answer.
        """
        chunks = []
        if not self._opened:
            self._opened = True
            chunks.append(self._chunk({"role": "assistant", "content": ""}))
        if delta.text:
            chunks.append(self._chunk({"content": delta.text}))
        if delta.finish_reason is not None:
            chunks.append(self._chunk({}, finish_word(delta.finish_reason)))
            if self._call.include_usage and delta.usage is not None:
                chunks.append({**self._head, "choices": [], "usage": _usage(delta.usage)})
        return chunks

    def completion(self, text: str, finish_reason: FinishReason, usage: Usage) -> dict[str, Any]:
        """The reply of a request without `stream`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_word(finish_reason),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(usage),
        }

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head, "choices": [choice]}
        if self._call.include_usage:
            chunk["usage"] = None  # as OpenAI: null until the last chunk has it
        return chunk


def finish_word(reason: FinishReason) -> str:
    """stop or length; both APIs use these words. Raises RuntimeFailure for an aborted sequence."""
    if reason is FinishReason.ABORT:
        raise RuntimeFailure(
            "the model was unloaded before it finished its answer; send the request again",
            retry_after_s=1,
        )
    return reason.value


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


# --- models and errors ---------------------------------------------------------------------------


def to_model(card: ModelCard) -> dict[str, Any]:
    """Model object; the key "ohmygpu" holds what OpenAI has no field for."""
    record, compiled = card.record, card.compiled
    owner, slash, _ = record.name.partition("/")
    return {
        "id": card.name,
        "object": "model",
        "created": int(card.installed_at.timestamp()),
        "owned_by": owner if slash else "ohmygpu",
        "ohmygpu": {
            **record.to_dict(),
            "digest": card.digest,
            "size_bytes": card.size_bytes,
            "parameters": compiled.parameters,
            "quantization": compiled.quantization,
            "source_format": compiled.source_format,
            "target": compiled.target,
            "prompt_graph": compiled.prompt_graph,
            "context_length": compiled.context_length,
            "license": compiled.license,
            "kind": compiled.kind,
            "chat": card.has_template,
            "embedding_length": compiled.embedding_length,
            "pooling": compiled.pooling,
            "normalize": compiled.normalize,
            "prompts": dict(compiled.prompts),
            "sampling_defaults": dict(compiled.generation),
            "fidelity": {graph: asdict(found) for graph, found in card.fidelity.items()},
        },
    }


def to_model_list(cards: list[ModelCard]) -> dict[str, Any]:
    """Body of GET /v1/models."""
    return {"object": "list", "data": [to_model(card) for card in cards]}


_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(error: OhMyGPUError, status: int) -> dict[str, Any]:
    """{"error": {message, type, param, code, details?}} of an answer or a stream's last event."""
    kind = "invalid_request_error" if 400 <= status < 500 else "api_error"
    body: dict[str, Any] = {
        "message": error.message,
        "type": _ERROR_TYPES.get(status, kind),
        "param": error.details.get("param"),
        "code": error.code,
    }
    details = {key: value for key, value in error.details.items() if key not in ("param", "status")}
    if details:
        body["details"] = details
    return {"error": body}
