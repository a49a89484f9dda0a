"""Request → prompt tokens: template, tokenise, drop oldest messages where that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.runtime_api import GenerateRequest, Message

from .sequence import check_fits


class Encoder(Protocol):
    """The part of Tokenizer that prompts need."""

    def encode_chat(
        self, messages: Sequence[Message], context_tokens: Sequence[int] = ()
    ) -> list[int]:
        """Prompt of a conversation."""
        ...

    def encode_prompt(self, prompt: str, context_tokens: Sequence[int] = ()) -> list[int]:
        """Prompt of plain text."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given: token ids, and how many messages `truncate` left out."""

    token_ids: list[int]
    dropped_messages: int = 0


def prepare_prompt(request: GenerateRequest, encoder: Encoder, context_tokens: int) -> Prompt:
    """The prompt of `request` in a context of `context_tokens`.

    Raises ContextLengthExceeded when it does not fit, after dropping all that `truncate` allows;
    InvalidRequest when there is nothing to compute or the template refuses the messages.
    """
    if request.messages is None:
        token_ids = encoder.encode_prompt(request.prompt or "", request.context_tokens)
    else:
        token_ids = encoder.encode_chat(request.messages, request.context_tokens)
        if request.truncate and len(token_ids) >= context_tokens:
            return _truncated(request, encoder, context_tokens)
    if not token_ids:
        raise InvalidRequest("the prompt is empty; send at least one character", param="prompt")
    check_fits(len(token_ids), context_tokens)
    return Prompt(token_ids)


def _truncated(request: GenerateRequest, encoder: Encoder, context_tokens: int) -> Prompt:
    """Drop as few oldest messages as make the prompt fit; system messages and the last one stay.

    A prompt only gets shorter by dropping, so the count is found by bisection.
    """
    messages = request.messages or ()
    removable = [index for index, message in enumerate(messages[:-1]) if message.role != "system"]

    def encode(dropped: int) -> list[int]:
        gone = set(removable[:dropped])
        kept = [message for index, message in enumerate(messages) if index not in gone]
        return encoder.encode_chat(kept, request.context_tokens)

    low, high = 0, len(removable)  # dropping `low` is too few; `high` is the most there is
    best = encode(high)
    check_fits(len(best), context_tokens)
    while high - low > 1:
        middle = (low + high) // 2
        token_ids = encode(middle)
        if len(token_ids) < context_tokens:
            high, best = middle, token_ids
        else:
            low = middle
    return Prompt(best, high)
