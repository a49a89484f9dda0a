"""Ollama's wire format of chat, generate, tags, ps and show: pure functions, no HTTP, no engine.

Signatures first; the bodies follow in the next commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import OhMyGPUError
from ..runtime_api import Delta, GenerateRequest
from .cards import ModelCard

Api = Literal["chat", "generate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A parsed request. `keep_alive_s`: None = the server's, 0 = unload after it, inf = for ever."""

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


def model_name(body: dict[str, Any], api: Api | None = None) -> str:
    """The model a body names, by `model` or the deprecated `name`, with Ollama's errors."""
    raise NotImplementedError


def parse_chat(body: dict[str, Any], card: ModelCard) -> GenerateCall | LoadCall:
    """Body of POST /api/chat → call. Raises InvalidRequest naming the field."""
    raise NotImplementedError


def parse_generate(body: dict[str, Any], card: ModelCard) -> GenerateCall | LoadCall:
    """Body of POST /api/generate → call. Raises InvalidRequest naming the field."""
    raise NotImplementedError


def parse_keep_alive(value: Any) -> float | None:
    """Seconds; None when absent (null), inf = for ever, 0 = unload at once. Go's duration rules."""
    raise NotImplementedError


class Reply:
    """Writes one reply: chunks, or the single object of `stream: false`.

    `load_s`: seconds the model took to load for this request; `total_duration` runs from `started`
    (time.monotonic()) to the last chunk.
    """

    def __init__(self, call: GenerateCall, *, started: float, load_s: float) -> None:
        raise NotImplementedError

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Delta → 0 to 2 objects, the last with done: true; errors on ABORT."""
        raise NotImplementedError

    def single(self, text: str, last: Delta) -> dict[str, Any]:
        """The reply of `stream: false`: all text and the last Delta."""
        raise NotImplementedError


def to_load_reply(call: LoadCall) -> dict[str, Any]:
    """Reply to a LoadCall: done with done_reason load or unload."""
    raise NotImplementedError


def to_tags(cards: list[ModelCard]) -> dict[str, Any]:
    """Body of GET /api/tags, newest first."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A loaded model for /api/ps. `expires_in_s`: inf = never."""

    card: ModelCard
    size_bytes: int
    vram_bytes: int
    context_tokens: int
    expires_in_s: float


def to_ps(loaded: list[Loaded]) -> dict[str, Any]:
    """Body of GET /api/ps, longest-lived first."""
    raise NotImplementedError


def to_show(card: ModelCard, *, verbose: bool = False) -> dict[str, Any]:
    """Body of POST /api/show; `verbose` adds the vocabulary."""
    raise NotImplementedError


def error_body(error: OhMyGPUError) -> dict[str, str]:
    """{"error": "text"}; also the last line of a failed stream."""
    raise NotImplementedError


def model_not_found(name: str) -> str:
    """Ollama's text, which its CLI matches: model 'x' not found."""
    raise NotImplementedError
