"""Conversations with tools: rendered as transformers renders them, template by template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.core.records import TOOL_TEMPLATE_FILE
from ohmygpu.runtime_api import (
    GenerateRequest,
    Message,
    SamplingParams,
    request_from_plain,
    to_plain,
)
from ohmygpu.runtime_onnx.template import ChatTemplate
from ohmygpu.runtime_onnx.tokenizer import Tokenizer
from tests.runtime_onnx import tiny_tokenizer
from tests.runtime_onnx.tool_templates import HERMES, QWEN_3, TOOL_TEMPLATES

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
    try:
        return ChatTemplate(template, TOKENS).render(messages, tools, **more)
    except InvalidRequest as error:
        return "refused: " + str(error).split("refuses these messages: ")[1]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_prompts_with_tools_are_those_of_transformers(name: str, talk: str) -> None:
    template, messages = TOOL_TEMPLATES[name], TALKS[talk]
    for tools, more in ((None, {}), (TOOLS, {}), (TOOLS, EXTRA)):
        expected = by_transformers(template, messages, tools, **more)
        found = by_us(template, messages, tools, **more)
        if expected.startswith("refused"):
            assert found.startswith("refused")
        else:
            assert found == expected


def test_the_templates_show_calls_and_answers() -> None:
    for name, template in TOOL_TEMPLATES.items():
        found = by_us(template, ANSWERED, TOOLS)
        if name == "gemma 3":
            assert "must alternate" in found
        else:
            missing = [
                part for part in ("get_weather", '"Köln"', "20", "Thanks") if part not in found
            ]
            assert not missing, (name, missing, found)


def test_variables_reach_the_template() -> None:
    template = ChatTemplate(QWEN_3, TOKENS)
    assert template.render(PLAIN, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert template.render(PLAIN, enable_thinking=True).endswith("<|im_start|>assistant\n")
    assert template.render(PLAIN, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_only_plain_data_reaches_the_template() -> None:
    with pytest.raises(TypeError, match="Path"):
        ChatTemplate("{{ x.home() }}", TOKENS).render(PLAIN, x=Path())


def test_conversations_with_tools_use_the_template_for_them() -> None:
    template = ChatTemplate("plain", TOKENS, tool_text="{{ tools | length }} tools")
    assert template.render(PLAIN) == "plain"
    assert template.render(PLAIN, TOOLS) == "2 tools"
    assert template.render(PLAIN, []) == "0 tools"


def test_a_bad_template_for_tools_harms_only_conversations_with_tools() -> None:
    template = ChatTemplate("plain", TOKENS, tool_text="{% if %}")
    assert template.render(PLAIN) == "plain"
    with pytest.raises(InvalidRequest, match="not valid"):
        template.render(PLAIN, TOOLS)


def test_a_compiled_model_may_have_a_template_for_tools(tmp_path: Path) -> None:
    plain = tiny_tokenizer.byte_level()
    folder = tiny_tokenizer.save(tmp_path, plain, "plain")
    (folder / TOOL_TEMPLATE_FILE).write_text(HERMES, encoding="utf-8")
    compiled = tiny_tokenizer.compiled(plain, "<|im_end|>", "<|im_start|>")
    tokenizer = Tokenizer(folder, compiled)
    assert tokenizer.render(CALLED) == "plain"
    assert "<tool_call>" in tokenizer.render(CALLED, TOOLS)


def test_tool_calls_survive_the_way_to_the_worker() -> None:
    request = GenerateRequest(sampling=SamplingParams(), messages=tuple(ANSWERED))
    assert request_from_plain(json.loads(json.dumps(to_plain(request)))) == request
