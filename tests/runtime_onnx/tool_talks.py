"""Conversations with tools, and how transformers and we render them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.runtime_api import Message
from ohmygpu.runtime_onnx.template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather of a <city> & "more" é',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Paris", "Köln"]},
                    "days": {"type": "integer", "default": 3},
                    "parts": {"type": "array", "items": {"type": "string"}},
                    "unit": {"type": ["string", "null"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}},
}
PLAIN = [Message("user", " Hi <b>& 'you' 🙂\n")]
SPOKEN = [
    Message("system", "Be kind."),
    Message("user", "Hi"),
    Message("assistant", "<think>\nhm\n</think>\n\nHello "),
    Message("user", "Größe?"),
]
CALLED = [
    Message("system", "Be kind."),
    Message("user", "Weather?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", '{"t": 20}', name="get_weather", tool_call_id="abcdef123"),
]
ANSWERED = [*CALLED, Message("assistant", "20 degrees."), Message("user", "Thanks")]
TALKS = {"plain": PLAIN, "spoken": SPOKEN, "called": CALLED, "answered": ANSWERED}
EXTRA = {
    "enable_thinking": False,
    "reasoning_effort": "high",
    "controls": {"length": "long"},
    "documents": [{"title": "T", "text": "x <y>"}],
}


def as_request(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a client of the OpenAI API would send them."""
    sent: list[dict[str, Any]] = []
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            entry |= {"content": None, "tool_calls": [dict(call) for call in message.tool_calls]}
        if message.role == "tool":
            entry |= {"name": message.name, "tool_call_id": message.tool_call_id}
        sent.append(entry)
    return sent


def by_transformers(
    template: str, messages: Sequence[Message], tools: list[dict[str, Any]] | None, **more: Any
) -> str:
    """What transformers renders, or the words with which the template refuses."""
    options = {"add_generation_prompt": True, **more}
    try:
        rendered, _ = render_jinja_template(
            [as_request(messages)], tools=tools, chat_template=template, **options, **TOKENS
        )
    except Exception as error:  # noqa: BLE001  whatever a template can fail with
        return f"refused: {error}"
    return str(rendered[0])


def by_us(
    template: str, messages: Sequence[Message], tools: list[dict[str, Any]] | None, **more: Any
) -> str:
    """What we render, or the words with which the template refuses."""
    try:
        return ChatTemplate(template, TOKENS).render(messages, tools, **more)
    except InvalidRequest as error:
        return "refused: " + str(error).split("refuses these messages: ")[1]


def differences(template: str, messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(transformers' text, ours) where they differ: without tools, with tools, with variables.

    Where both refuse, their words may differ.
    """
    found = []
    for tools, more in ((None, {}), (TOOLS, {}), (TOOLS, EXTRA)):
        pair = (
            by_transformers(template, messages, tools, **more),
            by_us(template, messages, tools, **more),
        )
        if pair[0] != pair[1] and not all(text.startswith("refused") for text in pair):
            found.append(pair)
    return found
