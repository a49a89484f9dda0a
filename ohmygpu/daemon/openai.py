"""The OpenAI wire format of chat completions and models: pure functions, no HTTP, no engine.

Signatures first; the bodies follow in the next commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import OhMyGPUError
from ..runtime_api import Delta, FinishReason, GenerateRequest, Usage
from .cards import ModelCard


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


def model_name(body: dict[str, Any]) -> str:
    """The `model` of a request body. Raises InvalidRequest when missing or not a name."""
    raise NotImplementedError


def parse_chat(body: dict[str, Any], card: ModelCard) -> ChatCall:
    """Body of POST /v1/chat/completions → call. Raises InvalidRequest naming the field."""
    raise NotImplementedError


class ChatReply:
    """Writes one reply: the same id, time and fingerprint in all its chunks."""

    def __init__(self, call: ChatCall, card: ModelCard) -> None:
        raise NotImplementedError

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Delta → 0 or more chunk objects (role, content, finish, usage); errors on ABORT."""
        raise NotImplementedError

    def completion(self, text: str, finish_reason: FinishReason, usage: Usage) -> dict[str, Any]:
        """The non-streamed reply."""
        raise NotImplementedError


def to_model(card: ModelCard) -> dict[str, Any]:
    """Model object, with the key "ohmygpu" for details beyond OpenAI's."""
    raise NotImplementedError


def to_model_list(cards: list[ModelCard]) -> dict[str, Any]:
    """Body of GET /v1/models."""
    raise NotImplementedError


def error_body(error: OhMyGPUError, status: int) -> dict[str, Any]:
    """{"error": {message, type, param, code, details?}} for an HTTP status or a mid-stream error."""
    raise NotImplementedError
