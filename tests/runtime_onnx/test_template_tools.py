"""Conversations with tools: rendered as transformers renders them, template by template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.core.records import TOOL_TEMPLATE_FILE
from ohmygpu.runtime_api import (
    GenerateRequest,
    SamplingParams,
    request_from_plain,
    to_plain,
)
from ohmygpu.runtime_onnx.template import ChatTemplate
from ohmygpu.runtime_onnx.tokenizer import Tokenizer
from tests.runtime_onnx import tiny_tokenizer
from tests.runtime_onnx.tool_talks import (
    ANSWERED,
    CALLED,
    PLAIN,
    TALKS,
    TOKENS,
    TOOLS,
    by_us,
    differences,
)
from tests.runtime_onnx.tool_templates import HERMES, QWEN_3, TOOL_TEMPLATES


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_prompts_with_tools_are_those_of_transformers(name: str, talk: str) -> None:
    assert differences(TOOL_TEMPLATES[name], TALKS[talk]) == []


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
