"""Request → prompt tokens: template, tokenise, drop oldest messages where that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ohmygpu.core.errors import ContextLengthExceeded, InvalidRequest
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
    elif request.truncate:
        return _truncated(request, request.messages, encoder, context_tokens)
    else:
        token_ids = encoder.encode_chat(request.messages, request.context_tokens)
    if not token_ids:
        raise InvalidRequest("the prompt is empty; send at least one character", param="prompt")
    check_fits(len(token_ids), context_tokens)
    return Prompt(token_ids)


def _truncated(
    request: GenerateRequest, messages: Sequence[Message], encoder: Encoder, context_tokens: int
) -> Prompt:
    """Drop as few oldest messages as make the prompt fit; system messages and the last one stay.

    A prompt only gets shorter by dropping, so the count is found by bisection.
    """
    removable = [index for index, message in enumerate(messages[:-1]) if message.role != "system"]

    def encode(dropped: int) -> list[int]:
        """The prompt without the first `dropped`; ContextLengthExceeded while too long."""
        gone = set(removable[:dropped])
        kept = [message for index, message in enumerate(messages) if index not in gone]
        token_ids = encoder.encode_chat(kept, request.context_tokens)
        check_fits(len(token_ids), context_tokens)
        return token_ids

    try:
        return Prompt(encode(0))
    except ContextLengthExceeded:
        pass
    low, high = 0, len(removable)  # dropping `low` is too few; `high` is the most there is
    best = encode(high)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            best = encode(middle)
            high = middle
        except ContextLengthExceeded:
            low = middle
    return Prompt(best, high)
