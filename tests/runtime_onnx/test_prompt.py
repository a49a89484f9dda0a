"""From a request to prompt tokens: what is dropped, what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ohmygpu.core.errors import ContextLengthExceeded, InvalidRequest
from ohmygpu.runtime_api import GenerateRequest, Message, SamplingParams
from ohmygpu.runtime_onnx.prompt import prepare_prompt


class CountingEncoder:
    """One token for each character, plus two for each message."""

    def __init__(self) -> None:
        self.calls = 0

    def encode_chat(
        self, messages: Sequence[Message], context_tokens: Sequence[int] = ()
    ) -> list[int]:
        self.calls += 1
        return [1] * sum(2 + len(message.content) for message in messages)

    def encode_prompt(self, prompt: str, context_tokens: Sequence[int] = ()) -> list[int]:
        return [*context_tokens, *prompt.encode()]


def conversation(*roles: str, truncate: bool = True) -> GenerateRequest:
    messages = tuple(Message(role, "x" * 8) for role in roles)
    return GenerateRequest(
        messages=messages, sampling=SamplingParams(max_tokens=4), truncate=truncate
    )


@pytest.mark.parametrize(
    ("context", "dropped"), [(100, 0), (51, 0), (50, 1), (41, 1), (40, 2), (31, 2), (30, 3)]
)
def test_truncation_drops_as_few_oldest_messages_as_it_must(context: int, dropped: int) -> None:
    talk = conversation("system", "user", "assistant", "user", "user")
    result = prepare_prompt(talk, CountingEncoder(), context)
    assert result.dropped_messages == dropped
    assert len(result.token_ids) == 10 * (5 - dropped) < context


def test_truncation_keeps_system_messages_and_the_last_one() -> None:
    talk = conversation("system", "user", "assistant", "user")
    with pytest.raises(ContextLengthExceeded, match="20 tokens"):
        prepare_prompt(talk, CountingEncoder(), 20)
    long_talk = conversation(*(["user", "assistant"] * 200), "user")
    encoder = CountingEncoder()
    assert prepare_prompt(long_talk, encoder, 35).dropped_messages == 398
    assert encoder.calls <= 12


def test_without_truncation_a_long_conversation_is_refused() -> None:
    talk = conversation("user", "assistant", "user", truncate=False)
    with pytest.raises(ContextLengthExceeded, match="30 tokens"):
        prepare_prompt(talk, CountingEncoder(), 25)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        prepare_prompt(GenerateRequest(prompt="", sampling=SamplingParams()), CountingEncoder(), 25)


def test_messages_the_tokenizer_refuses_unread_can_still_be_dropped() -> None:
    class Refusing(CountingEncoder):
        def encode_chat(
            self, messages: Sequence[Message], context_tokens: Sequence[int] = ()
        ) -> list[int]:
            if len(messages) > 3:
                raise ContextLengthExceeded("too long to be tokenised at all")
            return super().encode_chat(messages, context_tokens)

    talk = conversation(*(["user", "assistant"] * 8), "user")
    assert prepare_prompt(talk, Refusing(), 1000).dropped_messages == 14
